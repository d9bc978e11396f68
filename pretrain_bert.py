"""Pretrain a BERT-type encoder: torchrun pretrain_bert.py --config FILE [key.path=value ...]."""

from __future__ import annotations

from megatron_bert.config.errors import run_cli
from megatron_bert.training.main import main

if __name__ == "__main__":
    run_cli(main)
