"""Pretrain a BERT-type encoder: torchrun pretrain_bert.py --config FILE [key.path=value ...]."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from megatron_bert.command_line.run import run_cli

# Loading torch takes seconds, on a slow file system minutes: `run.max_minutes` counts them.
_BEGAN = time.monotonic()

# OpenMP's threads wait for each other after every loop. GNU's spin for milliseconds before they
# sleep: once anything else takes a core, they spin while the thread they wait for does not run, and
# steps take several times as long. A thousand spins (microseconds) are as fast on an idle machine.
# The variables are read once, when torch loads the library; if the user set either, that setting is
# kept.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, or look at what would be trained; see `megatron_bert.training.main`."""
    # Imported here, so that a Ctrl-C while modules are loaded ends in one line too.
    from megatron_bert.training.main import main as train

    return train(arguments, began=_BEGAN)


if __name__ == "__main__":
    run_cli(main)
