"""What a run will take: steps, tokens, memory, sizes of indexes. Pure functions of numbers.

The memory of a process that trains is estimated as the sum of

- weights: 4 bytes a parameter (fp32), and 2 more under fp16 or bf16 autocast, which keeps copies of them; with ZeRO
  stage 3 or FSDP only this process's share. ZeRO from stage 1 on computes with 2 bytes a parameter in half precision,
  and trains fp32 copies besides: this process's share of 4 bytes a trained parameter, in fp32 too;
- gradients: 4 bytes a trained parameter, and as much again for the buckets of several processes (DDP); with ZeRO
  stages from 2 on or FSDP only this process's share;
- optimizer: 8 bytes a trained parameter for AdamW's two moments (see `OPTIMIZER_BYTES`); with ZeRO stages from 1 on or
  FSDP only this process's share;
- activations kept for the backward pass: for each token about as many numbers as twice the outputs of all linear maps
  (the input and the output of each), plus the attention weights where they are not fused away; of 4 bytes, or of 3 on
  average under autocast. With gradient checkpointing, the input of every layer and all of one layer;
- or, in place of activations where it takes more, the whole fp32 weights, 4 bytes a parameter, that ZeRO stage 3 and
  FSDP copy to evaluate.

What DeepSpeed offloads, the optimizer with the fp32 copies and the weights, counts for the memory of the CPU.

Of the activations that autograd kept on a CPU, this counted 87 to 102 % for BERT, RoBERTa, ModernBERT and Llama, 66 to
85 % for T5, GPT-2 and Qwen3. What libraries and the device itself take, some hundred MB, comes on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from src.utils.display import human_bytes

#: Bytes of optimizer state per trained parameter, by what ``--optim`` contains; `ADAMW_BYTES` of others.
OPTIMIZER_BYTES = {"8bit": 2, "sgd": 0, "adafactor": 0, "rmsprop": 4, "adagrad": 4, "lion": 4}
ADAMW_BYTES = 8


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
    evaluation: int = 0
    offloaded: int = 0

    @property
    def total(self) -> int:
        """The most at a time, without what is offloaded."""
        return self.weights + self.gradients + self.optimizer + max(self.activations, self.evaluation)

    def describe(self) -> str:
        """The sum and its parts in words."""
        names = ("weights", "gradients", "optimizer", "activations")
        parts = ", ".join(f"{name} {human_bytes(getattr(self, name))}" for name in names)
        if self.evaluation:
            parts += f" (or {human_bytes(self.evaluation)} of whole weights, to evaluate)"
        if self.offloaded:
            parts += f"; in the memory of the CPU {human_bytes(self.offloaded)}"
        return f"about {human_bytes(self.total)}: {parts}"


@dataclass(frozen=True)
class Sharing:
    """Who holds what of a training run.

    Attributes:
        processes: that train together.
        divided: over processes: the optimizer's state from 1 on, gradients from 2 on, weights from 3 on.
        fp32_copies: of weights, apart from those that are computed with (DeepSpeed from stage 1 on).
        offloaded: what lies in the memory of the CPU: ``optimizer`` (with the copies), ``weights``.
        evaluates: during training.
    """

    processes: int = 1
    divided: int = 0
    fp32_copies: bool = False
    offloaded: frozenset[str] = frozenset()
    evaluates: bool = False

    def share(self, size: int, since: int) -> int:
        """This process's part of what is divided since a stage."""
        return size // self.processes if self.divided >= since else size


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


def training_memory(size: ModelSize, activations: int, optimizer_name: str, half: bool, sharing: Sharing) -> Memory:
    """Memory of a process that trains (see the module).

    Args:
        size: of the model.
        activations: see `activation_bytes`.
        optimizer_name: ``--optim``.
        half: under fp16 or bf16 autocast.
        sharing: who holds what.
    """
    optimizer = size.trainable * next(
        (own for name, own in OPTIMIZER_BYTES.items() if name in optimizer_name), ADAMW_BYTES
    )
    gradients = 4 * size.trainable
    if sharing.divided == 0 and sharing.processes > 1:
        gradients *= 2
    if sharing.fp32_copies:
        weights, copies = size.parameters * (2 if half else 4), 4 * size.trainable
    else:
        weights, copies = size.parameters * (6 if half else 4), 0
    parts = {
        "weights": sharing.share(weights, 3),
        "copies": sharing.share(copies, 1),
        "optimizer": sharing.share(optimizer, 1),
    }
    offloaded = {"weights"} & sharing.offloaded
    if "optimizer" in sharing.offloaded:
        offloaded |= {"optimizer", "copies"}
    here = {name: 0 if name in offloaded else part for name, part in parts.items()}
    return Memory(
        here["weights"] + here["copies"],
        sharing.share(gradients, 2),
        here["optimizer"],
        activations,
        4 * size.parameters if sharing.evaluates and sharing.divided >= 3 else 0,
        sum(parts.values()) - sum(here.values()),
    )
