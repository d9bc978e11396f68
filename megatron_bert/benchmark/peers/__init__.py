"""The same training by others: transformers' Trainer and Megatron-core's BERT."""
