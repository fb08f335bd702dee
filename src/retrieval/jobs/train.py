"""What the training entry points do alike: check flags, load rows, train."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from transformers.trainer_utils import SaveStrategy, SchedulerType

from src.retrieval.args import RankerArgs, RetrievalArgs
from src.retrieval.data.tasks import load_task_config
from src.retrieval.jobs.builders import instructions, metric_names
from src.retrieval.ranking.evaluate import SCORE
from src.retrieval.report.plot import FIGURE
from src.retrieval.report.training_record import WriteCards, draw_training
from src.retrieval.training.args import RetrievalTrainingArgs
from src.retrieval.training.dataset import (
    Source,
    SourceSettings,
    TrainDataset,
    TrainExample,
    check_mixable,
    load_train_sources,
)
from src.retrieval.training.scores import ScoreBatch
from src.retrieval.training.trainer import ModelT, RetrievalTrainer
from src.utils import distributed, locks
from src.utils.errors import UserError
from src.utils.files import expand_data_paths

logger = logging.getLogger(__name__)


def check_flags(args: RetrievalArgs | RankerArgs, training: RetrievalTrainingArgs) -> None:
    """Refuse flags that contradict each other, whatever the model, before anything is read."""
    if not args.train_data and not args.eval_data:
        raise UserError("nothing to do: give --train_data to train, --eval_data to evaluate, or both")
    if args.train_data and args.load_result:
        raise UserError(
            "--load_result is of no use in training, where the weights change from step to step: evaluate the trained "
            "model in a run of its own, without --train_data"
        )
    if args.train_data and SCORE in args.metrics:
        raise UserError(
            f"--metrics {SCORE} is of no use in training, where the weights change from step to step: score with the "
            "trained model in a run of its own, without --train_data"
        )
    if args.train_data and args.cpu and not training.use_cpu:
        raise UserError("--cpu is for evaluation: give --use_cpu to train on the CPU as well")
    if args.train_data and training.eval_on_start and not args.eval_data:
        raise UserError("--eval_on_start needs --eval_data to evaluate on")
    known = metric_names(args)
    best = training.metric_for_best_model
    compares = best is not None or training.save_strategy == SaveStrategy.BEST
    if args.train_data and compares and (not args.eval_data or (best or "").removeprefix("eval_") not in known):
        raise UserError(
            f"{_who_compares(training)} needs --eval_data and --metric_for_best_model, one of {', '.join(known)}; "
            f"found {best!r}"
        )


def _who_compares(training: RetrievalTrainingArgs) -> str:
    """The flag that asks for a metric to compare checkpoints by."""
    if training.load_best_model_at_end:
        return "--load_best_model_at_end"
    if training.save_strategy == SaveStrategy.BEST:
        return "--save_strategy best"
    schedule = SchedulerType(training.lr_scheduler_type).value
    by_metric = schedule in ("reduce_lr_on_plateau", "greedy")
    return f"--lr_scheduler_type {schedule}" if by_metric else "--metric_for_best_model"


def hold_checkpoints(
    args: RetrievalArgs | RankerArgs, training: RetrievalTrainingArgs
) -> contextlib.AbstractContextManager[None]:
    """Keep other trainings out of the output folder, where this is one.

    Raises:
        UserError: another one is there.
    """
    if not args.train_data or args.dry_run:
        return contextlib.nullcontext()
    return locks.hold(os.path.join(training.output_dir, FIGURE), folders=[training.output_dir])


def load_sources(args: RetrievalArgs | RankerArgs, training: RetrievalTrainingArgs) -> list[Source]:
    """The training rows of all files; none without --train_data.

    Raises:
        UserError: rows with problems, or files that cannot be trained as the flags say.
    """
    if not args.train_data:
        return []
    task_config = load_task_config(args.task_config)
    if not training.use_train_config and (settled := [name for name, task in task_config.items() if task.training]):
        raise UserError(
            f"--task_config {args.task_config}: the training settings of {settled[0]!r} are used with "
            "--use_train_config only: add that flag, or take them out of the file"
        )
    sources = load_train_sources(
        expand_data_paths(args.train_data, args.data_root, "train_data"),
        partial(SourceSettings.from_args, training, args.version, task_config=task_config),
        instructions(args),
        args.task,
        training.seed,
        args.dataset_cache_dir,
        training.teacher_score_field,
        task_config,
    )
    if training.inbatch_same_dataset is None:
        check_mixable(sources)
    if training.train_group_size == 1:
        check_comparisons(sources, training)
    return sources


def check_comparisons(sources: Sequence[Source], training: RetrievalTrainingArgs) -> None:
    """Find groups of one key whose loss is 0 whatever the weights, since there is nothing to compare it with.

    Raises:
        UserError: of the first file with such rows.
    """
    rows = sum(map(len, sources))
    for source in sources:
        loss = source.settings.loss
        batch = training.per_device_train_batch_size * distributed.world_size()
        batch = min(batch, len(source) if training.inbatch_same_dataset else rows)
        keys = batch if training.negative_cross_device else -(-batch // distributed.world_size())
        if keys < 2:
            problem = f"a query is compared with the keys of a batch, and a batch has {keys}: raise one of "
            problem += "--train_group_size and --per_device_train_batch_size (within the rows there are)"
        elif source.scored and loss.contrastive_weight == 0 and not loss.stable_distill:
            problem = "plain distillation compares the keys of one query: raise it, or give --stable_distill or "
            problem += "--contrastive_weight"
        else:
            continue
        raise UserError(f"{source.rows.path}: --train_group_size 1 leaves nothing to learn: {problem}")


def train(
    model: ModelT,
    training: RetrievalTrainingArgs,
    sources: Sequence[Source],
    collator: Callable[[Sequence[TrainExample]], dict[str, Any]],
    score_batch: ScoreBatch,
    evaluate_model: Callable[[ModelT], dict[str, float]] | None,
    arguments: Mapping[str, Any],
    write_cards: WriteCards,
    resume: str | None,
) -> None:
    """Train, with checkpoints and evaluation as the settings say.

    Args:
        model, collator, score_batch, evaluate_model: see `RetrievalTrainer`.
        training: settings.
        sources: rows of all files.
        arguments: all arguments, written into each checkpoint.
        write_cards: writes the model cards of each checkpoint.
        resume: checkpoint folder to go on from.
    """
    if evaluate_model is None:
        training.set_evaluate("no")
    if training.use_cpu and not training.bf16:
        logger.info("training on the CPU in fp32 (it has no fp16 training)")
    dataset = TrainDataset(sources, training.seed)
    trainer = RetrievalTrainer(model, training, dataset, collator, score_batch, evaluate_model, arguments, write_cards)
    trainer.train(resume_from_checkpoint=resume)
    logger.info("trained for %d steps; checkpoints are in %s", trainer.state.global_step, training.output_dir)
    if distributed.is_main():
        draw_training(trainer.state.log_history, training.output_dir)
    if trainer.state.best_model_checkpoint:
        logger.info("best checkpoint: %s", trainer.state.best_model_checkpoint)
