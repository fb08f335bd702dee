"""Responses of a language model on the disk while a long job runs: what a killed run was told is not asked again.

A folder holds a file of JSON lines for each process. A response is known by the hash of all that it depends on, so that
what other settings left there does no harm.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from src.utils import distributed
from src.utils.files import remove_folder
from src.utils.manifest import content_checksum


@dataclass(frozen=True)
class Response:
    """What came back.

    Attributes:
        texts: generated answers.
        log_likelihoods: of the options or windows, mean per token.
        tokens: how many tokens each option or window has.
    """

    texts: tuple[str, ...] = ()
    log_likelihoods: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()

    @property
    def choice(self) -> int:
        """The option whose tokens are likeliest on average, the first of equals."""
        return max(range(len(self.log_likelihoods)), key=self.log_likelihoods.__getitem__)


def to_response(value: dict[str, Any]) -> Response:
    """What `asdict` and JSON made of a response.

    Raises:
        KeyError, TypeError, ValueError: it is damaged.
    """
    response = Response(tuple(value["texts"]), tuple(value["log_likelihoods"]), tuple(value["tokens"]))
    kinds = ((response.texts, str), (response.log_likelihoods, float), (response.tokens, int))
    if not all(type(each) is kind for values, kind in kinds for each in values):
        raise ValueError("a value is of another type")
    return response


class ResponseMemory:
    """Responses by the hash of what was asked; within a ``with`` block, which all processes enter together.

    Args:
        folder: where responses are kept; no other run may write there.
        further: files of outputs whose responses are known too.
    """

    def __init__(self, folder: str, further: Iterable[str] = ()) -> None:
        self.folder = Path(folder)
        self.further = tuple(further)
        self._known: dict[str, Response] = {}
        self._file: IO[str] | None = None

    def __enter__(self) -> ResponseMemory:
        """Read what is kept."""
        self._known = read_responses([*sorted(map(str, self.folder.glob("*.jsonl"))), *self.further])
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def finish(self) -> None:
        """Delete what is kept, when every process has what it needs of it; all call this together."""
        if self._file is not None:
            self._file.close()
        distributed.barrier()
        if distributed.is_main() and self.folder.exists():
            remove_folder(self.folder)

    def get(self, key: str) -> Response | None:
        """The response, if it is known."""
        return self._known.get(key)

    def keep(self, key: str, response: Response) -> None:
        """Remember a response, also if this process is killed at once."""
        self._known[key] = response
        if self._file is None:
            # Of a host that does not share it the folder is this process's alone.
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{distributed.rank()}.jsonl"
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (until the block ends)
            # What a killed run left of a line is ended first; it is no JSON, and passed over when read.
            self._file.write("\n")
        row = {"prompt_hash": key, "response": asdict(response)}
        self._file.write(json.dumps({**row, "checksum": content_checksum(row)}) + "\n")
        self._file.flush()


def read_responses(paths: Iterable[str]) -> dict[str, Response]:
    """All responses that files of outputs and kept responses hold, by the hash of what was asked."""
    known: dict[str, Response] = {}
    for path in paths:
        if not os.path.isfile(path):
            continue
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                    # Only what is kept meanwhile has one.
                    own = row.pop("checksum", None)
                    if row["response"] is not None and own in (None, content_checksum(row)):
                        known[row["prompt_hash"]] = to_response(row["response"])
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    continue
    return known
