"""Metrics, arguments and command, appended to a readable log and as one JSON object to the file beside it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from src.utils.display import metric_text
from src.utils.errors import UserError


def versions() -> dict[str, str]:
    """Versions that numbers depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")}


def lines_path(log_path: str) -> Path:
    """The JSON lines file of a log: ``.jsonl`` in place of ``.log``, or after any other extension."""
    path = Path(log_path)
    return path if path.suffix == ".jsonl" else path.with_name(f"{path.name.removesuffix('.log')}.jsonl")


def check_log(log_path: str) -> None:
    """Raise a UserError if `log_path` is empty, a folder, or a file that is no log of metrics, such as data."""
    if not log_path:
        raise UserError("--log_path is empty: name a file or a folder")
    # A log in .jsonl has one file.
    for path, start in {Path(log_path): b"20", lines_path(log_path): b'{"time"'}.items():
        if path.is_dir():
            raise UserError(f"--log_path: {path} is a folder, a file is needed")
        if path.suffix != ".log" and path.is_file() and path.stat().st_size:
            with open(path, "rb") as file:
                if not file.read(len(start)) == start:
                    raise UserError(f"--log_path: {path} is there, and no log of metrics: name another file")


def log_result(log_path: str, metrics: Mapping[str, float], arguments: Mapping[str, Any], **facts: Any) -> None:
    """Append a block to `log_path` (unless it ends in ``.jsonl``), and a line to the JSON lines file beside it.

    Only the line has the `facts`, such as the task's name, and versions. What JSON cannot hold is written as text.
    """
    path, lines = Path(log_path), lines_path(log_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    time = datetime.now().astimezone().isoformat(timespec="seconds")
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    as_json = partial(json.dumps, ensure_ascii=False, default=str)
    if lines != path:
        values = "".join(f"  {name:<16} {metric_text(value)}\n" for name, value in metrics.items())
        _append(path, f"{time}\ncommand: {command}\narguments: {as_json(dict(arguments))}\n{values}\n")
    record = {"time": time, "command": command, "metrics": dict(metrics), "arguments": dict(arguments), **facts}
    _append(lines, as_json({**record, "versions": versions()}) + "\n")


def _append(path: Path, text: str) -> None:
    """Append in a single write, so that runs do not mix; any error names the file."""
    try:
        with open(path, "ab+", buffering=0) as file:
            # A killed run may have left half a line.
            torn = file.tell() and file.seek(-1, os.SEEK_END) is not None and file.read(1) != b"\n"
            file.write(("\n" * bool(torn) + text).encode(errors="replace"))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
