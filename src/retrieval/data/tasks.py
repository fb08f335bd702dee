"""Tasks: instructions and training settings of each, those of versions.yaml and of a --task_config file."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np

from src.retrieval.data.rows import is_number
from src.utils.config_file import read_settings
from src.utils.errors import UserError
from src.utils.files import BEIR_PREFIX, rows_file
from src.utils.flags import check_choice
from src.utils.jsonl import Rows

TASKS = ("qa", "convsearch", "chat", "lrlm", "icl", "tool")
#: Folder names in a data path that name the task of the rows below.
TASK_FOLDERS: Mapping[str, str] = MappingProxyType({**{task: task for task in TASKS}, "conversation": "convsearch"})
#: Ways to choose a row's positive and its negatives for training.
SELECT_POSITIVE = ("first", "random", "teacher", "teacher-pos")
SELECT_NEGATIVE = ("random", "first", "teacher+", "teacher-")
#: What to do where a task is missing.
_HOW_TO_NAME = "name it with --task, in the rows' 'task' field or by a folder of that name in the path"


#: What stands for a row's own instruction in a template.
OWN = "{instruction}"


@dataclass(frozen=True)
class Instruction:
    """Texts put before a query and before a key.

    A row's own ``instruction``, put into `template`, takes the place of `query`.
    """

    query: str = ""
    key: str = ""
    template: str = OWN

    def before(self, row: Mapping[str, Any]) -> str:
        """The text before the query of a row."""
        own = row.get("instruction")
        return self.template.replace(OWN, own) if own else self.query

    def __str__(self) -> str:
        parts = {"queries": self.query, "keys": self.key}
        return ", ".join(f"before {name} {text!r}" for name, text in parts.items() if text) or "none"


#: Instruction of a task (None: the rows name no task).
InstructionOf = Callable[[str | None], Instruction]
#: Which puts nothing before a text, whatever the rows bring.
NOTHING = Instruction(template="")


def no_instruction(task: str | None) -> Instruction:
    """The instruction texts with ``--add_instruction False``: none."""
    return NOTHING


@dataclass(frozen=True)
class TaskConfig:
    """A task of the ``--task_config`` file, new or a released one; None where the file says nothing.

    The `instruction` replaces that of any version; `training` (some of `TRAINING_SETTINGS`) goes over that of the
    version; `lm_prompt` is the released task whose prompt scoring by an LM takes.
    """

    instruction: Instruction | None = None
    training: Mapping[str, Any] | None = None
    lm_prompt: str | None = None


#: Tasks without a --task_config file.
NO_TASK_CONFIG: Mapping[str, TaskConfig] = MappingProxyType({})

#: Versions of the instructions, as in versions.yaml; a model's own ones; none but those that rows bring.
VERSIONS = (
    *("llm-embedder", "bge", "bge-zh", "e5-instruct", "e5", "instructor", "gte-instruct", "gte", "qwen3-embedding"),
    *("arctic-v2", "arctic", "embeddinggemma"),
)
MODEL, NONE = "model", "none"
#: The task in a version, or among a model's own ones, that stands for any.
ANY = "*"


def instruction_for(
    version: str,
    task: str | None,
    task_config: Mapping[str, TaskConfig] = NO_TASK_CONFIG,
    own: Mapping[str, Instruction] | None = None,
    query: str | None = None,
    key: str | None = None,
) -> Instruction:
    """Return the instruction of a task by the task file, else by the version; raise a UserError if neither has one.

    `own` are those of ``--version model``, by task. The texts `query` and `key` go over whatever else is said.
    """
    released, custom = _tasks_of(version, own), task_config.get(task or "")
    of_version = released.get(task or ANY, released.get(ANY))
    found = [each.instruction for each in (custom, of_version) if each is not None and each.instruction is not None]
    if not found and (query is None or key is None):
        check_choice("version", version, (*VERSIONS, MODEL, NONE))
        if custom is not None:
            raise UserError(
                f"--task_config: the task {task!r} has no instruction, and --version {version} has none for it: add "
                "one to the file"
            )
        choices = _listed(task_config) if own is None else ", ".join(own)
        raise UserError(
            f"--version {version} needs a task of {choices}, found {task!r}: {_HOW_TO_NAME}, or give "
            "--add_instruction False"
        )
    chosen = found[0] if found else Instruction()
    if chosen.template == OWN and of_version is not None and of_version.instruction is not None:
        chosen = replace(chosen, template=of_version.instruction.template)
    texts = {name: text for name, text in (("query", query), ("key", key)) if text is not None}
    return replace(chosen, **texts)


def _tasks_of(version: str, own: Mapping[str, Instruction] | None) -> Mapping[str, TaskConfig]:
    """The tasks of a version, or a model's `own`."""
    if version == NONE:
        return {ANY: TaskConfig(Instruction())}
    if version == MODEL:
        return {task: TaskConfig(instruction) for task, instruction in (own or {}).items()}
    return released_tasks().get(version, {})


