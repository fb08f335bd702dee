"""Devices and precisions."""

from __future__ import annotations

import torch

#: Precisions by their names in flags.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def prepared(device: torch.device) -> torch.device:
    """Return `device`; if it is a GPU, disable cuDNN attention, which plans anew for every batch shape."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device
