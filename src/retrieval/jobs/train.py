"""Shared by the training commands: check flags, load rows and the model, then train, evaluate or plan."""

from __future__ import annotations

import contextlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from transformers import set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from src.plan.retrieval import evaluation_lines, training_lines
from src.retrieval.args import RankerArgs, RetrievalArgs
from src.retrieval.data.columns import Columns
from src.retrieval.data.corpus import EvalData
from src.retrieval.data.tasks import load_task_config
from src.retrieval.jobs.evaluate import (
    check_outputs,
    evaluate,
    load_eval_data,
    log_file,
    record,
    shown,
)
from src.retrieval.jobs.instructions import instructions, say_instructions
from src.retrieval.models.checkpoint_folders import checkpoint_to_resume
from src.retrieval.models.packing import Packer, packs
from src.retrieval.models.pair_scorer import PairScorer
from src.retrieval.models.trainable import TrainableModel
from src.retrieval.ranking.config import SCORE, EvalConfig, metric_names
from src.retrieval.ranking.eval_sets import FLAGS as EVAL_SET_FLAGS
from src.retrieval.ranking.eval_sets import flags_by_set, means, metric_names_of, named_metrics
from src.retrieval.ranking.evaluate import hold_outputs, written
from src.retrieval.ranking.files import Hits
from src.retrieval.report.plot import FIGURE
from src.retrieval.report.training_record import Uses, card_writer, draw_training, remove_figure
from src.retrieval.training.args import RetrievalTrainingArgs
from src.retrieval.training.collator import Collator
from src.retrieval.training.dataset import (
    Source,
    SourceSettings,
    TrainDataset,
    check_mixable,
    load_train_sources,
    used_instructions,
)
from src.retrieval.training.losses import ScoreBatch
from src.retrieval.training.trainer import RetrievalTrainer
from src.utils import distributed, locks
from src.utils.cli import show_plan
from src.utils.devices import prepared
from src.utils.display import Line
from src.utils.errors import UserError
from src.utils.files import expand_data_paths

logger = logging.getLogger(__name__)

#: Flags for models that stay as they are.
ONLY_FIXED_WEIGHTS = ("load_result", "load_encode", "load_index", "save_encode", "save_index")

ArgsT = TypeVar("ArgsT", RetrievalArgs, RankerArgs)
ModelT = TypeVar("ModelT", bound=TrainableModel)
#: The rows to evaluate on, and what to compute of them.
EvalSet = tuple[EvalData, EvalConfig]


