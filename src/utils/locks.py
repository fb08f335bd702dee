"""One run at a time writes an output: a hidden lock file beside it names the run that does.

The system lets go of a lock when its process ends, however it ends, so what a killed run leaves keeps nobody out.
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

#: Seconds to wait for a run that only looks whether another one writes.
PATIENCE = 0.5
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def hold(*outputs: str, folders: Sequence[str] = ()) -> Iterator[None]:
    """Keep other runs from writing the same until the block ends; the main process does, for all.

    What this process holds already it may hold again. If another run writes one, every process raises a UserError.

    Args:
        outputs: files, or folders that are written elsewhere and renamed.
        folders: that stay where they are while files are written to them.
    """
    files = {lock_file(os.path.realpath(output)): output for output in outputs}
    files |= {os.path.join(os.path.realpath(folder), ".lock"): folder for folder in folders}
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            # In an order that is the same for every run.
            for file, output in sorted(files.items()):
                stack.enter_context(_held(file, output))

        distributed.on_main(enter)
        yield


def lock_file(output: str) -> str:
    """The lock file of an output."""
    folder, name = os.path.split(output)
    return os.path.join(folder, f".{name}.lock")


def check_free(output: str) -> None:
    """Raise a UserError if another run writes what this one is about to read."""
    file = lock_file(os.path.realpath(output))
    # Who may read may not be allowed to lock: what is read is compared with its checksum besides.
    if os.access(file, os.W_OK):
        with _held(file, output):
            pass


@contextlib.contextmanager
def _held(file: str, output: str) -> Iterator[None]:
    """Hold one lock, and remove what a killed run left of the output.

    The lock's file goes when it is let go of, as does a folder that was made for it and stayed empty.
    """
    lock = FileLock(file, PATIENCE, thread_local=False, is_singleton=True, fallback_to_soft=False, on_acquired=_sign)
    if lock.is_locked:
        yield
        return
    folder = Path(file).parent
    made = not folder.exists()
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
            # Before it is let go of: whoever waits for it sees that it is gone, and makes a new one.
            os.unlink(file)
        lock.release()
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _sign(descriptor: int) -> None:
    """Write into a lock file who holds it."""
    # On a full disk it is held all the same.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())


def _signature(file: str) -> str:
    """Who holds a lock."""
    with contextlib.suppress(OSError), open(file, encoding="utf-8", errors="replace") as signed:
        return " ".join(signed.read(300).split()) or "just started"
    return "just ended"
