"""What a run will take: steps, tokens, memory, sizes of indexes. Pure functions of numbers, and their presentation.

The memory of a process that trains is estimated as the sum of

- weights: 4 bytes a parameter (fp32), and 2 more under fp16 or bf16 autocast, which keeps copies of them; with ZeRO
  stage 3 or FSDP only this process's share;
- gradients: 4 bytes a trained parameter, and as much again for the buckets of several processes (DDP); with ZeRO
  stages from 2 on or FSDP only this process's share;
- optimizer: 8 bytes a trained parameter for AdamW's two moments (see `OPTIMIZER_BYTES`); with ZeRO stages from 1 on or
  FSDP only this process's share;
- activations kept for the backward pass: for each token about as many numbers as twice the outputs of all linear maps
  (the input and the output of each), plus the attention weights where they are not fused away; of 4 bytes, or of 3 on
  average under autocast. With gradient checkpointing, the input of every layer and all of one layer.

Of the activations that autograd kept on a CPU, this counted 87 to 102 % for BERT, RoBERTa, ModernBERT and Llama, 66 to
85 % for T5, GPT-2 and Qwen3. What libraries and the device itself take, some hundred MB, comes on top.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Bytes of optimizer state per trained parameter, by what ``--optim`` contains; `ADAMW_BYTES` of others.
OPTIMIZER_BYTES = {"8bit": 2, "sgd": 0, "adafactor": 0, "rmsprop": 4, "adagrad": 4, "lion": 4}
ADAMW_BYTES = 8

#: A label and what is to be said.
Line = tuple[str, str]


@dataclass(frozen=True)
class ModelSize:
    """What memory depends on.

    Attributes:
        parameters: of all weights.
        trainable: of those that are trained.
        layers: of a transformer.
        hidden: width of its states.
        linear_outputs: sum of the output widths of its linear maps, over all layers.
        kept_attention: attention weights kept per layer, token and key token; 0 where attention is fused.
    """

    parameters: int
    trainable: int
    layers: int
    hidden: int
    linear_outputs: int
    kept_attention: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes that a training process needs, by what for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def describe(self) -> str:
        """The sum and its parts in words."""
        parts = [f"{name} {human_bytes(getattr(self, name))}" for name in ("weights", "gradients", "optimizer")]
        return f"about {human_bytes(self.total)}: {', '.join(parts)}, activations {human_bytes(self.activations)}"


def step_counts(batches: int, accumulation: int, epochs: float, max_steps: int, stop: int | None) -> tuple[int, int]:
    """Optimizer steps of an epoch and of the whole run, as transformers' Trainer counts them.

    Args:
        batches: of an epoch.
        accumulation: batches of a step.
        epochs: to train for, unless `max_steps` is above 0.
        max_steps: of the schedule.
        stop: ``--early_exit_steps``.
    """
    per_epoch = max(math.ceil(batches / accumulation), 1)
    total = max_steps if max_steps > 0 else math.ceil(epochs * per_epoch)
    return per_epoch, min(total, stop or total)


def activation_bytes(size: ModelSize, tokens: int, longest: int, half: bool, checkpointing: bool) -> int:
    """Bytes of activations kept for the backward pass (see the module).

    Args:
        size: of the model.
        tokens: in memory at a time, padding included.
        longest: tokens of the longest text, of which attention weights depend.
        half: under fp16 or bf16 autocast.
        checkpointing: activations are recomputed layer by layer.
    """
    numbers = 2 * size.linear_outputs + size.layers * size.kept_attention * longest
    if checkpointing:
        numbers = size.layers * size.hidden + numbers // size.layers
    return tokens * numbers * (3 if half else 4)


def training_memory(
    size: ModelSize, activations: int, optimizer_name: str, half: bool, processes: int, divided: int = 0
) -> Memory:
    """Memory of a process that trains (see the module).

    Args:
        size: of the model.
        activations: see `activation_bytes`.
        optimizer_name: ``--optim``.
        half: under fp16 or bf16 autocast.
        processes: that train together.
        divided: over processes: the optimizer's state from 1 on, gradients from 2 on, weights from 3 on.
    """
    optimizer = size.trainable * next(
        (own for name, own in OPTIMIZER_BYTES.items() if name in optimizer_name), ADAMW_BYTES
    )
    gradients = 4 * size.trainable
    if divided == 0 and processes > 1:
        gradients *= 2
    weights = size.parameters * (6 if half else 4)
    return Memory(
        weights // processes if divided >= 3 else weights,
        gradients // processes if divided >= 2 else gradients,
        optimizer // processes if divided >= 1 else optimizer,
        activations,
    )


def human_bytes(size: float) -> str:
    """Bytes with a fitting unit."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def sample(size: int, wanted: int) -> list[int]:
    """`wanted` of so many row numbers, evenly spread; all when there are no more."""
    return [size * number // wanted for number in range(wanted)] if size > wanted else list(range(size))


def describe_tasks(names: np.ndarray, default: str | None) -> str:
    """How many rows are of each task; str ``(rows,)``, empty for those of the default."""
    found, counts = np.unique(names, return_counts=True)
    tasks: Counter[str] = Counter()
    for name, count in zip(found.tolist(), counts.tolist(), strict=True):
        tasks[name or default or "none"] += count
    return "task " + ", ".join(f"{task} {count:,}" for task, count in sorted(tasks.items()))


def render(lines: Sequence[Line]) -> str:
    """Lines for the terminal; a label that stays the same is shown once."""
    width = max(len(label) for label, _ in lines)
    shown = ["dry run: everything up to the first step was checked, nothing was written"]
    previous = ""
    for label, text in lines:
        shown.append(f"  {'' if label == previous else label:<{width}}  {text}")
        previous = label
    return "\n".join(shown)
