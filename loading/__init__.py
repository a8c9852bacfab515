"""loading/ - what others wrote, read: weights, where a model is found, tokenizers."""
