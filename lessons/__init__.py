"""The course: seven questions about sparse attention, each with an experiment. See README.md."""
