"""A directory as an export leaves it, of a tiny model and made without a training run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_bert import huggingface
from megatron_bert.checkpoint.huggingface_config import auto_map
from tests.huggingface.tiny_models import HEADS, tiny_config, tiny_tokenizer


def write_exported(folder: Path, head: str = "MaskedLM", **changes: Any) -> Path:
    """Write weights, configuration, tokenizer and modeling code, and return the folder."""
    torch.manual_seed(7)
    HEADS[head](tiny_config(**changes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    for code in Path(huggingface.__path__[0]).glob("*_retrieva_bert.py"):
        shutil.copy(code, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = auto_map()
    (folder / "config.json").write_text(json.dumps(config))
    return folder
