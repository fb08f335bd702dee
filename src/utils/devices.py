"""Devices and precisions."""

from __future__ import annotations

import torch

from src.utils.flags import DTYPE_NAMES

#: Precisions by their names in flags.
DTYPES = dict(zip(DTYPE_NAMES, (torch.float32, torch.float16, torch.bfloat16), strict=True))


def prepared(device: torch.device) -> torch.device:
    """Return `device`; if it is a GPU, disable cuDNN attention, which plans anew for every batch shape."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device