@dataclass(frozen=True)
class Job(ABC, Generic[ArgsT, ModelT]):
    """Train or evaluate a model; subclasses are for dual encoders and cross-encoders."""

    args: ArgsT
    training: RetrievalTrainingArgs
    #: Names of the flags that the command line set.
    given: frozenset[str]

    @property
    def reranks(self) -> bool:
        """Whether an evaluation orders each row's keys, in place of retrieving from the corpus."""
        return self.training.eval_method == "rerank"

    def packers(self, *packers: Packer | None) -> list[Packer | None]:
        """Of a model's packers those to train with: all or none."""
        training = self.training
        if not packs(self.args.padding_free, training.device, training.fp16 or training.bf16):
            return [None] * len(packers)
        filled = training.compilation is not None and training.compilation.uses_graphs and not self.args.dry_run
        trained_with: list[Packer | None] = [packer and replace(packer, filled=filled) for packer in packers]
        return [None] * len(packers) if None in packers else trained_with

    def check_flags(self) -> None:
        """Refuse flags that contradict each other, before anything is read."""
        check_flags(self.args, self.training)

    @abstractmethod
    def load(self, trains: bool) -> ModelT:
        """Load the model; one that `trains` may get new layers."""

    @abstractmethod
    def collator(self, model: ModelT) -> Collator:
        """Return what turns training examples into token tensors."""

    @abstractmethod
    def score_batch(self, model: ModelT) -> ScoreBatch:
        """Return what turns token tensors into the scores that the losses compare."""

    @abstractmethod
    def uses(self, model: ModelT) -> Uses:
        """Describe each saved model for its card."""

    @abstractmethod
    def scorer(self, model: ModelT, device: torch.device) -> PairScorer:
        """Return what scores pairs; `model` is in eval mode on `device`."""

    @abstractmethod
    def hits(self, model: ModelT, data: EvalData, config: EvalConfig, device: torch.device) -> Iterable[Hits]:
        """Return the hits of all rows; `model` is in eval mode on `device`."""

    def arguments(self, model: ModelT) -> dict[str, Any]:
        """All arguments, as checkpoints and the log keep them."""
        return {**asdict(self.args), **self.training.to_dict()}

    def run(self) -> None:
        """Check, keep other runs away, and train, evaluate or plan."""
        args, training = self.args, self.training
        self.check_flags()
        for each in flags_by_set(args, training.eval_sets).values() or [args]:
            distributed.on_main(partial(check_outputs, each, training.output_dir, training.log_path))
        folders = [training.output_dir] if args.train_data and not args.dry_run else []
        with locks.hold(*(os.path.join(folder, FIGURE) for folder in folders), folders=folders):
            self._run()

    def _run(self) -> None:
        args, training = self.args, self.training
        device = prepared(torch.device("cpu") if args.cpu else training.device)
        sets = self._load_sets()
        sources = load_sources(args, training, self.given)
        used = say_instructions(args, [data for data, _ in sets.values()], sources)
        resume = distributed.on_main(
            partial(checkpoint_to_resume, training.resume_from_checkpoint, training.output_dir)
        )
        set_seed(training.seed)
        model = self.load(trains=bool(sources))
        if sources:
            model.instructions = used_instructions(sources)
        if sources and training.dropout is not None:
            model.set_dropout(training.dropout)
        if args.dry_run:
            lines: list[Line] = [("instruction", text) for text in used]
            if sources:
                lines += training_lines(model, training, sources, self.collator(model), resume, bool(sets))
            for data, config in sets.values():
                lines += evaluation_lines(data, config, device, model)
            show_plan(lines)
            return
        evaluate_model = None
        if sets:
            evaluate_model = partial(self._evaluate, sets, device, self.arguments(model))
        with contextlib.ExitStack() as stack:
            for data, config in sets.values():
                stack.enter_context(hold_outputs(data, config))
            if sources:
                self._train(model, sources, evaluate_model, resume)
            elif evaluate_model is not None:
                evaluate_model(model.ready(device, args.dtype))

    def _load_sets(self) -> dict[str, EvalSet]:
        """Open and check the rows and corpus of each evaluation, by name (see `flags_by_set`)."""
        training, sets, writers = self.training, {}, dict[str, str]()
        for name, args in flags_by_set(self.args, training.eval_sets).items():
            folder = os.path.join(training.output_dir, "eval", name) if name else training.output_dir
            config = EvalConfig(args, output_dir=folder, seed=training.seed, rerank=self.reranks)
            data = load_eval_data(args, config)
            assert data is not None
            sets[name] = (data, config)
            for path in written(data, config):
                if other := writers.get(path):
                    raise UserError(
                        f"--eval_sets {training.eval_sets}: {other} and {name} would both write {path}: give "
                        "--save_to_output, which has a folder for each"
                    )
                writers[path] = name
        return sets

    def _evaluate(
        self, sets: Mapping[str, EvalSet], device: torch.device, arguments: Mapping[str, Any], model: ModelT
    ) -> dict[str, float]:
        """Return the metrics of `model`, which is in eval mode on `device`, and log them."""
        metrics = {}
        for name, (data, config) in sets.items():
            if name:
                logger.info("evaluation set %s: %s", name, data.rows.path)
            score, hits = partial(self.scorer, model, device), partial(self.hits, model, data, config, device)
            metrics[name] = evaluate(data, config, score, hits)
            of_set = {flag: getattr(config.args, flag) for flag in EVAL_SET_FLAGS}
            record(metrics[name], log_file(config.args, self.training.log_path), {**arguments, **of_set})
        if len(sets) > 1 and distributed.is_main():
            logger.info("mean over %d sets: %s", len(sets), shown(means(metrics)))
        return named_metrics(metrics)

    def _train(
        self,
        model: ModelT,
        sources: Sequence[Source],
        evaluate_model: Callable[[ModelT], dict[str, float]] | None,
        resume: str | None,
    ) -> None:
        """Train, with checkpoints and evaluation as the settings say; go on from the checkpoint `resume`."""
        training, arguments = self.training, self.arguments(model)
        if evaluate_model is None:
            training.set_evaluate("no")
        if training.eval_on_start is None:
            training.eval_on_start = training.eval_strategy != IntervalStrategy.NO and not training.eval_delay
        if resume is not None:
            # Its log has that evaluation, and a second one would count as one of its step.
            training.eval_on_start = False
        if training.use_cpu and not training.bf16:
            logger.info("training on the CPU in fp32 (it has no fp16 training)")
        trainer = RetrievalTrainer(
            model=model,
            args=training,
            train_dataset=TrainDataset(sources, training.seed),
            collator=self.collator(model),
            score_batch=self.score_batch(model),
            evaluate_model=evaluate_model,
            saved_args=arguments,
            write_cards=card_writer(self.uses(model), self.args, training, sources, self.given, arguments),
        )
        if resume is None and distributed.is_main():
            remove_figure(training.output_dir)
        trainer.train(resume_from_checkpoint=resume)
        logger.info("trained for %d steps; checkpoints are in %s", trainer.state.global_step, training.output_dir)
        if distributed.is_main():
            draw_training(trainer.state.log_history, training.output_dir)
        if trainer.state.best_model_checkpoint:
            logger.info("best checkpoint: %s", trainer.state.best_model_checkpoint)


