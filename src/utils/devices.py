"""Devices and precisions."""

from __future__ import annotations

import torch

#: Precisions by the names that flags take.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def prepared(device: torch.device) -> torch.device:
    """The same device; of a GPU, without cuDNN's kernels of attention from now on in this process.

    They build a plan for every new shape of a batch, which takes longer than the batch: texts come in all lengths. What
    is left (flash, memory-efficient) needs no plans.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device
