"""megatron_bert: distributed pretraining of BERT-type encoders on PyTorch."""

__version__ = "0.1.0"
