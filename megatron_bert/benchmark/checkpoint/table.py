"""The figures of saving and loading as a table to read."""

from __future__ import annotations

from megatron_bert.benchmark.checkpoint.measure import CheckpointFigures, SaveFigures
from megatron_bert.benchmark.table import table_lines


def checkpoint_table(figures: CheckpointFigures) -> list[str]:
    """Lines of the table."""
    state = figures.state
    return table_lines(
        figures.hardware,
        figures.versions,
        figures.quick,
        (
            "state",
            f"{state.parameters / 1e6:,.1f} M parameters and their moments: "
            f"{state.bytes / 1e9:,.2f} GB in {state.files} files",
        ),
        ("save, training waits", _save(state.synchronous)),
        ("save in the background", _save(state.asynchronous)),
        (
            "find, verify and load",
            f"{state.load_seconds:.2f} s (median {state.median_load_seconds:.2f} s)",
        ),
    )


def _save(save: SaveFigures) -> str:
    return (
        f"{save.save_seconds:.2f} s (median {save.median_save_seconds:.2f} s), training stands "
        f"still for {save.blocked_seconds:.2f} s (median {save.median_blocked_seconds:.2f} s; "
        f"the first time {save.first_blocked_seconds:.2f} s)"
    )