def version_of(name: str) -> str | None:
    """The version that a model is of by its name (a hub name or path); None for no known one."""
    last = os.path.basename(os.path.normpath(name)).lower()
    _, versions = _versions()
    return next((version for version, tasks in versions.items() if re.match(tasks["names"], last)), None)


def training_settings_for(
    version: str, task: str | None, task_config: Mapping[str, TaskConfig] = NO_TASK_CONFIG
) -> dict[str, Any]:
    """Return the flags that ``--use_train_config`` replaces: the version's settings, over which go those of the file.

    Raises:
        UserError: neither has any for this task.
    """
    released, custom = released_tasks().get(version, {}), task_config.get(task or "")
    settings = released[task].training if task in released else None
    if custom is not None and custom.training is not None:
        # What the file sets to null is left to the command line.
        return {name: value for name, value in {**(settings or {}), **custom.training}.items() if value is not None}
    if settings is not None:
        return dict(settings)
    if all(each.training is None for each in released.values()):
        trained = [name for name, tasks in released_tasks().items() if any(each.training for each in tasks.values())]
        raise UserError(
            f"--use_train_config: version {version!r} has no training settings, choose --version from "
            f"{', '.join(trained)}, leave --use_train_config out, or give --task_config with settings of "
            "its own"
        )
    raise UserError(
        f"--use_train_config needs a task of {_listed(task_config)} that has training settings, found {task!r}: "
        f"{_HOW_TO_NAME}"
    )


def _listed(further: Collection[str]) -> str:
    return ", ".join(dict.fromkeys((*TASKS, *further)))


def prompt_task_problems(
    task: str, default: str | None, prompts: Collection[str] = (), task_config: Collection[str] = ()
) -> list[str]:
    """List what keeps an LM from being prompted for a row of `task` (empty: of `default`): its prompt is not known.

    It is known for `TASKS` and `prompts`; `task_config` has further tasks, some of them without a prompt.
    """
    name, known = task or default, tuple(dict.fromkeys((*TASKS, *prompts)))
    if name in known:
        return []
    if name is None:
        problem = "neither row nor path names a task (see --task)"
    else:
        # NumPy's text looks otherwise.
        shown = repr(str(name))
        problem = f"--task_config gives {shown} no lm_prompt" if name in task_config else f"unknown task {shown}"
    return [f"{problem}: the prompt depends on it, choose from {', '.join(known)}"]


def task_from_path(path: str, further: Collection[str] = ()) -> str | None:
    """Return the task that the innermost task-named folder of `path` names; `further` are names besides `TASKS`."""
    if path.startswith(BEIR_PREFIX):
        path = rows_file(path)
    for folder in reversed(os.path.dirname(path).split(os.sep)):
        if folder in further:
            return folder
        if folder in TASK_FOLDERS:
            return TASK_FOLDERS[folder]
    return None


def distinct_tasks(rows: Rows, default: str | None) -> list[str | None]:
    """List the distinct tasks of a file; rows without one count as `default`."""
    return sorted({str(task) or default for task in np.unique(rows.scan.columns["task"])}, key=str)


def single_task(rows: Rows, default: str | None) -> str | None:
    """Return the task of all rows, or raise a UserError for several; rows without one count as `default`."""
    tasks = distinct_tasks(rows, default)
    if len(tasks) > 1:
        raise UserError(f"{rows.path} mixes the tasks {', '.join(map(str, tasks))}: evaluate one task at a time")
    return tasks[0]


#: What a value must be, in words and as a test.
_Kind = tuple[str, Callable[[Any], bool]]
_TEXT: _Kind = ("text", lambda value: isinstance(value, str))
_NUMBER: _Kind = ("a number", is_number)
_TEMPLATE: _Kind = (f"text with {OWN} in it", lambda value: isinstance(value, str) and OWN in value)
_WEIGHT: _Kind = ("a number of 0 or more", lambda value: is_number(value) and value >= 0)

