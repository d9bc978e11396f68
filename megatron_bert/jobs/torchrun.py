"""torchrun, ending with one line instead of a traceback if a signal or a rank ended it.

python -P -m megatron_bert.jobs.torchrun [OPTION ...] SCRIPT [ARGUMENT ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(arguments: Sequence[str] | None = None) -> None:
    """Start this node's ranks and wait for their end.

    After a signal this returns as if nothing had failed, whatever the ranks did: a failing exit
    code would make the scheduler end the ranks of other nodes, which may still be saving. The run's
    outcome is in its directory.

    Args:
        arguments: torchrun's; those of the process by default.

    Raises:
        SystemExit: a rank has failed; the exit code is 1, whatever the rank's was.
    """
    try:
        run.main(arguments)
    except ChildFailedError:
        # Its text is a traceback of this process and a table, in which the rank's own error is
        # lost.
        sys.stderr.write("torchrun: a rank of this node has failed; what it said stands above\n")
        sys.exit(1)
    except SignalException as stop:
        name = getattr(stop.sigval, "name", stop.sigval)
        sys.stderr.write(f"torchrun: told to stop by {name}; the ranks of this node have ended\n")


if __name__ == "__main__":
    main()
