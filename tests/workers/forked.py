"""Many short runs of an entry point, each in processes of its own that die their own death, at one import's cost.

Run as a script this is a server: it imports the heavy packages once and forks one process per rank for each run it
is asked for. A run is what ``python run_dense.py …`` or torchrun makes of it: a new process image of the same code,
with torchrun's environment variables. `Runs` is the client that tests use.

A run may be told to kill one of its processes with SIGKILL, at one of `KILL_POINTS` in a given step; or a `Strike`
comes from outside, whatever the run is doing then.
"""

from __future__ import annotations

import glob
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KILL_POINTS = ("training", "weights", "encoder", "optimizer", "state", "rename", "rotation")


@dataclass(frozen=True)
class Kill:
    """Where a process kills itself: at `point`, when the trainer is at `step`, on `rank`."""

    point: str
    step: int
    rank: int = 0


@dataclass(frozen=True)
class Strike:
    """A signal from outside.

    Attributes:
        after: seconds after the start, or
        when: a glob pattern; as soon as there is a file of it.
        rank: whom it hits; None for all.
        signal: which one.
    """

    after: float = 0.0
    when: str | None = None
    rank: int | None = None
    signal: int = signal.SIGKILL


class Runs:
    """Starts the server and asks it for runs."""

    def __init__(self, environment: dict[str, str], preload: Sequence[str] = ()) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__, *preload],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(
        self,
        script: str,
        arguments: Sequence[Any],
        processes: int = 1,
        kill: Kill | None = None,
        timeout: float = 120,
        strike: Strike | None = None,
        constants: Mapping[str, int] | None = None,
        grace: float = 1,
        rival: Sequence[Any] | None = None,
    ) -> tuple[list[int], str]:
        """Run to the end: exit code of each process (negative: the signal that killed it) and their joined output.

        Args:
            script, arguments: as on the command line.
            processes: how many.
            kill: where one kills itself.
            timeout: seconds until all are killed.
            strike: what hits from outside.
            constants: values for constants of modules, by ``module.NAME``: small ones make short runs go a long way.
            grace: seconds after the first failure until the others are killed, as torchrun does.
            rival: arguments of a run of the same script by itself, started 0.2 seconds later; its exit code comes last.
        """
        from tests.helpers import free_port

        request = {
            "argv": [script, *map(str, arguments)],
            "processes": processes,
            "port": free_port(),
            "kill": None if kill is None else vars(kill),
            "timeout": timeout,
            "strike": None if strike is None else vars(strike),
            "constants": dict(constants or {}),
            "grace": grace,
            "rival": None if rival is None else [script, *map(str, rival)],
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        return answer["codes"], answer["output"]

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(30)


def _arm(kill: Kill) -> None:
    """Wrap the trainer so that this process kills itself where `kill` says."""
    from src.retrieval.models import checkpoint_folders, text_encoder
    from src.retrieval.training import trainer

    step = -1

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def die_after(owner: Any, name: str, due: Callable[..., bool] = lambda *_: True, before: bool = False) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            hit = step == kill.step and due(*args)
            if hit and before:
                die()
            result = original(*args, **kwargs)
            if hit:
                die()
            return result

        setattr(owner, name, wrapped)

    save, train_step = trainer.RetrievalTrainer._save_checkpoint, trainer.RetrievalTrainer.training_step

    def saving(self: Any, *args: Any) -> None:
        nonlocal step
        step = self.state.global_step
        save(self, *args)
        step = -1

    def training(self: Any, *args: Any) -> Any:
        if kill.point == "training" and self.state.global_step == kill.step:
            die()
        return train_step(self, *args)

    def half_removed(folder: str, *args: Any, **kwargs: Any) -> None:
        """The worst order: everything but the file that marks a checkpoint as whole."""
        if not os.path.isdir(folder):
            return
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and path.name != trainer.TRAINER_STATE:
                path.unlink()
        die()

    trainer.RetrievalTrainer._save_checkpoint = saving  # type: ignore[method-assign]
    trainer.RetrievalTrainer.training_step = training  # type: ignore[method-assign]
    if kill.point == "weights":  # the encoder's folder exists, without a tokenizer or settings
        die_after(text_encoder, "write_embedder_file", before=True)
    elif kill.point == "encoder":
        die_after(trainer.RetrievalTrainer, "save_model")
    elif kill.point == "optimizer":
        die_after(trainer.RetrievalTrainer, "_save_optimizer_and_scheduler")
    elif kill.point == "state":  # of all files only this process's random state is missing
        die_after(trainer.RetrievalTrainer, "_save_rng_state", before=True)
    elif kill.point == "rename":
        die_after(trainer, "replace_folder", before=True)
    elif kill.point == "rotation":
        remove = checkpoint_folders.remove_checkpoint

        def removing(folder: str) -> None:
            checkpoint_folders.shutil.rmtree = half_removed  # type: ignore[assignment]
            remove(folder)

        checkpoint_folders.remove_checkpoint = removing


def _child(request: dict[str, Any], rank: int, log: Path) -> None:
    """One process of a run; never returns."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code: Any = 1
    try:
        if request["processes"] > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(request["processes"]),
                LOCAL_WORLD_SIZE=str(request["processes"]),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(request["port"]),
            )
        if request["kill"] is not None and request["kill"]["rank"] == rank:
            _arm(Kill(**request["kill"]))
        for name, value in request["constants"].items():
            module, _, constant = name.rpartition(".")
            setattr(importlib.import_module(module), constant, value)
        sys.argv = request["argv"]
        runpy.run_path(request["argv"][0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1 if code else 0)


def _serve(preload: Sequence[str]) -> None:
    import tempfile

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(ROOT))
    for name in ("src.retrieval.training.trainer", "src.retrieval.jobs.evaluate", "src.utils.cli", *preload):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            request = json.loads(line)
            log = Path(folder, "log")
            log.write_text("")
            running = {}
            for rank in range(request["processes"]):
                pid = os.fork()
                if pid == 0:
                    _child(request, rank, log)
                running[pid] = rank
            if request["rival"] is not None:
                time.sleep(0.2)
                pid = os.fork()
                if pid == 0:
                    _child({**request, "argv": request["rival"], "processes": 1, "kill": None}, 0, log)
                running[pid] = request["processes"]
            answer = {"codes": _wait(running, request), "output": log.read_text(errors="replace")}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def _strike(strike: dict[str, Any], started: float, running: dict[int, int]) -> bool:
    """Strike if it is time to; whether it was."""
    due = glob.glob(strike["when"]) if strike["when"] else time.monotonic() - started > strike["after"]
    if due:
        for pid, rank in running.items():
            if strike["rank"] in (None, rank):
                os.kill(pid, strike["signal"])
    return bool(due)


def _wait(running: dict[int, int], request: dict[str, Any]) -> list[int]:
    """Exit codes by rank; as torchrun does, one process's failure ends the others."""
    codes = [0] * len(running)
    started = time.monotonic()
    deadline = started + request["timeout"]
    strike = request["strike"]
    while running:
        if strike and _strike(strike, started, running):
            strike = None
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        if any(codes) or time.monotonic() > deadline:
            # Those that fail by themselves get a moment to say so.
            grace = time.monotonic() + request["grace"]
            while running and time.monotonic() < grace:
                for pid in list(running):
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
                time.sleep(0.02)
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            for pid in list(running):
                codes[running.pop(pid)] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.005 if strike else 0.02)
    return codes


if __name__ == "__main__":
    _serve(sys.argv[1:])
