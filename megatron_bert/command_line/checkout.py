"""Warns if a checkout's script runs another checkout's code, installed as editable."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def warn_of_other_code() -> None:
    """Warn, once, if the running package is not the one beside the process's script.

    There is no warning for a script without a package beside it, such as an installed one.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)
    # Only one rank of a job warns.
    if script is None or os.environ.get("RANK", "0") != "0":
        return
    for root in Path(script).resolve().parents[:2]:
        beside = root / _PACKAGE.name
        if (beside / "__init__.py").is_file() and beside != _PACKAGE:
            sys.stderr.write(
                f"warning: {script} runs the code of {_PACKAGE}, not that of {beside}; to run "
                f"this, pip install -e {root}, or make an environment of its own\n"
            )
