"""Training and retrieval for the retrievers that language models lean on."""

import sys
from types import TracebackType


def _say_stopped(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Tell in one line of a Ctrl-C that nothing has caught; Python itself exits with 130 then."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("error: stopped by SIGINT\n")
    else:
        sys.__excepthook__(kind, error, trace)


# Here, as commands load libraries for some seconds before `cli.run` can look after signals.
if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _say_stopped
