"""ModernBERT's configuration in the keys of transformers 4 and of transformers 5.

Release 4 gives the interval of layers with global attention (`global_attn_every_n_layers`) and two
bases of rotary positions; release 5 lists every layer's kind (`layer_types`) and has an object for
each kind (`rope_parameters`). Both read a file that has both in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bert.config.schema import ModelConfig

_FULL, _LOCAL = "full_attention", "sliding_attention"
_THETAS = {_FULL: "global_rope_theta", _LOCAL: "local_rope_theta"}


def newer_keys(model: ModelConfig) -> dict[str, Any]:
    """Return release 5's keys for what release 4 expresses by other keys."""
    thetas = {_FULL: model.rope_theta, _LOCAL: model.local_rope_theta}
    return {
        "layer_types": [_LOCAL if model.is_local(n) else _FULL for n in range(model.num_layers)],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()
        },
    }


def in_older_keys(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a configuration under release 4's keys, and what these cannot express."""
    found = dict(content)
    problems: list[str] = []
    if content.get("layer_types") is not None:
        kinds, layers = content["layer_types"], content.get("num_hidden_layers")
        every = _every(kinds)
        if every is None:
            problems.append(
                f"layer_types is {kinds!r}, but the training model has one {_FULL} layer in so "
                "many, the first one among them"
            )
        elif layers is not None and len(kinds) != layers:
            problems.append(f"layer_types has {len(kinds)} entries, but num_hidden_layers {layers}")
        else:
            found["global_attn_every_n_layers"] = every
    if content.get("local_rope_theta", ...) is None:
        # In release 4 this means: the same as in layers with global attention.
        found["local_rope_theta"] = content.get("global_rope_theta", _default("rope_theta"))
    if content.get("rope_scaling") is not None:
        # Release 5 still obeys this key.
        problems.append(
            f"rope_scaling is {content['rope_scaling']!r}, but the training model scales no "
            "positions"
        )
    rope = content.get("rope_parameters")
    if rope is None:
        return found, problems
    if not (isinstance(rope, dict) and all(isinstance(rope[kind], dict) for kind in rope)):
        return found, [
            *problems,
            f"rope_parameters is {rope!r}, expected an object for each of {' and '.join(_THETAS)}",
        ]
    for kind, key in _THETAS.items():
        parameters = rope.get(kind, {})
        if parameters.get("rope_type", "default") != "default":
            problems.append(
                f"rope_parameters.{kind}.rope_type is {parameters['rope_type']!r}, but the "
                "training model has 'default' only"
            )
        if "rope_theta" in parameters:
            found[key] = parameters["rope_theta"]
    return found, problems


def _default(key: str) -> Any:
    return ModelConfig.model_fields[key].default


def _every(kinds: Any) -> int | None:
    """The interval of full-attention layers; None if it is irregular or others are not local."""
    if not isinstance(kinds, list):
        return None
    full = [number for number, kind in enumerate(kinds) if kind == _FULL]
    every = full[1] if len(full) > 1 else len(kinds)
    expected = [_LOCAL if number % every else _FULL for number in range(len(kinds))]
    return every if kinds and kinds == expected else None
