"""What a conversion takes of the host's memory: twice the largest tensor and a file, however many.

Mapped files count. The model here is more than that as a whole, in fp32, by a good deal.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bert.benchmark.process import (
    peak_resident_megabytes,
    resident_megabytes,
    run_isolated,
)
from megatron_bert.checkpoint.huggingface_export import export_checkpoint
from megatron_bert.checkpoint.huggingface_import import import_model
from megatron_bert.checkpoint.huggingface_names import model_parameters
from megatron_bert.checkpoint.store import CheckpointStore
from megatron_bert.config.load import config_dict
from megatron_bert.data.tokenizer import Tokenizer
from tests.small_model import small_config

FILE_BYTES = 1 << 24
VOCABULARY = 1 << 15
SHAPES: dict[str, dict[str, Any]] = {
    "retrievabert": {"num_layers": 5, "hidden_size": 128, "ffn_hidden_size": 1 << 14},
    # Their largest tensor is as large as the embeddings: gate and up, stacked.
    "modernbert": {
        "architecture": "modernbert",
        "num_query_groups": 4,
        "num_layers": 5,
        "hidden_size": 128,
        "ffn_hidden_size": 1 << 14,
    },
}
LARGEST_MB = VOCABULARY * 128 * 4 / 1e6
ALLOWED_MB = 2 * LARGEST_MB + FILE_BYTES / 1e6


def _save(folder: Path, tokenizer: Path, vocab_size: int, **shape: Any) -> float:
    """Save a checkpoint; return the size of its weights in MB."""
    config = small_config(model=shape, data={"tokenizer": str(tokenizer)})
    parameters = model_parameters(config.model, vocab_size)
    tensors = {f"model.{p.name}": torch.rand(p.shape) for p in parameters}
    state = {
        "config": config_dict(config),
        "tokenizer_hash": Tokenizer.load(tokenizer).hash,
        "step": 1,
        "consumed_rows": 8,
        "data": ["none"],
        "topology": {"data": 1},
    }
    CheckpointStore(folder, keep=1, max_file_bytes=FILE_BYTES).save(1, tensors, state)
    return sum(p.size for p in parameters) * 4 / 1e6


def _rises(small: Path, large: Path) -> list[float]:
    """Convert there and back; return how far this process' memory rose by then, in MB."""
    checkpoint = Path("checkpoints") / "step_00000001"
    # What a first conversion imports is no part of it.
    export_checkpoint(small / checkpoint, small / "exported")
    import_model(small / "exported", small / "imported")
    gc.collect()
    before_mb = resident_megabytes()
    export_checkpoint(large / checkpoint, large / "exported")
    there_mb = peak_resident_megabytes() - before_mb
    import_model(large / "exported", large / "imported", max_file_bytes=FILE_BYTES)
    return [there_mb, peak_resident_megabytes() - before_mb]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHAPES)
def test_conversion_takes_twice_the_largest_tensor_and_a_file(
    tiny_tokenizer_path: Path,
    tmp_path: Path,
    architecture: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Or glibc may keep freed tensors of this size for later ones; above 32 MB it never does.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1048576")
    small, large = tmp_path / "small", tmp_path / "large"
    _save(small / "checkpoints", tiny_tokenizer_path, 512)
    weights_mb = _save(
        large / "checkpoints", tiny_tokenizer_path, VOCABULARY, **SHAPES[architecture]
    )
    assert weights_mb > 2.5 * ALLOWED_MB
    for rise_mb in run_isolated(_rises, small, large):
        assert rise_mb < ALLOWED_MB
