"""How layers, rows, tokens and stages are shared out among ranks; knows nothing of BERT."""
