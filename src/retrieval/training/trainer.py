"""The training loop: transformers' Trainer with our loss, sampler, evaluation and checkpoints."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import SCALER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import SaveStrategy, TrainOutput

from src.retrieval.models.checkpoint_folders import (
    ARGS_FILE,
    TRAINER_STATE,
    Batches,
    check_complete,
    check_steps,
    complete_checkpoints,
    read_state,
    remove_oldest,
    remove_unfinished,
    replace_folder,
)
from src.retrieval.models.trainable import TrainableModel
from src.retrieval.training.args import RetrievalTrainingArgs
from src.retrieval.training.dataset import TrainDataset, TrainExample
from src.retrieval.training.grad_cache import GradCache
from src.retrieval.training.losses import (
    MASKED,
    LossConfig,
    ScoreBatch,
    combine,
    is_positive,
    mask_false_negatives,
)
from src.retrieval.training.sampler import EpochDataLoader, GlobalBatchSampler
from src.retrieval.training.sharding import check_optimizer_state, filled, full_state, load_unsharded, meta_copy
from src.utils import distributed
from src.utils.errors import UserError, first_line, is_out_of_memory
from src.utils.files import write_json
from src.utils.manifest import record_checksums

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=TrainableModel)

TORCH_SAVE_ERROR = re.compile("inline_container|PytorchStreamWriter|iostream")
#: States of optimizers that are as large as the weights.
MOMENTS = {"exp_avg", "exp_avg_sq", "momentum_buffer"}
#: Losses in a row that are no numbers and end a run in fp16, where the loss scaler leaves out the steps of a few.
BAD_FP16_LOSSES = 16
#: Before the names of metrics in the log.
EVALUATION = "eval_"
#: What a training log line has besides the loss.
MEANS = ("contrastive", "distillation", "positive_similarity", "hardest_negative_similarity", "masked_negatives")
DIVERGED = (
    "so training stops, and earlier checkpoints stay as they are: lower --learning_rate, take --bf16 or --fp16 False "
    "in place of fp16, raise a very low temperature, or see whether the model that it began with is damaged"
)


class RetrievalTrainer(Trainer, Generic[ModelT]):
    """Trains a dual encoder or a cross-encoder, evaluated by `evaluate_model` (metrics without prefix; None for never).

    `saved_args` are written into each checkpoint, and `write_cards` writes model cards below it.
    """

    # Narrower than what transformers declares.
    args: RetrievalTrainingArgs
    model: ModelT
    train_dataset: TrainDataset

    def __init__(
        self,
        model: ModelT,
        args: RetrievalTrainingArgs,
        train_dataset: TrainDataset,
        collator: Callable[[Sequence[TrainExample]], dict[str, Any]],
        score_batch: ScoreBatch,
        evaluate_model: Callable[[ModelT], dict[str, float]] | None,
        saved_args: Mapping[str, Any],
        write_cards: Callable[[str, TrainerState], None] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=() if evaluate_model else None,
            callbacks=[StopCallback(), EarlyStopping(), *callbacks],
        )
        load_unsharded()
        self._uses_graphs = args.compilation is not None and args.compilation.uses_graphs
        if args.compilation is not None:
            model.compile_layers(args.compilation)
        self.score_batch = score_batch
        self.evaluate_model = evaluate_model
        self._on_meta = meta_copy(self.model) if evaluate_model and args.sharded == 3 else None
        self.saved_args = dict(saved_args)
        self.write_cards = write_cards
        self.loss_configs: list[LossConfig] = [source.settings.loss for source in train_dataset.sources]
        self._means = RunningMeans()
        self._bad_losses = 0
        self._saved_step: int | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **kwargs: Any) -> TrainOutput:
        """Train from the beginning, or go on from a checkpoint folder (see `checkpoint_to_resume`).

        Raise a UserError where it lacks what an exact continuation needs.
        """
        args = self.args
        if isinstance(resume_from_checkpoint, str):
            if finished := self._finished(resume_from_checkpoint):
                return finished
            check_optimizer_state(resume_from_checkpoint, args.optimizer_layout)
            check_complete(resume_from_checkpoint, distributed.rank(), distributed.world_size())
            self.model.check_reads_alike(resume_from_checkpoint)
            micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
            batches = Batches(distributed.world_size(), micro, accumulation)
            check_steps(resume_from_checkpoint, batches, {**self.saved_args, **args.to_dict()})
        elif older := complete_checkpoints(args.output_dir):
            logger.warning(
                "training starts from the beginning, but %s is there from an earlier run: "
                "--resume_from_checkpoint True would go on from it",
                older[-1],
            )
        return super().train(resume_from_checkpoint, *rest, **kwargs)

    def _finished(self, checkpoint: str) -> TrainOutput | None:
        """Return the result of a run that ended with `checkpoint`, weights loaded; None when steps are left.

        The Trainer would take one more step, and overwrite the result with what that gives.
        """
        *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        last = min(steps, self.args.early_exit_steps or steps)
        try:
            state = TrainerState(**read_state(checkpoint))
        except TypeError as error:
            raise UserError(f"{checkpoint}: its {TRAINER_STATE} is of another version ({first_line(error)})") from error
        if state.global_step < last and not EarlyStopping.is_due(self.args, state):
            return None
        logger.info("%s is the end of this run already (step %d of %d)", checkpoint, state.global_step, last)
        self.state = state
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self.model.load_weights(best or checkpoint)
        return TrainOutput(state.global_step, 0.0, {})

    def get_train_dataloader(self) -> EpochDataLoader:
        """Load global batches by the chosen policy, sliced by rank here and not by accelerate."""
        args = self.args
        return EpochDataLoader(
            self.train_dataset,
            batch_sampler=GlobalBatchSampler.from_args(args, self.train_dataset.sizes, self._train_batch_size),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and not args.use_cpu,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
        )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **kwargs: Any) -> Tensor:
        """Forward and backward over one batch, chunk by chunk when asked to (see `GradCache`)."""
        if self._uses_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        cached = GradCache(model, self.model) if self.args.grad_cache_chunk_size else None
        # The Trainer scales the loss and backpropagates it, with GradCache up to the vectors.
        loss = super().training_step(cached or model, inputs, *rest, **kwargs)
        if cached is not None:
            cached.backpropagate()
        self._check_loss(loss)
        return loss

    def _check_loss(self, loss: Tensor) -> None:
        """Stop before the optimizer takes a step by a loss that is no number.

        In fp16, where the loss scaler leaves such steps out, not before many in a row are.
        """
        # The Trainer looks at every loss itself, so that this is no further wait for the device.
        self._bad_losses = 0 if torch.isfinite(loss) else self._bad_losses + 1
        if self._bad_losses >= (BAD_FP16_LOSSES if self.args.fp16 else 1):
            raise UserError(f"step {self.state.global_step + 1}: the loss is {float(loss)}, {DIVERGED}")

    def _check_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Keep full weights that are no numbers from taking the place of good ones."""
        for name, _ in self.model.named_parameters():
            if not torch.isfinite(weights[name]).all():
                raise UserError(f"step {self.state.global_step}: {name} has weights that are no numbers, {DIVERGED}")

    def _prepare_input(self, data: Any) -> Any:
        # With DeepSpeed transformers rounds what is no whole number, thus teacher scores, to the precision of the
        # weights.
        if isinstance(data, Tensor):
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *rest: Any, **kwargs: Any
    ) -> Any:
        """Mean loss over the queries of all processes, scaled so that averaged gradients are exact."""
        config = self.loss_configs[inputs["source"]]
        batch = self.score_batch(model, inputs, config)
        compared = batch.scores
        if (margin := self.args.mask_margin) is not None:
            compared = [mask_false_negatives(scores, batch.positions, margin * batch.unit) for scores in compared]
        teacher, counts = inputs["teacher_scores"], inputs["positives"]
        parts = [combine(scores, batch.positions, teacher, config, counts) for scores in compared]
        self._means.add("contrastive", parts[0].contrastive)
        self._means.add("distillation", parts[0].distillation)
        similarities, first = batch.scores[0].detach() / batch.unit, batch.positions[:, :1]
        self._means.add("positive_similarity", similarities.gather(1, first))
        if similarities.shape[1] > 1:
            others = similarities.masked_fill(batch.scores[0] == MASKED, -torch.inf)
            positives = torch.where(is_positive(batch.positions, counts), batch.positions, first)
            hardest = others.scatter(1, positives, -torch.inf).max(1).values
            # All may be masked.
            self._means.add("hardest_negative_similarity", hardest, hardest > -torch.inf)
        if (others_keys := similarities.shape[1] - batch.positions.shape[1]) > 0:
            self._means.add("masked_negatives", (compared[0] == MASKED).sum(1) / others_keys)
        # Processes may hold parts of different size; the average over processes must be the mean over queries.
        total = torch.stack([part.total for part in parts]).mean(0)
        loss = total.sum() * distributed.world_size() / batch.queries
        return (loss, batch.scores[0]) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log to the Trainer's training log lines."""
        if "loss" in logs:
            logs = {**logs, **self._means.pop()}
        super().log(logs, start_time)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Retrieve over the whole corpus with the present weights."""
        if self.evaluate_model is None:
            raise UserError("there is nothing to evaluate on: give --eval_data and --corpus")
        was_training, device = self.model.training, self.args.device
        model = self.model.eval()
        if self._on_meta is not None:
            # Each process holds a part of the weights.
            model = filled(self._on_meta, full_state(self.model, device), device)
        # Batches of all shapes would use up what CUDA graphs are kept for.
        with torch.compiler.set_stance("force_eager" if self._uses_graphs else "default"):
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.evaluate_model(model).items()}
        # Where it is a copy, its memory is needed again.
        del model
        self.model.train(was_training)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model with full weights, whoever holds which part; every process must call this.

        Raise a UserError, on every process, where weights are no numbers.
        """
        if self.args.engine is None:
            self._check_weights(dict(self.model.named_parameters()))
            super().save_model(output_dir, _internal_call)
        else:
            state = full_state(self.model, torch.device("cpu") if self.args.should_save else None)
            distributed.on_main(lambda: self._check_weights(state))
            self._save(output_dir, state)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        self.model.save(folder, state_dict)
        write_json(os.path.join(folder, ARGS_FILE), self.saved_args)
        if self.write_cards is not None:
            self.write_cards(folder, self.state)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            # eval_steps may be smaller than save_steps, and what is not on the disk cannot be loaded at the end.
            self.control.should_save = True
        return is_best

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write everything to a staging folder and rename it, so that a checkpoint-N folder is always complete."""
        final = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        staging = os.path.join(self.args.output_dir, f".checkpoint-{self.state.global_step}.partial")
        if self.args.should_save:
            remove_unfinished(self.args.output_dir)
        distributed.barrier()
        self.store_flos()
        with _writing(staging):
            self.save_model(staging, _internal_call=True)
            if self.state.best_global_step and self.args.save_strategy != SaveStrategy.NO:
                best = os.path.join(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
                if best == final or os.path.isdir(best):
                    self.state.best_model_checkpoint = best
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(staging)
                self._save_scaler(staging)
                self._save_rng_state(staging)
            # The files of all processes come before the one that makes the checkpoint complete.
            distributed.barrier()
            if self.args.should_save:
                # The state turns the list that its constructor takes into a dictionary.
                stateful = cast("dict[str, Any]", self.state.stateful_callbacks)
                for callback in [*self.callback_handler.callbacks, self.control]:
                    if isinstance(callback, ExportableState):
                        stateful[type(callback).__name__] = callback.state()
                record_checksums(staging)
                self.state.save_to_json(os.path.join(staging, TRAINER_STATE))
        if self.args.should_save:
            replace_folder(staging, final)
            keep = {os.path.abspath(path) for path in (final, self.state.best_model_checkpoint) if path}
            remove_oldest(self.args.output_dir, self.args.save_total_limit, keep)
        self._saved_step = self.state.global_step
        distributed.barrier()

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        """Save the last step whatever the save strategy, before the Trainer loads the best model."""
        if self.state.global_step not in (self._saved_step, self._initial_global_step):
            self._save_checkpoint(self.model_wrapped, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            # The Trainer would remove the same folders, in a way that a kill could leave halves of them.
            remove_oldest(self.args.output_dir, 1, {os.path.abspath(best)})
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.args.engine is None:
            self.model.load_weights(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            if checkpoint is not None and self.args.engine is None and self.lr_scheduler is not None:
                schedule = torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True)
                # The schedule itself takes whatever it is given.
                _check_like(schedule, self.lr_scheduler.state_dict(), SCHEDULER_NAME)
            super()._load_optimizer_and_scheduler(checkpoint)
            states = self.optimizer.state if self.args.engine is None and self.optimizer is not None else {}
            for parameter, state in states.items():
                for name in MOMENTS & state.keys():
                    if state[name].shape != parameter.shape:
                        raise ValueError(f"{name} of {list(state[name].shape)} for {list(parameter.shape)} weights")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Go on without the state of the loss scaler where it is missing, damaged or of no use."""
        if checkpoint is None:
            return
        path, scaler = os.path.join(checkpoint, SCALER_NAME), self.accelerator.scaler
        if scaler is None:
            if os.path.isfile(path):
                logger.info("%s is not needed: only fp16 scales losses", path)
            return
        try:
            state = torch.load(path, weights_only=True)
            if state.keys() != scaler.state_dict().keys() or not all(0 <= value < 1e30 for value in state.values()):
                raise ValueError("no state of a loss scaler")
            scaler.load_state_dict(state)
        except Exception as error:
            # Of a damaged file torch's reader raises whatever its bytes happen to mean.
            problem = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({first_line(error)})"
            logger.warning("%s %s: losses are scaled as at the beginning, which adapts in some steps", path, problem)

    def _load_best_model(self) -> None:
        logger.info("best checkpoint: %s (%s)", self.state.best_model_checkpoint, self.state.best_metric)
        if self.args.engine is not None:
            super()._load_best_model()
        elif self.state.best_model_checkpoint is not None:
            self.model.load_weights(self.state.best_model_checkpoint)


