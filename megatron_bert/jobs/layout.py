"""The layout of a job that got another number of ranks than the configuration was written for."""

from __future__ import annotations

from megatron_bert.config.errors import ConfigError
from megatron_bert.config.layout_checks import RankLayout, layout_problems, nearest_layouts
from megatron_bert.config.schema import Config


def layout_keys(config: Config, ranks: int) -> list[str]:
    """Return the keys of `parallel` that must change for a job of `ranks` ranks, `key=value` each.

    The layout that works is the one with the fewest doublings and halvings from the one asked for;
    data parallelism takes the ranks left over. What the batch needs follows from that: its rows are
    the same ones on every layout.

    Raises:
        ConfigError: no layout of so many ranks works; the message tells numbers that have one.
    """
    vocab_size = config.model.vocab_size
    problems = layout_problems(config, ranks, vocab_size)
    if not problems:
        return []
    layouts = nearest_layouts(config, ranks, vocab_size)
    if not layouts:
        raise ConfigError("\n".join(problems))
    asked, found = RankLayout.of(config), layouts[0]
    return [
        f"parallel.{name}={getattr(found, name)}"
        for name in ("tensor", "pipeline", "replicate")
        if getattr(found, name) != getattr(asked, name)
    ]
