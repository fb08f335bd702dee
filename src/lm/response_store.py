"""Responses of a language model on the disk while a long job runs: what a killed run has asked is not asked again.

A folder holds a manifest, which says what the responses depend on, and parts: files of JSON lines to which every batch
is appended. Processes, also on several hosts with a common folder, claim parts by creating files that must not exist.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from src.utils import distributed
from src.utils.files import remove_folder
from src.utils.manifest import Manifest, content_checksum, read_manifest

#: Another number for responses that are made, or laid out, in another way.
FORMAT = 4


@dataclass(frozen=True)
class Response:
    """Generated `texts`, or mean `log_likelihoods` per token of options or windows and how many `tokens` each has."""

    texts: tuple[str, ...] = ()
    log_likelihoods: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()

    @property
    def choice(self) -> int:
        """The option whose tokens are likeliest on average, the first of equals."""
        return max(range(len(self.log_likelihoods)), key=self.log_likelihoods.__getitem__)


def to_response(value: Mapping[str, Any] | None) -> Response | None:
    """Restore a response (None: none) from JSON; raises KeyError, TypeError or ValueError when it is damaged."""
    if value is None:
        return None
    response = Response(tuple(value["texts"]), tuple(value["log_likelihoods"]), tuple(value["tokens"]))
    kinds = ((response.texts, str), (response.log_likelihoods, float), (response.tokens, int))
    if not all(type(each) is kind for values, kind in kinds for each in values):
        raise ValueError("a value is of another type")
    return response


class ResponseStore:
    """Responses by key, in numbered parts below a folder of this run alone; None for what cannot be asked."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.manifest = self.folder / "manifest.json"
        self._identity: dict[str, Any] = {}

    def open(self, identity: Mapping[str, Any]) -> None:
        """Begin, or go on where a run with the same `identity` stopped; a UserError where it had another one.

        All processes together, before any claims.
        """
        self._identity = {"format": FORMAT, **identity}
        with distributed.raising_together():
            stale = [*self.folder.glob("*.claim")]
            if self.manifest.exists():
                self.check(identity)
            else:
                # Without a manifest nobody knows what responses depend on.
                stale += self.folder.glob("*.jsonl")
            for path in stale:
                path.unlink(missing_ok=True)

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raise a UserError if the responses depend on something else, or on nobody knows what."""
        remedy = f"remove {self.folder}, or choose another --save_name"
        read_manifest(self.manifest, "scores of another run", remedy, {"format": FORMAT, **identity})

    def claim(self, part: int) -> bool:
        """Whether the part is now this process's."""
        self._begin()
        try:
            os.close(os.open(self.folder / f"{part:07}.claim", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def read(self, part: int | None = None) -> dict[str, Response | None]:
        """Responses of a part, or of all."""
        responses: dict[str, Response | None] = {}
        for path in sorted(self.folder.glob("*.jsonl")) if part is None else [self._path(part)]:
            if path.is_file():
                for line in path.read_bytes().split(b"\n"):
                    # What is damaged, or half-written by a killed process, is asked again.
                    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                        row = json.loads(line)
                        if row["checksum"] == content_checksum(row["responses"]):
                            responses.update({key: to_response(value) for key, value in row["responses"].items()})
        return responses

    def add(self, part: int, responses: Mapping[str, Response | None]) -> None:
        """Append responses, which are kept also if this process is killed at once."""
        content = {key: asdict(each) if each is not None else None for key, each in responses.items()}
        line = json.dumps({"responses": content, "checksum": content_checksum(content)})
        self._begin()
        with open(self._path(part), "ab") as file:
            # Whatever a killed process left of a line ends here.
            file.write(f"\n{line}".encode())

    def remove(self) -> None:
        """Delete everything."""
        if self.folder.exists():
            remove_folder(self.folder)

    def _begin(self) -> None:
        """Write the manifest, before anything else and not before there is something to keep."""
        if not self.manifest.exists():
            Manifest(self._identity).write(self.manifest)

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:07}.jsonl"
