"""Checkpoint folders: which are complete, how one is put in place, which are removed, and from which to go on.

A folder is written under another name and renamed, so that a kill at any moment leaves none that only looks complete.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from src.utils.errors import UserError
from src.utils.files import read_json, read_object
from src.utils.manifest import check_recorded

logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
#: A checkpoint being written or removed, or set aside for a new one; what a killed run leaves of one.
UNFINISHED = re.compile(r"\.checkpoint-\d+\.(partial|old|replaced)")
#: State of the random numbers of a process: of the only one, or of the one of that rank among several.
RNG_STATE = re.compile(r"rng_state(?:_(\d+))?\.pth")
#: The last file of a checkpoint that is written.
TRAINER_STATE = "trainer_state.json"
#: All arguments of the run.
ARGS_FILE = "args.json"
#: Flags that make a step, with the number of processes; and those that decide which rows come when.
BATCH_SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps")
#: Flags that say which keys a row has.
ROW_KEYS = ("train_group_size", "columns")
ROW_ORDER = ("train_data", "inbatch_same_dataset", "dataloader_drop_last", "seed", "data_seed", "max_sample_num")


def beside(folder: str, ending: str) -> str:
    """The hidden name beside a folder that it, or what it becomes, has for a while."""
    parent, name = os.path.split(os.path.abspath(folder))
    return os.path.join(parent, f".{name}.{ending}")


def replace_folder(source: str, target: str) -> None:
    """Rename `source` to `target`; what stood there is set aside, put back when that fails, and removed in the end."""
    aside = beside(target, "replaced")
    try:
        if os.path.isdir(target):
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(target, aside)
        os.rename(source, target)
    except BaseException:
        restore_replaced(target)
        raise
    if os.path.isdir(aside):
        _remove_as(beside(target, "old"), aside)


def restore_replaced(target: str) -> None:
    """Put back what `replace_folder` set aside, when nothing has taken its place."""
    aside = beside(target, "replaced")
    if os.path.isdir(aside) and not os.path.exists(target):
        logger.info("%s is back: what was to replace it is not there", target)
        os.rename(aside, target)


def remove_checkpoint(folder: str) -> None:
    """Remove a checkpoint folder; renamed first, so that a kill on the way leaves none that looks complete."""
    _remove_as(beside(folder, "old"), folder)


def _remove_as(old: str, folder: str) -> None:
    shutil.rmtree(old, ignore_errors=True)
    os.rename(folder, old)
    shutil.rmtree(old, ignore_errors=True)


def restore_checkpoints(output_dir: str) -> None:
    """Put back the checkpoints that a run was killed replacing."""
    for path in list(Path(output_dir).glob(".checkpoint-*.replaced")):
        restore_replaced(str(path.with_name(path.name[1:].removesuffix(".replaced"))))


def remove_unfinished(output_dir: str) -> None:
    """Remove what a killed run left of checkpoints half written or half removed; put back what it was replacing."""
    restore_checkpoints(output_dir)
    for path in list(Path(output_dir).glob(".checkpoint-*")):
        if UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def remove_oldest(output_dir: str, limit: int | None, keep: set[str]) -> None:
    """Remove checkpoints until `limit` are left (None or 0: all stay), those written longest ago first.

    By time and not by step: the folder may hold checkpoints of an earlier run that went further. The absolute paths in
    `keep` stay, whatever the limit.
    """
    if not limit or limit < 0:
        return
    others = [path for path in complete_checkpoints(output_dir) if os.path.abspath(path) not in keep]
    others.sort(key=lambda path: os.path.getmtime(os.path.join(path, TRAINER_STATE)))
    surplus = len(others) - max(limit - len(keep), 0)
    for path in others[: max(surplus, 0)]:
        remove_checkpoint(path)


def is_complete(folder: str) -> bool:
    """Whether the last file of a checkpoint is there, and the folder has its final name."""
    finished = UNFINISHED.fullmatch(os.path.basename(os.path.abspath(folder))) is None
    return finished and os.path.isfile(os.path.join(folder, TRAINER_STATE))


def complete_checkpoints(output_dir: str) -> list[str]:
    """List the complete checkpoints below `output_dir`, by step."""
    steps = {
        str(path): int(match[1])
        for path in Path(output_dir).glob("checkpoint-*")
        if (match := CHECKPOINT.fullmatch(path.name)) and is_complete(str(path))
    }
    return sorted(steps, key=steps.__getitem__)


def read_state(folder: str) -> dict[str, Any]:
    """Read trainer_state.json of a checkpoint, or raise a UserError where it is damaged."""
    path = os.path.join(folder, TRAINER_STATE)
    state = read_object(path, "training state")
    step, history = state.get("global_step"), state.get("log_history")
    problem = None
    if not isinstance(step, int) or isinstance(step, bool):
        problem = "it has no number of steps (global_step)"
    elif not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        problem = "it has no log (log_history, a list of objects)"
    else:
        from transformers.trainer_callback import TrainerState

        # Saved as an object whatever is declared, and always with the size of a batch.
        hints = {**get_type_hints(TrainerState), "stateful_callbacks": dict, "train_batch_size": int}
        wrong = [name for name, value in state.items() if name in hints and not _fits(name, value, hints[name])]
        problem = f"{wrong[0]} is {state[wrong[0]]!r}" if wrong else None
    if problem is not None:
        raise UserError(f"{path} is damaged: {problem}; take another checkpoint")
    return state


def processes_saved(folder: str) -> int | None:
    """Count the processes that wrote a checkpoint, by their states of random numbers; None without any."""
    ranks = [match[1] for name in os.listdir(folder) if (match := RNG_STATE.fullmatch(name))]
    if not ranks:
        return None
    # A rank in a name means two processes at least, whichever file is lost.
    return 1 if None in ranks else max(2, *(int(rank) + 1 for rank in ranks))


def check_complete(folder: str, rank: int, processes: int) -> None:
    """Refuse to resume without the states of the schedule and of this process's random numbers.

    transformers would do without and not say so. With another number of `processes` than saved the checkpoint, whose
    dropout comes from other states, warn.
    """
    saved = processes_saved(folder)
    needed = {"scheduler.pt": "the state of the learning rate's schedule"}
    if saved in (None, processes):
        random_state = f"rng_state_{rank}.pth" if processes > 1 else "rng_state.pth"
        needed[random_state] = "the state of the random numbers"
    else:
        cause = "%s was saved by %d process(es) and %d go on: dropout is not what it would have been"
        logger.warning(cause, folder, saved, processes)
    for name, what in needed.items():
        if not os.path.isfile(os.path.join(folder, name)):
            raise UserError(
                f"--resume_from_checkpoint {folder}: {name}, {what}, is missing: take another checkpoint, or start a "
                "new run from its weights: name it as the model"
            )


def _fits(name: str, value: Any, hint: Any) -> bool:
    """Whether a value of trainer_state.json is of the kind that transformers declares; numbers are 0 or more."""
    kinds = tuple(get_origin(kind) or kind for kind in (get_args(hint) if get_origin(hint) is UnionType else (hint,)))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return bool({int, float} & {*kinds}) and (value >= 0 or name == "best_metric")
    return isinstance(value, kinds)


def check_places(output_dir: str) -> None:
    """Refuse an `output_dir`, which may not exist yet, where a file has the name of a checkpoint."""
    for path in Path(output_dir).glob("checkpoint-*"):
        if CHECKPOINT.fullmatch(path.name) and not path.is_dir():
            raise UserError(f"--output_dir: {path} is no folder, so no checkpoint can be put there: remove it")


@dataclass(frozen=True)
class Batches:
    """What a training step consists of."""

    processes: int
    queries: int
    accumulated: int

    @property
    def rows(self) -> int:
        """Queries of a step."""
        return self.processes * self.queries * self.accumulated

    def __str__(self) -> str:
        return f"{self.processes} processes × {self.queries} queries × {self.accumulated} accumulated"


def check_steps(folder: str, now: Batches, settings: Mapping[str, Any]) -> None:
    """Refuse to resume with steps of another size than those the checkpoint counts; warn of another order of rows.

    `now` and `settings` are the batches and all arguments of this run. Passing over the number of steps would pass over
    other rows than those that were trained on.
    """
    path = os.path.join(folder, ARGS_FILE)
    saved = read_json(path, "arguments") if os.path.isfile(path) else {}
    processes, state = processes_saved(folder), read_state(folder)
    parts = [saved.get(name) for name in BATCH_SIZES] if isinstance(saved, dict) else [None]
    if processes is None or not all(isinstance(part, int) for part in parts):
        # Made by hand, or by another version: nothing to compare with.
        return
    then = Batches(processes, *parts)
    if settings["auto_find_batch_size"]:
        then, now = (replace(each, queries=state.get("train_batch_size") or now.queries) for each in (then, now))
    steps = state["global_step"]
    if then.rows != now.rows and not settings["ignore_data_skip"]:
        raise UserError(
            f"--resume_from_checkpoint {folder}: its steps are of {then.rows} queries ({then}), those of this run of "
            f"{now.rows} ({now}): it has seen {steps * then.rows} rows in {steps} steps, and {steps * now.rows} would "
            f"be passed over. Keep the number by {' and '.join(f'--{name}' for name in BATCH_SIZES)}, or give "
            "--ignore_data_skip, which begins with the first rows of the epoch again"
        )
    order = [name for name in ROW_ORDER if name in saved and saved[name] != settings.get(name)]
    changed = [f"--{name} {saved[name]}, not {settings.get(name)}" for name in order]
    if settings["inbatch_same_dataset"] and then.processes * then.queries != now.processes * now.queries:
        changed.append(f"{then}, not {now}")
    keys = [f"--{name} {saved[name]}" for name in ROW_KEYS if name in saved and saved[name] != settings.get(name)]
    if keys:
        logger.warning("%s was trained with %s, and goes on with other keys for each query", folder, "; ".join(keys))
    if changed:
        logger.warning(
            "%s was trained with %s: rows come in another order, and of this epoch's some come twice, some not at all",
            folder,
            "; ".join(changed),
        )


def checkpoint_to_resume(resume: str | None, output_dir: str) -> str | None:
    """Choose by ``--resume_from_checkpoint``: a folder, the last complete checkpoint for True, or None.

    Raise a UserError where the folder is no complete checkpoint, or damaged.
    """
    if resume is None or str(resume).lower() == "false":
        return None
    restore_checkpoints(output_dir)
    known = complete_checkpoints(output_dir)
    if str(resume).lower() == "true":
        for path in sorted(map(str, Path(output_dir).glob("checkpoint-*"))):
            if CHECKPOINT.fullmatch(os.path.basename(path)) and path not in known:
                logger.warning("%s is passed over: it is not complete, %s is missing", path, TRAINER_STATE)
        if not known:
            logger.info("--resume_from_checkpoint: no checkpoint in %s, training starts from the beginning", output_dir)
            return None
        resume = known[-1]
        logger.info("resuming from %s", resume)
    elif not is_complete(resume):
        listed = f"; complete checkpoints in {output_dir}: {', '.join(known)}" if known else ""
        raise UserError(
            f"--resume_from_checkpoint {resume}: no complete checkpoint (it needs a {TRAINER_STATE}){listed}"
        )
    read_state(resume)
    for place, *_ in os.walk(resume):
        check_recorded(place)
    return resume
