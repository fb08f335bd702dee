"""Task constants: instructions and per-task training settings, frozen.

The instruction texts are those the released models were trained with; a changed blank changes their
embeddings.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from src.utils.errors import UserError

TASKS = ("qa", "convsearch", "chat", "lrlm", "icl", "tool")
#: Folder names in a data path that tell the task of the rows below.
TASK_FOLDERS: Mapping[str, str] = MappingProxyType({**{task: task for task in TASKS}, "conversation": "convsearch"})
#: Ways to choose a row's positive and its negatives for training.
SELECT_POSITIVE = ("first", "random", "teacher", "teacher-pos")
SELECT_NEGATIVE = ("random", "first", "teacher+", "teacher-")


@dataclass(frozen=True)
class Instruction:
    """Texts put before a query and before a key."""

    query: str = ""
    key: str = ""


@dataclass(frozen=True)
class TaskConfig:
    """Training settings of one task; None means what the command line says."""

    select_positive: str | None = None
    select_negative: str | None = None
    contrastive_weight: float | None = None
    distill_weight: float | None = None
    teacher_temperature: float | None = None
    stable_distill: bool | None = None
    max_sample_num: int | None = None
    teacher_scores_margin: float | None = None
    teacher_scores_min: float | None = None

    def override(self, **command_line: object) -> dict[str, object]:
        """`command_line` with the settings that this task names put in their place."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value if named.get(name) is None else named[name] for name, value in command_line.items()}


@dataclass(frozen=True)
class OwnTask:
    """A task of the user's file (see `task_config`), new or one of ours; None where the file says nothing.

    Attributes:
        instruction: in place of that of any version.
        training: some of the settings of `TaskConfig`, which go over those that the version has for this task.
        lm_prompt: the task of ours whose prompt scoring by an LM takes.
    """

    instruction: Instruction | None = None
    training: Mapping[str, Any] | None = None
    lm_prompt: str | None = None


#: Without such a file.
NO_OWN_TASKS: Mapping[str, OwnTask] = MappingProxyType({})

_ANY_TASK: dict[str, Instruction] = {
    "bge": Instruction("Represent this sentence for searching relevant passages: "),
    "e5": Instruction("query: ", "passage: "),
}

_BY_TASK: dict[str, dict[str, Instruction]] = {
    "llm-embedder": {
        "qa": Instruction(
            "Represent this query for retrieving relevant documents: ",
            "Represent this document for retrieval: ",
        ),
        "convsearch": Instruction(
            "Encode this query and context for searching relevant passages: ",
            "Encode this passage for retrieval: ",
        ),
        "chat": Instruction(
            "Embed this dialogue to find useful historical dialogues: ",
            "Embed this historical dialogue for retrieval: ",
        ),
        "lrlm": Instruction(
            "Embed this text chunk for finding useful historical chunks: ",
            "Embed this historical text chunk for retrieval: ",
        ),
        "icl": Instruction(
            "Convert this example into vector to look for useful examples: ",
            "Convert this example into vector for retrieval: ",
        ),
        "tool": Instruction(
            "Transform this user request for fetching helpful tool descriptions: ",
            "Transform this tool description for retrieval: ",
        ),
    },
    "instructor": {
        "qa": Instruction(
            "Represent the query for retrieving supporting documents: ",
            "Represent the document for retrieval: ",
        ),
        "convsearch": Instruction(
            "Represent the query and context for retrieving supporting passages: ",
            "Represent the passage for retrieval: ",
        ),
        "chat": Instruction(
            "Represent the dialogue for retrieving useful historical dialogues: ",
            "Represent the historical dialogue for retrieval: ",
        ),
        "lrlm": Instruction(
            "Represent the text chunk for retrieving useful historical chunks: ",
            "Represent the historical text chunk for retrieval: ",
        ),
        "icl": Instruction(
            "Represent the example for retrieving duplicate examples: ",
            "Represent the example for retrieval: ",
        ),
        "tool": Instruction(
            "Represent the user request for retrieving duplicate examples: ",
            "Represent the tool description for retrieval: ",
        ),
    },
}

VERSIONS = ("llm-embedder", "bge", "e5", "instructor")

