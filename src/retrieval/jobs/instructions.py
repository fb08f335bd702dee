"""What is put before queries and keys: which flag, file or name of a model says so, and whether it was trained so."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np

from src.retrieval.args import RankerArgs, RetrievalArgs
from src.retrieval.data.corpus import EvalData
from src.retrieval.data.tasks import (
    ANY,
    MODEL,
    NONE,
    Instruction,
    InstructionOf,
    instruction_for,
    load_task_config,
    no_instruction,
    released_tasks,
    version_of,
)
from src.retrieval.models.load_encoder import EncoderConfig, encoder_folders, encoder_instructions
from src.retrieval.models.prompts import EMBEDDER_FILE
from src.retrieval.report.model_card import ancestor
from src.retrieval.training.dataset import Source
from src.utils import distributed
from src.utils.errors import UserError

logger = logging.getLogger(__name__)

ArgsT = TypeVar("ArgsT", bound=RetrievalArgs)

#: The version of an encoder of ours that does not say how it was trained: the default when such were made.
UNSAID = "bge"


def _encoders(args: RetrievalArgs) -> EncoderConfig:
    return EncoderConfig(args.query_encoder, args.key_encoder, args.tie_encoders, model_cache_dir=args.model_cache_dir)


def trained_with(args: RetrievalArgs) -> tuple[str, str, Mapping[str, Instruction]] | None:
    """The ``--version`` of an encoder, what tells it, and its instructions by task; None where nothing does."""
    if (own := encoder_instructions(_encoders(args))) is not None:
        return MODEL, os.path.basename(own[0]), own[1]
    (folder, *_) = encoder_folders(_encoders(args)).values()
    for name in filter(None, (args.query_encoder, ancestor(folder))):
        if (version := version_of(name)) is not None:
            by_task = {task: each.instruction or Instruction() for task, each in released_tasks()[version].items()}
            return version, f"the name {name}", by_task
    return None


def with_version(args: ArgsT, given: Collection[str]) -> ArgsT:
    """Flags with the ``--version`` of the encoder, unless one is `given`; one log line where nothing tells it."""
    if "version" in given or args.retrieval_method != "dense" or not args.add_instruction:
        return args
    (folder, *_) = encoder_folders(_encoders(args)).values()
    if (known := trained_with(args)) is not None:
        version = known[0]
    elif os.path.isfile(os.path.join(folder, EMBEDDER_FILE)):
        version = UNSAID
        logger.info("%s does not say with which instructions it was trained: --version %s is taken", folder, version)
    else:
        version = NONE
        how = "--version, or --query_instruction and --key_instruction, put some"
        logger.info("%s brings no instructions and has no known name: none goes before texts (%s)", folder, how)
    return replace(args, version=version)


def instructions(args: RetrievalArgs | RankerArgs) -> InstructionOf:
    """Instruction by task."""
    query, key = args.query_instruction, args.key_instruction
    if not args.add_instruction and query is None and key is None:
        return no_instruction
    # A ranker puts texts that are given without --add_instruction.
    version, own = args.version if args.add_instruction else NONE, None
    if version == MODEL and isinstance(args, RetrievalArgs):
        own = encoder_instructions(_encoders(args))
        if own is None and (query is None or key is None):
            raise UserError(
                f"--version model: {args.query_encoder!r} brings no instructions: name those it was trained with, by "
                "--version or by --query_instruction and --key_instruction"
            )
    task_config = load_task_config(args.task_config)
    by_task = own[1] if own is not None else None
    return partial(instruction_for, version, task_config=task_config, own=by_task, query=query, key=key)


def _said_by(args: RetrievalArgs | RankerArgs, task: str | None) -> str:
    """What says which instruction a task has."""
    flags = [f"--{name}" for name in ("query_instruction", "key_instruction") if getattr(args, name) is not None]
    config = load_task_config(args.task_config)
    if task in config and config[task].instruction is not None:
        rest = f"--task_config {args.task_config}"
    elif args.version == MODEL and isinstance(args, RetrievalArgs) and (own := encoder_instructions(_encoders(args))):
        rest = f"--version model: {own[0]}"
    else:
        rest = f"--version {args.version}" if args.add_instruction else "--add_instruction False"
    return " and ".join(flags if len(flags) == 2 else [*flags, rest])


def describe_instruction(args: RetrievalArgs | RankerArgs, task: str | None, named: bool = False) -> str:
    """What stands before queries and keys of a task, and which flag says so; the task is `named` among several."""
    if isinstance(args, RetrievalArgs) and args.retrieval_method != "dense":
        return f"none (--retrieval_method {args.retrieval_method})"
    shown = str(instructions(args)(task))
    whose = f"task {task or 'none'}: " if named else ""
    out = "" if shown == "none" or not args.add_instruction else "; --add_instruction False leaves it out"
    return f"{whose}{shown} ({_said_by(args, task)}{out})"


def say_instructions(
    args: RetrievalArgs | RankerArgs, evaluated: Sequence[EvalData], sources: Sequence[Source] = ()
) -> list[str]:
    """Log and return what stands before the texts of all data, and warn where a model was trained with another text.

    Training on `sources` is with what flags say, so there is nothing to warn of.
    """
    told = [task for source in sources for task in source.tasks]
    told = list(dict.fromkeys([*told, *(data.task for data in evaluated)]))
    lines = [describe_instruction(args, task, len(told) > 1) for task in told]
    files = {source.rows.path: (source.rows, source.instruction_of(source.tasks[0])) for source in sources}
    files |= {data.rows.path: (data.rows, data.instruction_of(data.task)) for data in evaluated}
    for path, (rows, instruction) in files.items():
        if own := int(rows.scan.columns.get("instructed", np.zeros(0)).sum()):
            how = f"put before the query as {instruction.template!r}" if instruction.template else "left out"
            lines.append(f"{own:,} of {len(rows):,} rows of {path} bring their own, {how}")
    if distributed.is_main():
        for text in lines:
            logger.info("instruction: %s", text)
        for data in evaluated if not sources else ():
            _warn_of_another(args, data)
    return lines


def _warn_of_another(args: RetrievalArgs | RankerArgs, data: EvalData) -> None:
    if not isinstance(args, RetrievalArgs) or args.retrieval_method != "dense":
        return
    known, used = trained_with(args), data.instruction_of(data.task)
    if known is None:
        return
    _, teller, by_task = known
    wanted = by_task.get(data.task or ANY, by_task.get(ANY))
    if wanted is not None and (wanted.query, wanted.key) != (used.query, used.key):
        other = "%s is used with other instructions than it was trained with: %s (%s); trained with: %s (by %s)"
        logger.warning(other, args.query_encoder, used, _said_by(args, data.task), wanted, teller)
