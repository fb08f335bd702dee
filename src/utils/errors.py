"""The one exception that is meant for the user's eyes, and what can be told of others."""

from __future__ import annotations

import errno


class UserError(ValueError):
    """A mistake in arguments, data or environment that the user can mend.

    Its message is shown as it is, without a traceback, so it must name the value at fault, where it
    stands, what is accepted and what to do.
    """


def user_message(error: UserError) -> str:
    """The message alone, without the traceback that a DataLoader puts before one of its worker processes."""
    return str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2].strip()


#: A full disk or quota, a limit of file size: writing a file fails so, without telling which.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def describe_os_error(error: OSError) -> str | None:
    """One line about an error of the operating system with a file; None when it is about none (a connection, say)."""
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"a file cannot be written: {error.strerror}" if error.errno in NO_ROOM else None


#: How torch and others word it, where they raise no error of that kind.
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
