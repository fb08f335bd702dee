"""Entry points: parse arguments, set up logging, show a user's error in one line, stop cleanly on signals."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any, NoReturn, get_type_hints

from src.utils import distributed
from src.utils.config_file import read_arguments
from src.utils.display import Line
from src.utils.errors import UserError, describe_os_error, first_line, is_out_of_memory, user_message
from src.utils.parser import flags_parser

logger = logging.getLogger(__name__)

#: Range of integer flags: 32 bits, signed or unsigned.
LEAST, MOST = -(1 << 31), (1 << 32) - 1
#: Of other numbers that of fp32.
LARGEST = float.fromhex("0x1.fffffep+127")
#: Endings of flags that take files and folders.
PATHS = ("dir", "path", "data", "file", "files", "root", "corpus", "encoder", "ranker")

#: Within this time a signal counts once: some launchers send it twice.
SAME_SIGNAL_SECONDS = 2


def parse_args(
    dataclass_types: Sequence[Any],
    argv: Sequence[str] | None = None,
    hidden: Collection[str] = (),
    **defaults: Any,
) -> tuple[tuple[Any, ...], frozenset[str]]:
    """Fill dataclasses, which share no field, from the command line and from the file that ``--config`` names.

    `argv` has no program name; None takes this process's. Help leaves out the `hidden` flags. `defaults` replace those
    of the classes. Returns an instance per class, and the names of the flags that the command line or the file set.
    """
    description = getattr(sys.modules["__main__"], "__doc__", None)
    parser = flags_parser(dataclass_types, hidden, usage="%(prog)s [--FLAG VALUE] ...", description=description)
    # The first action of a flag takes the value (--fp16, not --no_fp16).
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}
    if unknown := sorted(set(defaults) - set(actions)):
        raise TypeError(f"defaults for flags that do not exist: {', '.join(unknown)}")
    parser.set_defaults(**defaults)
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of flags; the command line overrides it.")

    def parse(words: Sequence[str] | None) -> dict[str, Any]:
        unset = object()
        seen, rest = parser.parse_known_args(words, argparse.Namespace(**dict.fromkeys([*actions, "config"], unset)))
        if rest:
            parser.refuse(rest)
        return {name: value for name, value in vars(seen).items() if value is not unset}

    given = parse(argv)
    if path := given.pop("config", None):
        hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
        words, values = read_arguments(path, actions, hints)
        try:
            given = {**values, **parse(words), **given}
        except UserError as error:
            raise UserError(f"--config {path}: {error}") from error
    for name in sorted(given):
        _check_value(name, given[name])
    try:
        return tuple(_made(kind, {**defaults, **given}) for kind in dataclass_types), frozenset(given)
    except ValueError as error:
        # A check of ours, or of transformers.
        raise UserError(str(error)) from error


def _made(kind: Any, values: Mapping[str, Any]) -> Any:
    """An instance of a dataclass with those of the values that are its own."""
    return kind(**{each.name: values[each.name] for each in fields(kind) if each.init and each.name in values})


def answer_early(dataclass_types: Sequence[Any], hidden: Collection[str] = (), **defaults: Any) -> None:
    """Show ``--help``, or what is wrong with the flags, and exit; return where neither is the case.

    For a command to call before it imports libraries that take seconds. See `parse_args`; the classes may be stand-ins
    with the same flags for those that need such libraries.
    """
    if _config_is_read_once(sys.argv[1:]):
        return
    try:
        parse_args(dataclass_types, hidden=hidden, **defaults)
    except UserError as error:
        problem = error

        def say() -> None:
            raise problem

        run(say)


def _config_is_read_once(words: Sequence[str]) -> bool:
    """Whether ``--config`` names a pipe, such as that of ``<(command)``."""
    named = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    named += [following for word, following in pairwise(words) if word == "--config"]
    return any(os.path.exists(name) and stat.S_ISFIFO(os.stat(name).st_mode) for name in named)


def _check_value(name: str, value: Any) -> None:
    """Refuse blank paths, and numbers that libraries do not take."""
    least = 0 if name.endswith("seed") else LEAST
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, str) and one.isspace() and name.endswith(PATHS):
            raise UserError(f"--{name} {one!r} is blank: name a file or folder, or leave the flag out")
        if isinstance(one, float) and not abs(one) <= LARGEST:
            raise UserError(f"--{name} must be a number of {LARGEST:.1e} at most, found {one}")
        if isinstance(one, int) and not least <= one <= MOST:
            shown = f"{one}" if abs(one) < 10**30 else f"one of {len(str(abs(one)))} digits"
            raise UserError(f"--{name} must be a whole number from {least} to {MOST}, found {shown}")


def show_plan(lines: Sequence[Line]) -> None:
    """Print the lines of a ``--dry_run`` on the main process; a repeated label is shown once."""
    if not distributed.is_main():
        return
    width = max(len(label) for label, _ in lines)
    print("dry run: everything up to the first step was checked, nothing was written")
    previous = ""
    for label, text in lines:
        print(f"  {'' if label == previous else label:<{width}}  {text}", flush=True)
        previous = label


def setup_logging() -> None:
    """Log to stderr: the main process's lines, warnings of libraries, errors of transformers."""
    level = logging.INFO if distributed.launched_rank() == 0 else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for name in ("src", "evaluation", "scripts", "run_dense", "run_ranker", "run_lm_score", "__main__"):
        logging.getLogger(name).setLevel(level)
    # What it finds is told where it matters: in the line that says where a run computes, and by src.doctor.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator" not in record.getMessage())
    # Its warnings are internal; missing weights are an error of ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if (transformers := sys.modules.get("transformers")) is not None:
        # Which has read these already.
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()


