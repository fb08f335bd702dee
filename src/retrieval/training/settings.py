"""From command-line flags and a task to the settings that the rows of one file are trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from src.retrieval.data.tasks import NO_OWN_TASKS, OwnTask, train_config_for
from src.retrieval.training.args import RetrievalTrainingArgs
from src.retrieval.training.losses import LossConfig
from src.retrieval.training.select import SelectionPolicy
from src.utils.errors import UserError


@dataclass(frozen=True)
class SourceSettings:
    """Selection, filters and loss for the rows of one file."""

    selection: SelectionPolicy
    loss: LossConfig
    max_sample_num: int | None = None
    teacher_scores_margin: float | None = None
    teacher_scores_min: float | None = None


def settings_for(
    args: RetrievalTrainingArgs, version: str, task: str | None, own: Mapping[str, OwnTask] = NO_OWN_TASKS
) -> SourceSettings:
    """Settings of a file whose rows are of `task`, one of ours or of the user's `own`.

    Raises:
        UserError: ``--use_train_config`` with a version or task that has no settings, or both loss weights 0.
    """
    values: dict = {
        name: getattr(args, name)
        for name in (
            "select_positive",
            "select_negative",
            "contrastive_weight",
            "distill_weight",
            "teacher_temperature",
            "stable_distill",
            "max_sample_num",
            "teacher_scores_margin",
            "teacher_scores_min",
        )
    }
    if args.use_train_config:
        values = train_config_for(version, task, own).override(**values)
    if values["contrastive_weight"] == 0 and values["distill_weight"] == 0:
        raise UserError("--contrastive_weight and --distill_weight are both 0: nothing would be trained")
    return SourceSettings(
        SelectionPolicy(
            values["select_positive"], values["select_negative"], args.train_group_size, values["stable_distill"]
        ),
        LossConfig(
            values["contrastive_weight"],
            values["distill_weight"],
            args.cos_temperature,
            values["teacher_temperature"],
            args.student_temperature,
            values["stable_distill"],
        ),
        values["max_sample_num"],
        values["teacher_scores_margin"],
        values["teacher_scores_min"],
    )
