"""The argument parser of all programs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from megatron_bert.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors as everything else does, through `run_cli`.

    By default argparse would write `usage: ... PROGRAM: error: ...`, so that no line begins with
    `error:`. Options cannot be abbreviated: the meaning of an abbreviation would change whenever an
    option is added, and `--overwrit` would replace a dataset.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Show the usage and refuse the arguments.

        Raises:
            ConfigError: always.
        """
        self.print_usage(sys.stderr)
        raise ConfigError(f"{message}; see {self.prog} --help")

    def check_purposes(
        self, given: argparse.Namespace, purposes: Iterable[tuple[str, bool, str]]
    ) -> None:
        """Refuse what was given and would have no effect.

        What was given with its default value is taken for not given.

        Args:
            given: what this parser made of the command line.
            purposes: options (`--steps`) and other arguments (`overrides`) without a use in every
                call, each with whether it has one in this call, and what would give it one.

        Raises:
            ConfigError: there is such an argument.
        """
        for name, has_effect, remedy in purposes:
            key = name.removeprefix("--").replace("-", "_")
            value = getattr(given, key)
            default = self.get_default(key)
            # Of a switch that is not given, an option, and a list that may be empty.
            absent = value is False or value is None or value == []
            if has_effect or absent or (default is not None and value == default):
                continue
            words = [name] if name.startswith("--") else []
            if value is not True:
                words += map(str, value if isinstance(value, list) else [value])
            option = " ".join(words)
            raise ConfigError(f"{option}: would have no effect; {remedy}, or leave it out")