_TRAINING: dict[str, dict[str, TaskConfig]] = {
    "llm-embedder": {
        "qa": TaskConfig("first", "random", contrastive_weight=0, stable_distill=True),
        "convsearch": TaskConfig("first", "random", distill_weight=0, stable_distill=False),
        "chat": TaskConfig(
            "teacher", "random", contrastive_weight=0, distill_weight=1.0, teacher_temperature=0.1, stable_distill=False
        ),
        "lrlm": TaskConfig(
            "teacher",
            "random",
            contrastive_weight=0,
            distill_weight=1.0,
            teacher_temperature=0.1,
            stable_distill=False,
            max_sample_num=10000,
            teacher_scores_margin=0.1,
        ),
        "icl": TaskConfig("random", "random", contrastive_weight=0, stable_distill=True),
        "tool": TaskConfig("first", "random", distill_weight=0, stable_distill=False),
    }
}


def instruction_for(version: str, task: str | None, own: Mapping[str, OwnTask] = NO_OWN_TASKS) -> Instruction:
    """The instruction of a task: that of the user's file, else that of an instruction set.

    Raises:
        UserError: unknown version or task, or no task where the version needs one.
    """
    if task is not None and task in own and (instruction := own[task].instruction) is not None:
        return instruction
    if version in _ANY_TASK:
        return _ANY_TASK[version]
    if version not in _BY_TASK:
        raise UserError(f"--version {version!r} is unknown: choose from {', '.join(VERSIONS)}")
    if task is None or task not in _BY_TASK[version]:
        if task in own:
            raise UserError(
                f"--task_config: the task {task!r} has no instruction, and --version {version} has none for it: add "
                "one to the file"
            )
        raise UserError(
            f"--version {version} needs a task of {_listed(own)}, found {task!r}: name it with --task, in the "
            "rows' 'task' field or by a folder of that name in the path, or give --add_instruction False"
        )
    return _BY_TASK[version][task]


def train_config_for(version: str, task: str | None, own: Mapping[str, OwnTask] = NO_OWN_TASKS) -> TaskConfig:
    """The training settings of a task, for ``--use_train_config``: the version's, over which go those of the file.

    Raises:
        UserError: neither has any for this task.
    """
    if task is not None and task in own and (training := own[task].training) is not None:
        return replace(_TRAINING.get(version, {}).get(task, TaskConfig()), **training)
    if version not in _TRAINING:
        raise UserError(
            f"--use_train_config: version {version!r} has no training settings, choose --version from "
            f"{', '.join(sorted(_TRAINING))}, leave --use_train_config out, or give --task_config with settings of its "
            "own"
        )
    if task is None or task not in _TRAINING[version]:
        raise UserError(
            f"--use_train_config needs a task of {_listed(own)} that has training settings, found {task!r}: name it "
            "with --task, in the rows' 'task' field or by a folder of that name in the path"
        )
    return _TRAINING[version][task]


def prompt_task_problems(
    task: str, default: str | None, prompts: Collection[str] = (), own: Collection[str] = ()
) -> list[str]:
    """What keeps an LM from being prompted for a row: the prompt of its task (empty when it names none) is not known.

    Args:
        task: of the row.
        default: of rows that name none.
        prompts: further tasks whose prompt is known.
        own: further tasks, some of them without a prompt.
    """
    name, known = task or default, tuple(dict.fromkeys((*TASKS, *prompts)))
    if name in known:
        return []
    problem = "neither row nor path names a task (see --task)" if name is None else f"unknown task {str(name)!r}"
    if name in own:
        problem = f"--task_config gives {str(name)!r} no lm_prompt"
    return [f"{problem}: the prompt depends on it, choose from {', '.join(known)}"]


def _listed(own: Collection[str]) -> str:
    return ", ".join(dict.fromkeys((*TASKS, *own)))


def task_from_path(path: str, own: Collection[str] = ()) -> str | None:
    """The task that the innermost task-named folder of `path` tells, if any; `own` are the names of further tasks."""
    for folder in reversed(os.path.dirname(path).split(os.sep)):
        if folder in own:
            return folder
        if folder in TASK_FOLDERS:
            return TASK_FOLDERS[folder]
    return None