@contextlib.contextmanager
def _writing(folder: str) -> Iterator[None]:
    """Say in one line why a checkpoint cannot be written, and leave nothing of it: it may have filled the disk."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # What torch.save raises when the disk is full says nothing of disks.
        if isinstance(error, RuntimeError) and not TORCH_SAVE_ERROR.search(str(error)):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"{folder} cannot be written: is the disk full? ({first_line(error)}) Make room or lower "
            "--save_total_limit, and go on with --resume_from_checkpoint True"
        ) from error


@contextlib.contextmanager
def _reading(folder: str | None) -> Iterator[None]:
    """Say in one line why a checkpoint's optimizer or random state cannot be loaded; of pickles only numbers are."""
    try:
        yield
    except Exception as error:
        # Of a damaged file torch's reader raises whatever its bytes happen to mean, an OSError about no file too.
        if isinstance(error, UserError) or getattr(error, "filename", None) is not None or is_out_of_memory(error):
            raise
        raise UserError(
            f"--resume_from_checkpoint {folder}: the state of the optimizer or of the random numbers is damaged, of "
            f"another kind of run, or holds more than numbers ({first_line(error)}): resume from another checkpoint"
        ) from error


def _check_like(value: Any, like: Any, place: str) -> None:
    """Raise a ValueError where a value has no number, list or object and another has one."""
    if isinstance(like, int | float) and not isinstance(like, bool):
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    elif isinstance(like, list):
        fits = isinstance(value, list) and len(value) == len(like)
    else:
        fits = not isinstance(like, dict) or (isinstance(value, dict) and value.keys() >= like.keys())
    if not fits:
        raise ValueError(f"{place} is {str(value)[:100]!r}")
    for name in like if isinstance(like, dict) else range(len(like)) if isinstance(like, list) else ():
        _check_like(value[name], like[name], f"{place}: {name}")


