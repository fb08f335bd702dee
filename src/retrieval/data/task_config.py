"""A user's own tasks (``--task_config``): a YAML or JSON file, read and checked."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from src.retrieval.data.tasks import SELECT_NEGATIVE, SELECT_POSITIVE, TASKS, Instruction, OwnTask
from src.utils.config_file import read_settings
from src.utils.errors import UserError


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _one_of(choices: Collection[str]) -> tuple[str, Callable[[Any], bool]]:
    return f"one of {', '.join(choices)}", lambda value: value in choices


_TEXT = ("text", lambda value: isinstance(value, str))
_NUMBER = ("a number", _is_number)
_WEIGHT = ("a number of 0 or more", lambda value: _is_number(value) and value >= 0)

#: Setting → what it must be, in words and as a test. All may be null: what the command line says.
TRAINING_SETTINGS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "select_positive": _one_of(SELECT_POSITIVE),
    "select_negative": _one_of(SELECT_NEGATIVE),
    "contrastive_weight": _WEIGHT,
    "distill_weight": _WEIGHT,
    "teacher_temperature": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "stable_distill": ("true or false", lambda value: isinstance(value, bool)),
    "max_sample_num": ("a whole number above 0", lambda value: type(value) is int and value > 0),
    "teacher_scores_margin": _NUMBER,
    "teacher_scores_min": _NUMBER,
}
_INSTRUCTION = {"query": _TEXT, "key": _TEXT}
_PARTS = ("instruction", "training", "lm_prompt")


def _check_names(where: str, found: Any, known: Collection[str]) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise UserError(f"{where} must be a mapping with any of {', '.join(known)}, found {found!r}")
    if unknown := [name for name in found if name not in known]:
        raise UserError(f"{where}: {unknown[0]!r} is unknown: choose from {', '.join(known)}")
    return found


def _check_values(where: str, found: Any, known: Mapping[str, tuple[str, Callable[[Any], bool]]]) -> dict[str, Any]:
    values = {}
    for name, value in _check_names(where, found, known).items():
        wanted, is_valid = known[name]
        values[name] = value if value is None or is_valid(value) else _number(value)
        if value is not None and not is_valid(values[name]):
            raise UserError(f"{where}.{name} must be {wanted}, found {value!r}")
    return values


def _number(value: Any) -> Any:
    """The number that a text stands for, since YAML takes 1e-4 for text; anything else as it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _own_task(where: str, found: Any) -> OwnTask:
    parts = _check_names(where, found, _PARTS)
    instruction = None
    if parts.get("instruction") is not None:
        texts = _check_values(f"{where}.instruction", parts["instruction"], _INSTRUCTION)
        instruction = Instruction(texts.get("query") or "", texts.get("key") or "")
    training = None
    if parts.get("training") is not None:
        training = _check_values(f"{where}.training", parts["training"], TRAINING_SETTINGS)
    prompt = parts.get("lm_prompt")
    if prompt is not None and prompt not in TASKS:
        raise UserError(f"{where}.lm_prompt must be one of {', '.join(TASKS)}, found {prompt!r}")
    return OwnTask(instruction, training, prompt)


def load_task_config(path: str | None) -> dict[str, OwnTask]:
    """The tasks of a file, by name; none without one.

    Args:
        path: JSON when it ends in ``.json``, else YAML.

    Raises:
        UserError: the file is missing or broken, or has names or values that mean nothing.
    """
    if path is None:
        return {}
    found = read_settings(path, "--task_config")
    if not isinstance(found, dict) or not found:
        raise UserError(f"--task_config: {path} must be a mapping from names of tasks to their settings")
    for name in found:
        if not isinstance(name, str) or not name or "/" in name:
            raise UserError(f"--task_config: {path}: {name!r} is no name of a task: text in quotes without / is")
    return {name: _own_task(f"--task_config: {path}: {name}", own) for name, own in found.items()}
