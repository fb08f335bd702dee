"""The one exception that is meant for the user's eyes."""


class UserError(ValueError):
    """A mistake in arguments, data or environment that the user can mend.

    Its message is shown as it is, without a traceback, so it must name the value at fault, where it
    stands, what is accepted and what to do.
    """


def describe_os_error(error: OSError) -> str:
    """One line about an error of the operating system with a file."""
    return f"{error.filename}: {error.strerror}"
