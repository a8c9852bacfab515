"""tasks/ - documents and texts to train on and to be asked about, and the evaluation over them."""
