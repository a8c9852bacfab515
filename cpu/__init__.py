"""cpu/ - the ladder's rung for processors: compiled loops that choose, attend and multiply."""
