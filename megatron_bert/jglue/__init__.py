"""Fine-tuning and evaluation on JGLUE, for any encoder that transformers loads."""
