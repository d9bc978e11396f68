"""Megatron-LM's arguments for BERT, and what each becomes in this project's configuration."""