#: The settings of training that a task may have, by flag. All may be null: what the command line says.
TRAINING_SETTINGS: Mapping[str, _Kind] = {
    "select_positive": (f"one of {', '.join(SELECT_POSITIVE)}", lambda value: value in SELECT_POSITIVE),
    "select_negative": (f"one of {', '.join(SELECT_NEGATIVE)}", lambda value: value in SELECT_NEGATIVE),
    "contrastive_weight": _WEIGHT,
    "distill_weight": _WEIGHT,
    "teacher_temperature": ("a number above 0", lambda value: is_number(value) and value > 0),
    "stable_distill": ("true or false", lambda value: isinstance(value, bool)),
    "margin_mse": ("true or false", lambda value: isinstance(value, bool)),
    "positives_per_query": ("a whole number above 0", lambda value: type(value) is int and value > 0),
    "in_batch": ("true or false", lambda value: isinstance(value, bool)),
    "max_sample_num": ("a whole number above 0", lambda value: type(value) is int and value > 0),
    "teacher_scores_margin": _NUMBER,
    "teacher_scores_min": _NUMBER,
}
#: The parts of a task in the file, and what they hold.
_PARTS: Mapping[str, Mapping[str, _Kind]] = {
    "instruction": {"query": _TEXT, "key": _TEXT, "template": _TEMPLATE},
    "training": TRAINING_SETTINGS,
    "lm_prompt": {},
}


def _check_names(where: str, value: Any, known: Collection[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a mapping with any of {', '.join(known)}, found {value!r}")
    if unknown := [name for name in value if name not in known]:
        raise UserError(f"{where}: {unknown[0]!r} is unknown: choose from {', '.join(known)}")
    return value


def _read_part(where: str, task: dict[str, Any], part: str) -> dict[str, Any] | None:
    if task.get(part) is None:
        return None
    values = {}
    for name, value in _check_names(f"{where}.{part}", task[part], _PARTS[part]).items():
        words, is_valid = _PARTS[part][name]
        values[name] = value
        if isinstance(value, str) and not is_valid(value):
            # YAML takes 1e-4 for text.
            with contextlib.suppress(ValueError):
                values[name] = float(value)
        if value is not None and not is_valid(values[name]):
            raise UserError(f"{where}.{part}.{name} must be {words}, found {value!r}")
    return values


def load_task_config(path: str | None) -> dict[str, TaskConfig]:
    """Read the tasks of a ``--task_config`` file, by name; none without one.

    Raises:
        UserError: the file is missing or broken, or has unknown names or values.
    """
    return {} if path is None else _read_tasks(f"--task_config: {path}", read_settings(path, "--task_config"))


@cache
def _versions() -> tuple[str, dict[str, Any]]:
    """The path of versions.yaml, and what is in it."""
    path = os.path.join(os.path.dirname(__file__), "versions.yaml")
    return path, read_settings(path, "--version")


@cache
def released_tasks() -> dict[str, dict[str, TaskConfig]]:
    """Read the released tasks by version, as versions.yaml has them; the task ``*`` is whatever the task."""
    path, versions = _versions()
    return {
        version: _read_tasks(f"{path}: {version}", {name: task for name, task in tasks.items() if name != "names"})
        for version, tasks in versions.items()
    }


def read_instructions(file: str, content: Any) -> dict[str, Instruction]:
    """Read instructions by task, as a model's folder has them; a UserError names the `file` that is damaged."""
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file}: 'instructions' must be a mapping from names of tasks to texts, found {content!r}")
    parts = {task: {"instruction": texts} for task, texts in content.items()}
    return {
        task: _instruction(_read_part(f"{file}: {task}", part, "instruction") or {}) for task, part in parts.items()
    }


def _instruction(texts: Mapping[str, str | None]) -> Instruction:
    return Instruction(**{part: text for part, text in texts.items() if text is not None})


def _read_tasks(file: str, content: Any) -> dict[str, TaskConfig]:
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file} must be a mapping from names of tasks to their settings")
    tasks = {}
    for name, value in content.items():
        where = f"{file}: {name}"
        if not isinstance(name, str) or not name or "/" in name:
            raise UserError(f"{file}: {name!r} is no name of a task: text in quotes without / is")
        task = _check_names(where, value, _PARTS)
        texts = _read_part(where, task, "instruction")
        instruction = None if texts is None else _instruction(texts)
        training, prompt = _read_part(where, task, "training"), task.get("lm_prompt")
        if prompt is not None and prompt not in TASKS:
            raise UserError(f"{where}.lm_prompt must be one of {', '.join(TASKS)}, found {prompt!r}")
        tasks[name] = TaskConfig(instruction, training, prompt)
    return tasks
