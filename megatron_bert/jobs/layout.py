"""The layout of a job that got another number of ranks than the configuration was written for."""

from __future__ import annotations

from megatron_bert.config.layout_checks import layout_problems, nearest_layouts
from megatron_bert.config.rank_layout import RankLayout, without_chosen_layout
from megatron_bert.config.schema import Config
from megatron_bert.errors import ConfigError


def fitting_layout(config: Config, ranks: int) -> RankLayout:
    """Return the configuration's layout, or the nearest that works on so many ranks.

    That is the one with the fewest doublings and halvings from the one asked for; data parallelism
    takes the ranks left over. What the batch needs follows from that: its rows are the same ones on
    every layout. Under `parallel.layout: auto` it only shows that a layout exists.

    Raises:
        ConfigError: no layout of so many ranks works; the message names numbers of ranks that have
            one.
    """
    asked, vocab_size = without_chosen_layout(config), config.model.vocab_size
    problems = layout_problems(asked, ranks, vocab_size)
    if not problems:
        return RankLayout.of(asked)
    layouts = nearest_layouts(asked, ranks, vocab_size)
    if not layouts:
        raise ConfigError("\n".join(problems))
    return layouts[0]


def layout_keys(config: Config, layout: RankLayout) -> list[str]:
    """Return the keys of `parallel` that a job has to change for a layout, `key=value` each.

    There are none under `parallel.layout: auto`: the job chooses for itself.
    """
    if config.parallel.layout == "auto":
        return []
    asked = RankLayout.of(config)
    return [
        f"parallel.{name}={getattr(layout, name)}"
        for name in RankLayout.names()
        if getattr(layout, name) != getattr(asked, name)
    ]