class RunningMeans:
    """Means of named values since the last `pop`; kept on the device, so that adding never waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | float, Tensor | int]] = {}

    def add(self, name: str, values: Tensor | None, counted: Tensor | None = None) -> None:
        """Add a tensor of values, any shape, to one of `MEANS`, or those `counted`; None and empty ones add nothing."""
        if values is not None and values.numel() > 0:
            total, count = self._sums.get(name, (0.0, 0))
            if counted is not None:
                values = values.where(counted, 0)
            self._sums[name] = (total + values.sum(), count + (values.numel() if counted is None else counted.sum()))

    def pop(self) -> dict[str, float]:
        """Return the means over all processes of all values added, and start anew."""
        sums = [[float(number) for number in self._sums.get(name, (0.0, 0))] for name in MEANS]
        self._sums = {}
        totals = np.sum(distributed.all_gather_object(sums), axis=0).tolist()
        return {name: total / count for name, (total, count) in zip(MEANS, totals, strict=True) if count > 0}


class StopCallback(TrainerCallback):
    """Ends training after --early_exit_steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop: the Trainer calls this after each optimizer step."""
        if args.early_exit_steps is not None and state.global_step >= args.early_exit_steps:
            control.should_training_stop = True
        return control


class EarlyStopping(TrainerCallback):
    """Ends training after --early_stopping_patience evaluations that are no better than the best before them.

    What counts is in the log of the state, so that a continued run ends where an uninterrupted one does. The evaluation
    before the first step does not count: no checkpoint has that model.
    """

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop: the Trainer calls this once the metrics are logged."""
        control.should_training_stop |= self.is_due(args, state)
        return control

    @staticmethod
    def is_due(args: RetrievalTrainingArgs, state: TrainerState) -> bool:
        """Whether the last evaluations in the log are too many without a gain."""
        if args.early_stopping_patience is None or args.metric_for_best_model is None:
            return False
        name = f"{EVALUATION}{args.metric_for_best_model.removeprefix(EVALUATION)}"
        values = [entry[name] for entry in state.log_history if name in entry and entry["step"] > 0]
        sign = 1 if args.greater_is_better else -1
        waited = evaluations_without_gain([sign * value for value in values], args.early_stopping_threshold)
        return waited >= args.early_stopping_patience


def evaluations_without_gain(values: Sequence[float], threshold: float) -> int:
    """Count the last metrics, higher is better, that exceed the best before them by no more than `threshold`."""
    count, best = 0, -math.inf
    for value in values:
        count = 0 if value - best > threshold else count + 1
        best = max(best, value)
    return count
