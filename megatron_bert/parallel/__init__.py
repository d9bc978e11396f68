"""Tensor-parallel layers and sharded data parallelism; knows nothing of BERT."""
