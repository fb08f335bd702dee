"""The one exception that is meant for the user's eyes, and descriptions of others."""

from __future__ import annotations

import errno


class UserError(ValueError):
    """A mistake in arguments, data or environment that the user can fix.

    Its message is shown without a traceback: it names the value, its place, the choices and the fix.
    """


def user_message(error: UserError) -> str:
    """The message, without the traceback that a DataLoader prepends to a worker's error."""
    return str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2].strip()


#: A full disk or quota, or a limit of file size: errors without a file name.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def describe_os_error(error: Exception) -> str | None:
    """One line about a file error of the operating system; None for others, such as of a connection."""
    if not isinstance(error, OSError):
        return None
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"a file cannot be written: {error.strerror}" if error.errno in NO_ROOM else None


#: Messages of torch and others, which raise RuntimeError.
_NO_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a GPU or the machine has no memory left."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
