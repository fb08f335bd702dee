"""Two processes through `src.utils.cli.run`, of which the second fails as it is told while the first waits for it."""

from __future__ import annotations

import errno
import os
import signal
import sys

from src.utils import distributed
from src.utils.cli import run
from src.utils.errors import UserError

ERRORS = {
    "user": UserError("row 7 of this share is damaged"),
    "file": OSError(errno.ENOENT, "No such file or directory", "/somewhere/shard"),
    "disk": OSError(errno.ENOSPC, "No space left on device"),
    "memory": MemoryError("Unable to allocate 9 GiB"),
    "unexpected": ZeroDivisionError("division by zero"),
}


def main() -> None:
    """Fail on the rank that the command line names, or on both."""
    distributed.init_process_group(use_cpu=True)
    # All are there before one fails.
    distributed.barrier()
    kind, rank = sys.argv[1:]
    if kind == "killed" and rank == str(distributed.rank()):
        os.kill(os.getpid(), signal.SIGKILL)
    if rank in ("all", str(distributed.rank())):
        raise ERRORS[kind]
    distributed.barrier()


if __name__ == "__main__":
    run(main, "lower --batch_size")
