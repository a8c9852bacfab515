"""measure/ - how a number is taken: times, attention kept, intervals, tables."""
