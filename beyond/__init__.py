"""beyond/ - what a first reader skips: a cache in a file, CUDA graphs, a page, runs that resume."""
