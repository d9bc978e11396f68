"""The one table of parameter names: this project's and Hugging Face's.

The right side is RetrievaBERT's as far as it is published (MegatronBert's names with Llama's MLP).
Matrices are laid out alike on both sides, `[out, in]`, and nothing is fused, so that a name is all
that changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

_MODULES: Mapping[str, str] = MappingProxyType(
    {
        "embeddings.word": "bert.embeddings.word_embeddings",
        "embeddings.position": "bert.embeddings.position_embeddings",
        "blocks.*.attention_norm": "bert.encoder.layer.*.attention.ln",
        "blocks.*.attention.query": "bert.encoder.layer.*.attention.self.query",
        "blocks.*.attention.key": "bert.encoder.layer.*.attention.self.key",
        "blocks.*.attention.value": "bert.encoder.layer.*.attention.self.value",
        "blocks.*.attention.output": "bert.encoder.layer.*.attention.output.dense",
        "blocks.*.feed_forward_norm": "bert.encoder.layer.*.ln",
        "blocks.*.feed_forward.gate": "bert.encoder.layer.*.mlp.gate_proj",
        "blocks.*.feed_forward.up": "bert.encoder.layer.*.mlp.up_proj",
        "blocks.*.feed_forward.down": "bert.encoder.layer.*.mlp.down_proj",
        "final_norm": "bert.encoder.ln",
        "head.dense": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
        "head": "cls.predictions",
    }
)
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def huggingface_name(name: str) -> str:
    """Return the Hugging Face name of a parameter of `BertForPretraining`.

    Raises:
        KeyError: the table has no such parameter.
    """
    module, _, kind = name.rpartition(".")
    layer = _LAYER.search(module)
    if layer is None:
        return f"{_MODULES[module]}.{kind}"
    return f"{_MODULES[_LAYER.sub('*', module)]}.{kind}".replace("*", layer[0])
