"""ModernBERT's configuration in the keys of transformers 4 and of transformers 5.

Release 4 says how many layers see all (`global_attn_every_n_layers`) and two bases of rotary
positions; release 5 lists every layer's kind (`layer_types`) and has an object for each kind
(`rope_parameters`). A file that says both is read alike by either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bert.config.schema import ModelConfig

_FULL, _LOCAL = "full_attention", "sliding_attention"
_THETAS = {_FULL: "global_rope_theta", _LOCAL: "local_rope_theta"}


def newer_keys(model: ModelConfig) -> dict[str, Any]:
    """Return release 5's keys of what release 4 has other keys for."""
    thetas = {_FULL: model.rope_theta, _LOCAL: model.local_rope_theta}
    return {
        "layer_types": [_LOCAL if model.is_local(n) else _FULL for n in range(model.num_layers)],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()
        },
    }


def in_older_keys(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a configuration under release 4's keys, and what cannot be said under them."""
    found = dict(content)
    problems: list[str] = []
    if isinstance(content.get("layer_types"), list):
        every = _every(content["layer_types"])
        if every is None:
            problems.append(
                f"layer_types is {content['layer_types']}, but the training model has one "
                f"{_FULL} layer in so many, the first one among them"
            )
        else:
            found["global_attn_every_n_layers"] = every
    if content.get("rope_scaling") is not None:
        # Release 5 still obeys this key.
        problems.append(
            f"rope_scaling is {content['rope_scaling']!r}, but the training model scales no "
            "positions"
        )
    rope = content.get("rope_parameters")
    for kind, key in _THETAS.items():
        parameters = rope.get(kind) if isinstance(rope, dict) else None
        if not isinstance(parameters, dict):
            continue
        if parameters.get("rope_type", "default") != "default":
            problems.append(
                f"rope_parameters.{kind}.rope_type is {parameters['rope_type']!r}, but the "
                "training model has 'default' only"
            )
        if "rope_theta" in parameters:
            found[key] = parameters["rope_theta"]
    return found, problems


def _every(kinds: list[Any]) -> int | None:
    """Of how many layers one sees all; None where the others are not local, or it is irregular."""
    full = [number for number, kind in enumerate(kinds) if kind == _FULL]
    every = full[1] if len(full) > 1 else len(kinds)
    expected = [_LOCAL if number % every else _FULL for number in range(len(kinds))]
    return every if kinds and kinds == expected else None
