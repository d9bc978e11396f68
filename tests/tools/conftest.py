from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_bert.command_line.arguments import as_options


@pytest.fixture(autouse=True)
def spoken_to_as_a_command_line() -> Iterator[None]:
    """A tool's `main` is called without the `run_cli` that is around it."""
    with as_options():
        yield
