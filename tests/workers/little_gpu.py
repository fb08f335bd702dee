"""Run an entry point with so many MiB of the GPU: python -m tests.workers.little_gpu 64 run_dense.py …"""

from __future__ import annotations

import runpy
import sys

import torch

if __name__ == "__main__":
    most = int(sys.argv[1]) * 2**20
    torch.cuda.set_per_process_memory_fraction(most / torch.cuda.get_device_properties(0).total_memory)
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
