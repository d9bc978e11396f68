"""What a checkpoint holds, in lines for people."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_bert.checkpoint.manifest import verified_manifest
from megatron_bert.checkpoint.tensors import saved_shapes


def describe_checkpoint(folder: Path) -> Iterator[str]:
    """Yield the lines; every file is compared with the manifest first.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
    """
    manifest = verified_manifest(folder)
    state: Any = manifest.state
    model = state["config"]["model"]
    shapes = saved_shapes(folder)
    parameters = sum(math.prod(s) for name, s in shapes.items() if name.startswith("model."))
    size = sum(record.size for record in manifest.files.values())
    topology = ", ".join(f"{axis} {ranks}" for axis, ranks in state["topology"].items())
    yield f"checkpoint  {folder}"
    yield f"step        {manifest.step:,}, {state['consumed_rows']:,} rows consumed"
    yield (
        f"model       {model['num_layers']} layers, hidden {model['hidden_size']}, feed-forward "
        f"{model['ffn_hidden_size']}, {model['num_attention_heads']} heads, "
        f"{model['num_query_groups']} key/value heads; {parameters:,} parameters"
    )
    yield f"tokenizer   {state['config']['data']['tokenizer']}, SHA-256 {state['tokenizer_hash']}"
    yield f"data        {'; '.join(state['data'])}"
    yield f"saved by    {topology}"
    yield f"content     {len(shapes):,} tensors in {len(manifest.files)} files, {size:,} bytes"
    yield "intact      every size and checksum is the manifest's"
