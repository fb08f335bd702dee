"""The file of an evaluation's outputs: its name, a line for each row, and the responses in it."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluation.runner.args import LMEvalArgs
from evaluation.runner.from_corpus import Retrieved, Values, results_folder
from evaluation.runner.task import EvalTask
from src.lm.ask import Answer
from src.lm.response_store import Response, to_response
from src.retrieval.ranking.files import query_id
from src.utils.files import derived_path, path_name

#: A file's name holds more than that of the LM.
LM_NAME_BYTES = 80


def output_path(args: LMEvalArgs, rows_path: str) -> str:
    """The file of outputs in the retriever's folder, with the names of the LM and of the tasks in its name."""
    names = [args.model_name_or_path, "+".join(getattr(args, "task_names", None) or ())]
    short = [path_name(name, LM_NAME_BYTES) for name in names if name] + ([args.save_name] if args.save_name else [])
    # Most files of rows are called test, in a folder named after the data.
    path = Path(rows_path)
    named = path.with_name("-".join(filter(None, (path.parent.name, path.name))))
    return derived_path(str(named), "output", ".".join(short), results_folder(args))


def output_line(task: EvalTask, number: int, retrieved: Retrieved, answer: Answer, values: Values) -> dict[str, Any]:
    """A row's line in the file of outputs."""
    row, (key, response) = task.data.rows[number], answer
    line = {
        "query_id": query_id(row, number),
        "prompt_hash": key,
        "output": task.output(response) if response is not None else None,
        "gold": task.gold(row),
        "values": values,
        "retrieved": list(retrieved.indices),
        "response": asdict(response) if response is not None else None,
    }
    if task.data.ids is not None and task.data.corpus is not None:
        line["retrieved_id"] = task.data.ids.texts(retrieved.indices)
    return {**line, "retrieved_texts": retrieved.texts} if task.args.debug_retrieval else line


def read_responses(path: str) -> dict[str, Response]:
    """The responses in an earlier run's outputs, by the hash of what was asked; damaged lines are left out."""
    responses: dict[str, Response] = {}
    if os.path.isfile(path):
        with open(path, "rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    row = json.loads(line)
                    if (response := to_response(row["response"])) is not None:
                        responses[row["prompt_hash"]] = response
    return responses