def _leave(code: int) -> NoReturn:
    """Exit without finalizing the interpreter, which a thread of torch.distributed may abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _explain(error: Exception, memory_advice: str) -> tuple[str, int] | None:
    """Return a message and an exit code; None for an unexpected error, which keeps its traceback."""
    if isinstance(error, UserError):
        return user_message(error), 2
    if is_out_of_memory(error):
        return f"out of memory ({first_line(error)}): {memory_advice}", 2
    if lost := distributed.describe_lost_process(error):
        return lost, 1
    described = describe_os_error(error)
    return (described, 2) if described else None


@contextlib.contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt for SIGINT and SIGTERM within the block; yield the list of signals received.

    A second signal exits at once. Ignored signals (nohup, a background job) stay ignored.
    """
    received: list[int] = []
    owner, since = os.getpid(), 0.0

    def stop(number: int, frame: object) -> None:
        nonlocal since
        if os.getpid() != owner:
            # A forked process has the default handling.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not received:
            since = time.monotonic()
            received.append(number)
            raise KeyboardInterrupt
        if time.monotonic() - since > SAME_SIGNAL_SECONDS:
            os._exit(128 + number)

    handled = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in handled}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(message: str) -> None:
    """Show an error on a new line, below any progress bar."""
    loaded = [sys.modules[name] for name in ("tqdm.std", "tqdm.auto") if name in sys.modules]
    for kind in {module.tqdm for module in loaded}:
        for bar in list(getattr(kind, "_instances", ())):
            bar.close()
    # The main process may have an open bar.
    start = "\n" if distributed.launched_rank() > 0 else ""
    sys.stderr.write(f"{start}error: {message}\n")
    sys.stderr.flush()


def run(main: Callable[[], None], memory_advice: str = "free some, or use a machine that has more") -> NoReturn:
    """Run an entry point and exit: 0 when done, 2 after an error that the user can fix, shown as one message.

    SIGINT (Ctrl-C) and SIGTERM exit with 130 and 143. `memory_advice` says what helps when memory runs out.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    setup_logging()
    # Of an unexpected exception.
    code = 1
    if distributed.launched_processes() > 1:
        # Registered first, called last.
        atexit.register(lambda: _leave(code))
    with _stoppable() as received:
        try:
            try:
                main()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
                raise
            except BrokenPipeError:
                # The reader (head) has closed the pipe; what Python has buffered is dropped.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                code = 128 + signal.SIGPIPE
            except Exception as error:
                if received:
                    # A consequence of the signal, here or in another process.
                    raise KeyboardInterrupt from error
                if (explained := _explain(error, memory_advice)) is None:
                    raise
                message, code = explained
                if distributed.is_first_to_say(message):
                    _say(message)
            finally:
                if not received:
                    distributed.destroy_process_group()
        except KeyboardInterrupt:
            number = signal.Signals(received[0] if received else signal.SIGINT)
            code = 128 + number
            for child in multiprocessing.active_children():
                child.kill()
            if distributed.is_first_to_stop():
                _say(f"stopped by {number.name}")
    sys.exit(code)
