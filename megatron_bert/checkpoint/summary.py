"""What a checkpoint holds, in lines for people."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_bert.checkpoint.manifest import reading_state, verified_manifest
from megatron_bert.checkpoint.tensors import saved_shapes


def describe_checkpoint(folder: Path) -> list[str]:
    """Return the lines; every file is compared with the manifest first.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or not of a training run.
    """
    manifest = verified_manifest(folder)
    shapes = saved_shapes(folder)
    parameters = sum(math.prod(s) for name, s in shapes.items() if name.startswith("model."))
    size = sum(record.size for record in manifest.files.values())
    state: Any = manifest.state
    with reading_state(folder):
        model = state["config"]["model"]
        topology = ", ".join(f"{axis} {ranks}" for axis, ranks in state["topology"].items())
        return [
            f"checkpoint  {folder}",
            f"step        {manifest.step:,}, {state['consumed_rows']:,} rows consumed",
            f"model       {model['num_layers']} layers, hidden {model['hidden_size']}, "
            f"feed-forward {model['ffn_hidden_size']}, {model['num_attention_heads']} heads, "
            f"{model['num_query_groups']} key/value heads; {parameters:,} parameters",
            f"tokenizer   {state['config']['data']['tokenizer']}, "
            f"SHA-256 {state['tokenizer_hash']}",
            f"data        {'; '.join(state['data'])}",
            f"saved by    {topology}",
            f"content     {len(shapes):,} tensors in {len(manifest.files)} files, {size:,} bytes",
            "intact      every size and checksum is the manifest's",
        ]
