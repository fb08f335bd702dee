"""The file of an evaluation's outputs, a line for each row; and responses kept while it runs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from src import distributed
from src.io import json_line
from src.lm.ask import Response

CHECKPOINT = re.compile(r"checkpoint-\d+")

#: Number of the row, hash of what was asked, and the response; empty and None when the question does not fit.
Entry = tuple[int, str, Response | None]


def tail(name: str) -> str:
    """The last two parts of a path, and those before up to the folder of the run when they are of a checkpoint."""
    parts = Path(name).parts
    size = 2
    while size < len(parts) and CHECKPOINT.fullmatch(parts[-size]):
        size += 1
    return "/".join(parts[-size:])


def parts_path(path: str) -> Path:
    """Where responses are kept until the file of outputs is whole."""
    return Path(f"{path}.parts")


def to_response(value: dict[str, Any]) -> Response:
    """What `asdict` and JSON made of a response."""
    return Response(tuple(value["texts"]), tuple(value["log_likelihoods"]), tuple(value["tokens"]))


def output_line(
    query_id: int | str,
    key: str,
    response: Response | None,
    gold: Any,
    values: dict[str, float],
    retrieved: Sequence[Any],
) -> dict[str, Any]:
    """A row's output: what was asked (as a hash), what came back, what is right, the values and what was retrieved."""
    output = None
    if response is not None:
        output = list(response.texts) if response.texts else response.choice
    return {
        "query_id": query_id,
        "prompt_hash": key,
        "output": output,
        "gold": gold,
        "values": values,
        "retrieved": list(retrieved),
        "response": asdict(response) if response is not None else None,
    }


def gather_entries(own: Sequence[Entry]) -> list[Entry]:
    """The entries of all processes."""
    plain = [[number, key, asdict(response) if response is not None else None] for number, key, response in own]
    return [
        (number, key, to_response(response) if response is not None else None)
        for part in distributed.all_gather_json(plain)
        for number, key, response in part
    ]


def append_responses(path: str, entries: Iterable[Entry], known: dict[str, Response]) -> None:
    """Keep the responses that are not yet `known`, durably."""
    parts = parts_path(path)
    parts.parent.mkdir(parents=True, exist_ok=True)
    with open(parts, "a", encoding="utf-8") as file:
        # What a killed run left of a line is ended first; it is no JSON, and passed over when read.
        file.write("\n")
        for _, key, response in entries:
            if response is not None and key not in known:
                file.write(json_line({"prompt_hash": key, "response": asdict(response)}))
        file.flush()
        os.fsync(file.fileno())


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
                    if row["response"] is not None:
                        known[row["prompt_hash"]] = to_response(row["response"])
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue
    return known
