"""common/ - reading, writing, refusing: what every script shares."""
