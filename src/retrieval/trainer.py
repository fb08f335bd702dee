"""The training loop: transformers' Trainer with our loss, sampler, evaluation and checkpoints."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy, rotate_checkpoints

from src import distributed
from src.errors import UserError
from src.io import write_json
from src.retrieval.args import RetrievalTrainingArgs
from src.retrieval.collator import TrainCollator
from src.retrieval.data import TrainDataset
from src.retrieval.losses import LossConfig, combine, group_positions, similarity
from src.retrieval.modeling_dense import DenseRetriever
from src.retrieval.sampler import POLICIES, EpochDataLoader

logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
ARGS_FILE = "args.json"
TRAINER_STATE = "trainer_state.json"


class RetrievalTrainer(Trainer):
    """Trains a dual encoder.

    Args:
        model: the dual encoder.
        args: settings.
        train_dataset: rows of all files.
        collator: examples to tensors.
        evaluate_model: the model to metrics, without prefix; None when there is nothing to evaluate on.
        saved_args: all arguments, written into each checkpoint.
        callbacks: further callbacks.
    """

    def __init__(
        self,
        model: DenseRetriever,
        args: RetrievalTrainingArgs,
        train_dataset: TrainDataset,
        collator: TrainCollator,
        evaluate_model: Callable[[DenseRetriever], dict[str, float]] | None,
        saved_args: Mapping[str, Any],
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=() if evaluate_model else None,
            callbacks=[StopCallback(args.early_exit_steps), *callbacks],
        )
        self.evaluate_model = evaluate_model
        self.saved_args = dict(saved_args)
        self.loss_configs: list[LossConfig] = [source.settings.loss for source in train_dataset.sources]
        self._parts = RunningMeans()

    def get_train_dataloader(self) -> EpochDataLoader:
        """Global batches by the chosen policy, sliced by rank here and not by accelerate."""
        args, dataset = self.args, self.train_dataset
        sampler = POLICIES[args.inbatch_same_dataset](
            dataset.sizes,
            self._train_batch_size * distributed.world_size(),
            args.data_seed if args.data_seed is not None else args.seed,
            distributed.rank(),
            distributed.world_size(),
            args.dataloader_drop_last,
        )
        return EpochDataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and not args.use_cpu,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean loss over the queries of all processes, scaled so that averaged gradients are exact."""
        config = self.loss_configs[inputs["source"]]
        queries, keys = model(query=inputs["query"], key=inputs["key"])
        batch, group = len(queries), len(keys) // len(queries)
        sizes, offset = [batch], 0
        if distributed.world_size() > 1:
            sizes = distributed.gather_sizes(batch, queries.device)
            if self.args.negative_cross_device:
                keys = distributed.gather_with_grad(keys, [size * group for size in sizes])
                offset = sum(sizes[: distributed.rank()]) * group
        scores = similarity(queries, keys, self.model.metric, config.cos_temperature)
        positions = group_positions(batch, group, offset, scores.device)
        parts = combine(scores, positions, inputs["teacher_scores"], config)
        self._parts.add("contrastive", parts.contrastive)
        self._parts.add("distillation", parts.distillation)
        self._add_similarities(scores.detach(), positions, config)
        # Processes may hold parts of different size; the average over processes must be the mean over queries.
        loss = parts.total.sum() * len(sizes) / sum(sizes)
        return (loss, (queries, keys)) if return_outputs else loss

    def _add_similarities(self, scores: Tensor, positions: Tensor, config: LossConfig) -> None:
        scale = config.cos_temperature if self.model.metric == "cos" else 1.0
        self._parts.add("positive_similarity", scores.gather(1, positions[:, :1]) * scale)
        if scores.shape[1] > 1:
            others = scores.scatter(1, positions[:, :1], -torch.inf)
            self._parts.add("hardest_negative_similarity", others.max(1).values * scale)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the loss parts since the last log to the Trainer's training log lines."""
        if "loss" in logs:
            logs = {**logs, **self._parts.pop()}
        super().log(logs, start_time)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Retrieve over the whole corpus with the present weights."""
        if self.evaluate_model is None:
            raise UserError("there is nothing to evaluate on: give --eval_data and --corpus")
        model = self.model
        was_training = model.training
        model.eval()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.evaluate_model(model).items()}
        model.train(was_training)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        self.model.save(folder, state_dict)
        write_json(os.path.join(folder, ARGS_FILE), self.saved_args)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write everything to a staging folder and rename it, so that a checkpoint-N folder is always whole."""
        final = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        staging = os.path.join(self.args.output_dir, f".checkpoint-{self.state.global_step}.partial")
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        distributed.barrier()
        self.store_flos()
        self.save_model(staging, _internal_call=True)
        if self.state.best_global_step and self.args.save_strategy != SaveStrategy.NO:
            best = os.path.join(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
            if best == final or os.path.isdir(best):
                self.state.best_model_checkpoint = best
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(staging)
            self._save_scaler(staging)
            self._save_rng_state(staging)
        if self.args.should_save:
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState):
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
            self.state.save_to_json(os.path.join(staging, TRAINER_STATE))
        distributed.barrier()
        if self.args.should_save:
            replace_folder(staging, final)
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )
        distributed.barrier()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        (model or self.model).load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        logger.info("best checkpoint: %s (%s)", self.state.best_model_checkpoint, self.state.best_metric)
        self.model.load_weights(self.state.best_model_checkpoint)


