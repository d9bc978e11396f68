"""torchrun, which leaves by one line where a signal asked for it, not by a traceback.

python -P -m megatron_bert.jobs.torchrun [OPTION ...] SCRIPT [ARGUMENT ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException


def main(arguments: Sequence[str] | None = None) -> None:
    """Start this node's ranks and wait for their end.

    After a signal this returns as if nothing had failed, whatever the ranks did: an exit code that
    tells of a failure would have the scheduler end those of other nodes, which may still be
    saving. What became of the run stands in its directory.

    Args:
        arguments: torchrun's; those of the process by default.

    Raises:
        ChildFailedError: a rank has failed.
    """
    try:
        run.main(arguments)
    except SignalException as stop:
        name = getattr(stop.sigval, "name", stop.sigval)
        sys.stderr.write(f"torchrun: told to stop by {name}; the ranks of this node have ended\n")


if __name__ == "__main__":
    main()
