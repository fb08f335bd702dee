"""Getting a device ready."""

from __future__ import annotations

import torch

from src.utils.devices import prepared


def test_attention_of_cudnn_is_left_out_on_gpus_only():
    """The switch is there without a GPU."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert prepared(torch.device("cpu")) == torch.device("cpu")
        assert torch.backends.cuda.cudnn_sdp_enabled()
        assert prepared(torch.device("cuda", 0)) == torch.device("cuda", 0)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
