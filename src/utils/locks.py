"""One run at a time writes an output: a hidden lock file beside it names that run.

The system releases a lock when its process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from src.utils import distributed
from src.utils.errors import UserError
from src.utils.files import remove_leftovers

logger = logging.getLogger(__name__)

#: Seconds to wait, since `check_free` of another run holds the lock for a moment.
PATIENCE = 0.5
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def hold(*outputs: str, folders: Sequence[str] = ()) -> Iterator[None]:
    """Lock outputs against other runs until the block ends; the main process does, for all.

    `outputs` are files, or folders that are written under another name and renamed; files are written within `folders`.
    What this process has locked it may lock again. Raises a UserError on every process if another run holds one.
    """
    files = {lock_file(os.path.realpath(output)): output for output in outputs}
    files |= {os.path.join(os.path.realpath(folder), ".lock"): folder for folder in folders}
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            # In the same order in every run.
            for file, output in sorted(files.items()):
                stack.enter_context(_held(file, output))

        distributed.on_main(enter)
        yield


def lock_file(output: str) -> str:
    """The lock file of an output."""
    folder, name = os.path.split(output)
    return os.path.join(folder, f".{name}.lock")


def check_free(output: str) -> None:
    """Raise a UserError if another run is writing `output`."""
    file = lock_file(os.path.realpath(output))
    # A reader may lack the right to lock; checksums are compared besides.
    if os.access(file, os.W_OK):
        with _held(file, output):
            pass


@contextlib.contextmanager
def _held(file: str, output: str) -> Iterator[None]:
    """Hold one lock, and remove what a killed run left of the output; afterwards the lock file and an empty folder."""
    lock = FileLock(file, PATIENCE, thread_local=False, is_singleton=True, fallback_to_soft=False, on_acquired=_sign)
    if lock.is_locked:
        yield
        return
    folder = Path(file).parent
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"another run ({_signature(file)}) writes {output}: wait for it, stop it, or choose another name or folder"
        ) from error
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise OSError(error.errno, error.strerror, output) from error
        logger.warning("%s lies on a file system without locks: do not start the same run twice", output)
    try:
        remove_leftovers(output)
        yield
    finally:
        with contextlib.suppress(OSError):
            # Before the release: a run that waits for it then creates a new one.
            os.unlink(file)
        lock.release()
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _sign(descriptor: int) -> None:
    """Write the holder into a lock file; on a full disk it stays empty."""
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())


def _signature(file: str) -> str:
    with contextlib.suppress(OSError), open(file, encoding="utf-8", errors="replace") as signed:
        return " ".join(signed.read(300).split()) or "just started"
    return "just ended"
