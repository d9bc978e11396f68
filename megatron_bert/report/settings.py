"""The configurations of some runs, compared key by key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_bert.config.keys import dotted
from megatron_bert.config.leaves import leaves
from megatron_bert.config.yaml_text import parse_document
from megatron_bert.errors import ConfigError

# Differs between all runs, and is shown already.
_NAMES_THE_RUN = "run.dir"
ABSENT = "—"


def differences(texts: Sequence[str | None]) -> dict[str, list[str]]:
    """The dotted keys whose values are not the same in all configurations, with the values.

    Args:
        texts: the resolved configurations, YAML; None, and what is not readable, has no keys.
    """
    settings = [_settings(text) for text in texts]
    keys = dict.fromkeys(key for values in settings for key in values)
    rows = {key: [values.get(key, ABSENT) for values in settings] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1 and key != _NAMES_THE_RUN}


def _settings(text: str | None) -> dict[str, str]:
    try:
        tree, _ = parse_document(text or "", "a run's configuration")
    except ConfigError:
        return {}
    # A key without a value is treated as absent.
    return {dotted(path): _as_text(value) for path, value in leaves(tree) if value is not None}


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
