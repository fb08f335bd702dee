"""Damaged training checkpoints: files cut, overwritten, of other objects, with values of other types.

    python -m tests.faults.checkpoints CHECKPOINT OUT

copies a checkpoint of one process once for each damage; none of them may end a resumed run in a traceback.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from src.utils.manifest import CHECKSUMS

STATES = ("rng_state.pth", "optimizer.pt", "scheduler.pt", "scaler.pt")
#: What may stand in place of anything.
OTHERS: dict[str, Any] = {"null": None, "list": [], "object": {}, "other keys": {"a": 1}, "number": 5, "text": "x"}
VALUES: dict[str, Any] = {"null": None, "text": "x", "list": [1], "object": {"a": 1}, "below 0": -1}


def _bytes_damages() -> dict[str, Callable[[bytes], bytes]]:
    noise = random.Random(0)
    return {
        "empty": lambda data: b"",
        "cut": lambda data: data[: len(data) // 2],
        "last byte": lambda data: data[:-1],
        "zeros": lambda data: bytes(len(data)),
        "noise": lambda data: noise.randbytes(len(data)),
        "zeros inside": lambda data: data[: len(data) // 3] + bytes(len(data) // 3) + data[2 * (len(data) // 3) :],
    }


def _overwrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def _save(path: Path, value: Any) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(value))
    else:
        torch.save(value, path)


def _set(path: Path, key: str, value: Any) -> None:
    """Give one key of a saved object another value."""
    found = json.loads(path.read_text()) if path.suffix == ".json" else torch.load(path, weights_only=False)
    _save(path, {**found, key: value})


def _cut_moments(path: Path) -> None:
    """The optimizer's state of a smaller model."""
    found = torch.load(path, weights_only=True)
    state = {
        n: {name: value[:1] if value.dim() else value for name, value in own.items()}
        for n, own in found["state"].items()
    }
    torch.save({**found, "state": state}, path)


def damages(source: Path) -> Iterator[tuple[str, str, Callable[[Path], None]]]:
    """File, name and damage, of every damage to the checkpoint `source`."""
    for name in (*STATES, "trainer_state.json", "args.json"):
        if not (source / name).is_file():
            continue
        for damage, change in _bytes_damages().items():
            yield name, damage, partial(_overwrite, change=change)
        for other, value in OTHERS.items():
            yield name, other, partial(_save, value=value)
    yield "optimizer.pt", "another model's", _cut_moments
    for name in ("trainer_state.json", "scheduler.pt", "optimizer.pt", "rng_state.pth"):
        path = source / name
        keys = json.loads(path.read_text()) if path.suffix == ".json" else torch.load(path, weights_only=False)
        for key in keys:
            for kind, value in VALUES.items():
                yield name, f"{key} {kind}", partial(_set, key=key, value=value)


def write_damaged(source: Path, folder: Path, name: str, damage: Callable[[Path], None]) -> Path:
    """A copy of the checkpoint `source` as `folder`, with one damaged file and no checksums that would tell of it."""
    shutil.copytree(source, folder)
    (folder / CHECKSUMS).unlink(missing_ok=True)
    damage(folder / name)
    return folder


def main() -> None:
    """Write all of them."""
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    for number, (name, damage, change) in enumerate(damages(source)):
        print(write_damaged(source, out / f"checkpoint-{number}", name, change), name, damage)


if __name__ == "__main__":
    main()
