"""Whose code a script of a checkout runs: an environment's editable install is another one's."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def warn_of_other_code() -> None:
    """Warn, once, where the package that runs is not the one beside the process's script.

    A script with none beside it, as an installed package's may be, says nothing.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)
    # One rank of a job speaks for all.
    if script is None or os.environ.get("RANK", "0") != "0":
        return
    for root in Path(script).resolve().parents[:2]:
        beside = root / _PACKAGE.name
        if (beside / "__init__.py").is_file() and beside != _PACKAGE:
            sys.stderr.write(
                f"warning: {script} runs the code of {_PACKAGE}, not that of {beside}; to run "
                f"this, pip install -e {root}, or make an environment of its own\n"
            )
