"""The same training by other software: transformers' Trainer and Megatron-core's BERT."""
