"""The file of an evaluation's outputs, a line for each row, and its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluation.runner.from_corpus import results_folder
from evaluation.runner.task import Found
from src.lm.ask import Answer
from src.lm.eval_args import LMEvalArgs
from src.lm.memory import Response, to_response
from src.utils import distributed
from src.utils.files import derived_path, path_name

#: A file's name holds more than that of the LM.
LM_NAME_BYTES = 80

#: Number of the row, and what became of its request.
Entry = tuple[int, Answer]


def output_path(args: LMEvalArgs, rows_path: str) -> str:
    """File of the outputs in the retriever's folder: another one for another LM or other tasks."""
    names = [args.model_name_or_path, "+".join(getattr(args, "task_names", None) or ())]
    short = [path_name(name, LM_NAME_BYTES) for name in names if name] + ([args.save_name] if args.save_name else [])
    # Most files of rows are called test, in a folder that tells the data.
    path = Path(rows_path)
    named = path.with_name("-".join(filter(None, (path.parent.name, path.name))))
    return derived_path(str(named), "output", ".".join(short), results_folder(args))


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