def check_flags(args: RetrievalArgs | RankerArgs, training: RetrievalTrainingArgs) -> None:
    """Refuse flags that contradict each other, whatever the model, before anything is read."""
    sets = flags_by_set(args, training.eval_sets)
    if not args.train_data and not sets:
        raise UserError("nothing to do: give --train_data to train, --eval_data to evaluate, or both")
    unused = [f"--{flag}" for flag in ONLY_FIXED_WEIGHTS if getattr(args, flag, False)]
    unused += [f"--metrics {SCORE}"] if SCORE in args.metrics else []
    if args.train_data and unused:
        raise UserError(
            f"{unused[0]} is of no use in training, where the weights change from step to step: give it in a run "
            "of its own, of the trained model, without --train_data"
        )
    if args.train_data and args.cpu and not training.use_cpu:
        raise UserError("--cpu is for evaluation: give --use_cpu to train on the CPU as well")
    if args.train_data and training.eval_on_start and not sets:
        raise UserError("--eval_on_start needs --eval_data or --eval_sets to evaluate on")
    known = metric_names_of(sets)
    best = training.metric_for_best_model
    stops = training.early_stopping_patience is not None
    compares = best is not None or training.save_strategy == SaveStrategy.BEST or stops
    if args.train_data and compares and (best or "").removeprefix("eval_") not in known:
        names = ", ".join(known) or ", ".join(metric_names(args))
        raise UserError(
            f"{_who_compares(training)} needs --eval_data or --eval_sets, and --metric_for_best_model, one of {names}; "
            f"found {best!r}"
        )
    if args.train_data and stops and training.eval_strategy == IntervalStrategy.NO:
        raise UserError("--early_stopping_patience needs evaluations: give --eval_strategy steps or epoch")


def _who_compares(training: RetrievalTrainingArgs) -> str:
    """The flag that asks for a metric to compare checkpoints by."""
    if training.load_best_model_at_end:
        return "--load_best_model_at_end"
    if training.save_strategy == SaveStrategy.BEST:
        return "--save_strategy best"
    if training.early_stopping_patience is not None:
        return "--early_stopping_patience"
    schedule = SchedulerType(training.lr_scheduler_type).value
    by_metric = schedule in ("reduce_lr_on_plateau", "greedy")
    return f"--lr_scheduler_type {schedule}" if by_metric else "--metric_for_best_model"


def load_sources(
    args: RetrievalArgs | RankerArgs, training: RetrievalTrainingArgs, given: Collection[str]
) -> list[Source]:
    """The training rows of all files, none without --train_data; a UserError if the flags cannot train on them.

    `given` are the names of the flags that the command line set.
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
        Columns.parse(args.columns),
        fits_groups="train_group_size" not in given,
        mixes_files=training.inbatch_same_dataset is None,
    )
    if training.inbatch_same_dataset is None:
        check_mixable(sources)
    sizes = {source.settings.selection.train_group_size for source in sources}
    if len(sizes) == 1:
        # What is saved of the settings says what was trained.
        (training.train_group_size,) = sizes
    alone = [source for source in sources if source.settings.selection.train_group_size == 1]
    if alone and isinstance(args, RankerArgs):
        raise UserError(
            f"{alone[0].rows.path}: no row has a negative, and a ranker learns by comparing a query's keys: mine some "
            "(evaluation.eval_retrieval with --metrics collate_neg)"
        )
    check_comparisons(alone, training, sum(map(len, sources)))
    return sources


def check_comparisons(sources: Sequence[Source], training: RetrievalTrainingArgs, rows: int) -> None:
    """Raise a UserError for a file whose groups of one key have nothing to compare it with, so that the loss is 0.

    `rows` are those of all files.
    """
    for source in sources:
        loss = source.settings.loss
        batch = training.per_device_train_batch_size * distributed.world_size()
        batch = min(batch, len(source) if training.inbatch_same_dataset else rows)
        keys = batch if training.negative_cross_device else -(-batch // distributed.world_size())
        if not loss.in_batch:
            problem = "without keys of the batch (in_batch) a query is compared with its own alone: raise it"
        elif keys < 2:
            problem = f"a query is compared with the keys of a batch, and a batch has {keys}: raise one of "
            problem += "--train_group_size and --per_device_train_batch_size (within the rows there are)"
        elif source.scored and loss.contrastive_weight == 0 and not loss.stable_distill:
            problem = "plain distillation compares the keys of one query: raise it, or give --stable_distill or "
            problem += "--contrastive_weight"
        else:
            continue
        raise UserError(f"{source.rows.path}: --train_group_size 1 leaves nothing to learn: {problem}")
