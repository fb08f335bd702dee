"""What several test files need: running entry points as a user does, and writing small files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Real rows of the six tasks, beside the checkout where the project is developed.
TOY_ROWS = ROOT.parent / "shared" / "data" / "toy"
TASKS = ("qa", "convsearch", "chat", "lrlm", "icl", "tool")


def environment(**extra: str) -> dict[str, str]:
    """Environment of a child process: offline, one thread, importing from the checkout."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        **extra,
    }


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launch(script: Sequence[str | Path], processes: int = 1) -> list[str]:
    """Command line that runs a script (or ``-m module``) with that many processes."""
    head = [sys.executable]
    if processes > 1:
        head += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(free_port())]
    return head + [str(part) for part in script]


def run(
    script: Sequence[str | Path], processes: int = 1, timeout: float = 300, cwd: Path = ROOT, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run to the end and return exit code and output."""
    return subprocess.run(
        launch(script, processes),
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def evaluation_class(module: Any) -> Any:
    """The evaluation that a module defines."""
    kinds = [each for each in vars(module).values() if getattr(each, "__module__", "") == module.__name__]
    return next(each for each in kinds if hasattr(each, "request"))
