"""How a job's ranks are divided among the kinds of parallelism."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from megatron_bert.config.schema import Config, ParallelConfig


@dataclass(frozen=True)
class RankLayout:
    """How many ranks each kind of parallelism takes; data parallelism gets the remaining factor.

    Attributes:
        tensor: `parallel.tensor`.
        pipeline: `parallel.pipeline`.
        replicate: `parallel.replicate`.
    """

    tensor: int
    pipeline: int
    replicate: int

    @property
    def fewest_ranks(self) -> int:
        """Ranks of the smallest job that this layout fits."""
        return self.tensor * self.pipeline * self.replicate

    @classmethod
    def of(cls, config: Config) -> RankLayout:
        """The layout that a configuration asks for."""
        return cls(**{name: getattr(config.parallel, name) for name in cls.names()})

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The kinds of parallelism, by their keys in `parallel`."""
        return tuple(field.name for field in fields(cls))

    def put_into(self, config: Config) -> Config:
        """Return the configuration with this layout in place of its own."""
        return config.with_keys({f"parallel.{name}": size for name, size in asdict(self).items()})


def without_layout(config: Config) -> Config:
    """The configuration with its layout replaced by that of a single rank."""
    parallel = config.parallel
    return config.with_keys(
        {
            "parallel": ParallelConfig(layout=parallel.layout, network=parallel.network),
            "recompute": "none",
            "batch.micro_size": None,
        }
    )


def without_chosen_layout(config: Config) -> Config:
    """As `without_layout` if `parallel.layout` is `auto`, which ignores the keys, else as it is."""
    return config if config.parallel.layout == "manual" else without_layout(config)