class RunningMeans:
    """Means of named values since the last `pop`; kept on the device, so that adding never waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, name: str, values: Tensor | None) -> None:
        """Add a tensor of values, any shape; None and empty tensors add nothing."""
        if values is None or values.numel() == 0:
            return
        total, count = self._sums.get(name, (torch.zeros((), device=values.device), 0))
        self._sums[name] = (total + values.sum(), count + values.numel())

    def pop(self) -> dict[str, float]:
        """Means over all processes of all values added; starts anew."""
        names = PART_NAMES
        sums = torch.zeros(len(names), 2, dtype=torch.float64)
        for number, name in enumerate(names):
            if name in self._sums:
                total, count = self._sums[name]
                sums[number] = torch.tensor([float(total), count])
        self._sums = {}
        sums = distributed.sum_over_processes(sums)
        return {name: float(total / count) for name, (total, count) in zip(names, sums, strict=True) if count > 0}


PART_NAMES = ("contrastive", "distillation", "positive_similarity", "hardest_negative_similarity")


class StopCallback(TrainerCallback):
    """Ends training early when asked to, and always saves at its end."""

    def __init__(self, early_exit_steps: int | None) -> None:
        self.early_exit_steps = early_exit_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Called by the Trainer after each optimizer step."""
        if self.early_exit_steps is not None and state.global_step >= self.early_exit_steps:
            control.should_training_stop = True
        if control.should_training_stop or state.global_step >= state.max_steps:
            control.should_save = True
        return control


def replace_folder(source: str, target: str) -> None:
    """Rename `source` to `target`, removing what stood there."""
    old = f"{target}.old"
    if os.path.isdir(target):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(source, target)
    shutil.rmtree(old, ignore_errors=True)


def whole_checkpoints(output_dir: str) -> list[str]:
    """The complete checkpoints below `output_dir`, oldest first."""
    found = []
    for entry in os.scandir(output_dir) if os.path.isdir(output_dir) else ():
        match = CHECKPOINT.fullmatch(entry.name)
        if match and entry.is_dir() and os.path.isfile(os.path.join(entry.path, TRAINER_STATE)):
            found.append((int(match[1]), entry.path))
    return [path for _, path in sorted(found)]


def checkpoint_to_resume(resume: str | None, output_dir: str) -> str | None:
    """What ``--resume_from_checkpoint`` means: a folder, the last whole checkpoint for True, or None.

    Raises:
        UserError: the folder is no whole checkpoint.
    """
    if resume is None or str(resume).lower() == "false":
        return None
    known = whole_checkpoints(output_dir)
    if str(resume).lower() == "true":
        if not known:
            logger.info("--resume_from_checkpoint: no checkpoint in %s, training starts from the beginning", output_dir)
            return None
        logger.info("resuming from %s", known[-1])
        return known[-1]
    if not os.path.isfile(os.path.join(resume, TRAINER_STATE)):
        listed = f"; whole checkpoints there: {', '.join(known)}" if known else ""
        raise UserError(f"--resume_from_checkpoint {resume}: no whole checkpoint (it has no {TRAINER_STATE}){listed}")
    return resume
