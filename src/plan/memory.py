"""Steps of a training run, and the memory of a process, estimated as the sum of

- weights: 4 bytes a parameter (fp32), and 2 more under fp16 or bf16 autocast, which keeps copies of them. ZeRO from
  stage 1 on computes with 2 bytes a parameter in half precision and trains fp32 copies besides, 4 bytes a trained
  parameter, in fp32 too;
- or, of weights in 4 bits, 33 bytes of 64 parameters (QLoRA, arXiv 2305.14314: 4.127 bits each);
- gradients: 4 bytes a trained parameter, and as much again for the buckets of several processes (DDP);
- optimizer: 8 bytes a trained parameter for AdamW's two moments (see `OPTIMIZER_BYTES`);
- activations kept for the backward pass: for each token about as many numbers as twice the outputs of all linear maps
  (the input and the output of each), plus the attention weights where they are not fused away; of 4 bytes, or of 3 on
  average under autocast. With gradient checkpointing, the input of every layer and all of one layer;
- or, in place of activations where it takes more, all fp32 weights, 4 bytes a parameter, which ZeRO stage 3 and FSDP
  gather to evaluate.

Optimizer and fp32 copies are sharded from ZeRO stage 1 on, gradients from 2 on, weights from 3 on; FSDP shards all.
What DeepSpeed offloads, the optimizer with the fp32 copies and the weights, counts for the memory of the CPU.

Of the activations that autograd kept on a CPU, this counted 87 to 102 % for BERT, RoBERTa, ModernBERT and Llama, 66 to
85 % for T5, GPT-2 and Qwen3. What libraries and the device itself take, some hundred MB, comes on top.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from src.utils.display import human_bytes

#: Bytes of optimizer state per trained parameter, by what ``--optim`` contains; `ADAMW_BYTES` of others.
OPTIMIZER_BYTES = {"8bit": 2, "sgd": 0, "adafactor": 0, "rmsprop": 4, "adagrad": 4, "lion": 4}
ADAMW_BYTES = 8


@dataclass(frozen=True)
class ModelSize:
    """The numbers that memory depends on.

    Attributes:
        linear_outputs: sum of the output widths of the linear maps of all layers.
        kept_attention: attention weights kept per layer, token and key token; 0 where attention is fused.
        four_bit: parameters that are held in 4 bits.
    """

    parameters: int
    trainable: int
    layers: int
    hidden: int
    linear_outputs: int
    kept_attention: int = 0
    four_bit: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes that a training process needs; `evaluation` in place of activations, `offloaded` on the CPU."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    evaluation: int = 0
    offloaded: int = 0

    def describe(self) -> str:
        """The peak and its parts in words."""
        total = self.weights + self.gradients + self.optimizer + max(self.activations, self.evaluation)
        names = ("weights", "gradients", "optimizer", "activations")
        parts = ", ".join(f"{name} {human_bytes(getattr(self, name))}" for name in names)
        if self.evaluation:
            parts += f" (or {human_bytes(self.evaluation)} of gathered weights, to evaluate)"
        if self.offloaded:
            parts += f"; in the memory of the CPU {human_bytes(self.offloaded)}"
        return f"about {human_bytes(total)}: {parts}"


def step_counts(batches: int, accumulation: int, epochs: float, max_steps: int, stop: int | None) -> tuple[int, int]:
    """Optimizer steps of an epoch of `batches` and of the run, as transformers' Trainer counts them.

    A run has `max_steps` when these are above 0, else `epochs`; it ends at the step `stop` if there is one.
    """
    per_epoch = max(math.ceil(batches / accumulation), 1)
    total = max_steps if max_steps > 0 else math.ceil(epochs * per_epoch)
    return per_epoch, min(total, stop or total)


def activation_bytes(size: ModelSize, tokens: int, longest: int, half: bool, checkpointing: bool) -> int:
    """Bytes of activations kept for the backward pass of `tokens`, padding included (see the module).

    Attention weights grow with the `longest` text; `half` means autocast.
    """
    numbers = 2 * size.linear_outputs + size.layers * size.kept_attention * longest
    if checkpointing:
        numbers = size.layers * size.hidden + numbers // size.layers
    return tokens * numbers * (3 if half else 4)


def training_memory(
    size: ModelSize,
    activations: int,
    optimizer_name: str,
    half: bool,
    *,
    processes: int = 1,
    sharded: int = 0,
    fp32_copies: bool = False,
    offloaded: Collection[str] = (),
    evaluates: bool = False,
) -> Memory:
    """Memory of one of the `processes` that train together (see the module).

    Args:
        size, activations, half: see `activation_bytes`.
        optimizer_name: ``--optim``.
        sharded: the stage of ZeRO, 3 for FSDP, 0 for neither.
        fp32_copies: the weights that are trained are not those that are computed with (DeepSpeed from stage 1 on).
        offloaded: of ``optimizer`` (with the copies) and ``weights``.
        evaluates: during training.
    """

    def share(number: int, stage: int) -> int:
        return number // processes if sharded >= stage else number

    each = next((number for name, number in OPTIMIZER_BYTES.items() if name in optimizer_name), ADAMW_BYTES)
    optimizer = share(each * size.trainable, 1)
    copies = share(4 * size.trainable, 1) if fp32_copies else 0
    whole = size.parameters - size.four_bit
    weights = share(whole * ((2 if fp32_copies else 6) if half else 4), 3) + size.four_bit * 33 // 64
    gradients = share(4 * size.trainable * (2 if processes > 1 and not sharded else 1), 2)
    gathered = 4 * size.parameters if evaluates and sharded >= 3 else 0
    on_cpu = 0
    if "weights" in offloaded:
        on_cpu, weights = weights, 0
    if "optimizer" in offloaded:
        on_cpu, optimizer, copies = on_cpu + optimizer + copies, 0, 0
    return Memory(weights + copies, gradients, optimizer, activations, gathered, on_cpu)
