"""Scores on the disk while a long job runs: what a killed run has scored is not scored again.

A folder holds a manifest, which says what the scores are of, and one file of JSON lines per unit of rows, to which
every batch is added as it is done. A unit is claimed by making a file that must not exist yet, so that processes,
also on several hosts with a common folder, share out the units among themselves as they go.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.utils.files import remove_folder
from src.utils.manifest import Manifest, content_checksum, read_manifest

MANIFEST = "manifest.json"
#: Value of a number that was looked at and cannot be scored; NaN is one not looked at yet.
UNFIT = np.inf


class Journal:
    """Scores of numbered things in units.

    Args:
        folder: where it lies; no other run may write there.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def exists(self) -> bool:
        """Whether an earlier run left anything."""
        return (self.folder / MANIFEST).exists()

    def open(self, identity: Mapping[str, Any]) -> None:
        """Begin, or go on where a run with the same `identity` stopped; by one process, before any other claims.

        Raises:
            UserError: what is there is of something else.
        """
        if self.exists():
            self.check(identity)
        else:
            # Without a manifest nobody knows what scores are of.
            for path in self.folder.glob("*.jsonl"):
                path.unlink()
            Manifest(identity).write(self.folder / MANIFEST)
        for claim in self.folder.glob("*.claim"):
            claim.unlink()

    def check(self, identity: Mapping[str, Any]) -> None:
        """Find out whether the scores are of `identity`.

        Raises:
            UserError: they are not, or nobody can tell.
        """
        path, what = str(self.folder / MANIFEST), "scores of another run"
        remedy = f"remove {self.folder}, or choose another --save_name"
        read_manifest(path, what, remedy, identity)

    def claim(self, unit: int) -> bool:
        """Whether the unit is now this process's."""
        try:
            os.close(os.open(self.folder / f"{unit:07}.claim", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def read(self, unit: int, size: int) -> np.ndarray:
        """fp64 ``(size,)`` scores of a unit: NaN where there is none yet, `UNFIT` where there can be none."""
        scores = np.full(size, np.nan)
        for numbers, values in self._lines(unit):
            scores[numbers] = [UNFIT if value is None else value for value in values]
        return scores

    def add(self, unit: int, numbers: Sequence[int], values: Sequence[float | None]) -> None:
        """Append scores, None for what cannot be scored."""
        content = [list(numbers), list(values)]
        with open(self._path(unit), "ab") as file:
            file.write(json.dumps([*content, content_checksum(content)]).encode() + b"\n")

    def repair(self, unit: int) -> None:
        """Cut off a line that a killed process left half-written."""
        path = self._path(unit)
        if path.exists():
            with open(path, "r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)

    def remove(self) -> None:
        """Delete everything."""
        remove_folder(self.folder)

    def _path(self, unit: int) -> Path:
        return self.folder / f"{unit:07}.jsonl"

    def _lines(self, unit: int) -> Iterator[tuple[list[int], list[float | None]]]:
        path = self._path(unit)
        if not path.exists():
            return
        with open(path, "rb") as file:
            for line in file:
                # What is damaged is scored again.
                with contextlib.suppress(ValueError, TypeError, RecursionError):
                    numbers, values, own = json.loads(line)
                    if own == content_checksum([numbers, values]):
                        yield numbers, values
