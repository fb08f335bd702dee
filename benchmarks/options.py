"""What PyTorch's switches give in training: one encoder, passages of 128 tokens, one change at a time.

python -m benchmarks.options --model FOLDER_OR_HUB_NAME
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from transformers import AutoModel

from benchmarks.common import compare
from src.utils.devices import prepared

DEFAULT = "default (sdpa attention, fused AdamW, fp32)"
TEXTS, TOKENS = 32, 128
#: Name of a side to what it changes.
CHANGES = {
    DEFAULT: {},
    "eager attention": {"attention": "eager"},
    "AdamW, not fused": {"fused": False},
    "bf16 autocast": {"bf16": True},
    "torch.compile (compilation not counted)": {"compiled": True},
}


def measure(
    args: argparse.Namespace, attention: str = "sdpa", fused: bool = True, bf16: bool = False, compiled: bool = False
) -> float:
    """Passages per second of processor time (on a GPU: of time), forward, backward and optimizer."""
    torch.set_num_threads(args.threads)
    model = AutoModel.from_pretrained(args.model, attn_implementation=attention).to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-6, fused=fused)
    forward = torch.compile(model) if compiled else model
    prepared(torch.device(args.device))
    ids = torch.randint(1000, 20000, (TEXTS, TOKENS), device=args.device)
    mask = torch.ones_like(ids)

    def step() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
            states = forward(input_ids=ids, attention_mask=mask).last_hidden_state
        states.float().mean(1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    on_gpu = ids.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    step()
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    for _ in range(args.steps):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    return args.steps * TEXTS / (clock() - start)


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="encoder: a folder or hub name")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    compare(
        "options", {name: partial(measure, **own) for name, own in CHANGES.items()}, parser, "passages/s", [DEFAULT]
    )


if __name__ == "__main__":
    main()
