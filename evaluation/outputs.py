"""The file of an evaluation's outputs, a line for each row, and its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluation.task import Found
from src import distributed
from src.io import derived_path
from src.lm.ask import Answer
from src.lm.eval_args import LMEvalArgs
from src.lm.memory import Response, to_response

CHECKPOINT = re.compile(r"checkpoint-\d+")

#: Number of the row, and what became of its request.
Entry = tuple[int, Answer]


def tail(name: str) -> str:
    """The last two parts of a path, and those before up to the folder of the run when they are of a checkpoint."""
    parts = Path(name).parts
    size = 2
    while size < len(parts) and CHECKPOINT.fullmatch(parts[-size]):
        size += 1
    return "/".join(parts[-size:])


def output_path(args: LMEvalArgs, retriever: str, rows_path: str) -> str:
    """File of the outputs: another one for another retriever or LM."""
    names = [retriever, args.model_name_or_path, *(getattr(args, "task_names", None) or ())]
    names += [args.save_name] if args.save_name else []
    short = [re.sub(r"[^\w.-]+", "-", tail(name)).strip("-") for name in names]
    # Most files of rows are called test, in a folder that tells the data.
    path = Path(rows_path)
    named = path.with_name("-".join(filter(None, (path.parent.name, path.name))))
    return derived_path(str(named), "output", ".".join(short), args.output_dir)


def output_line(
    query_id: int | str,
    answer: Answer,
    output: Callable[[Response], Any],
    gold: Any,
    values: dict[str, float],
    found: Found,
) -> dict[str, Any]:
    """A row's output: what was asked (as a hash), what came back, what is right, the values and what was retrieved."""
    key, response = answer
    return {
        "query_id": query_id,
        "prompt_hash": key,
        "output": output(response) if response is not None else None,
        "gold": gold,
        "values": values,
        "retrieved": list(found.indices),
        "response": asdict(response) if response is not None else None,
    }


def gather_entries(own: Sequence[Entry]) -> list[Entry]:
    """The entries of all processes."""
    plain = [[number, key, asdict(response) if response is not None else None] for number, (key, response) in own]
    return [
        (number, Answer(key, to_response(response) if response is not None else None))
        for part in distributed.all_gather_json(plain)
        for number, key, response in part
    ]
