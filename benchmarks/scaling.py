"""Training on one and on two processes: queries per second of all together, each process with the same share.

python -m benchmarks.scaling --model FOLDER_OR_HUB_NAME          # two CPU cores, one thread each
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from functools import partial

from benchmarks.common import ROOT, compare
from benchmarks.train import SETTINGS, make_rows, our_flags


def measure(args: argparse.Namespace, processes: int) -> float:
    """Queries per second of the steps after the first one.

    By the trainer's own clock, of which what a run of a single step takes is none of theirs: its step, and the saving.
    """
    first, all_steps = (training_seconds(args, processes, steps) for steps in (1, 1 + args.steps))
    return SETTINGS["full"].batch * args.steps * processes / (all_steps - first)


def training_seconds(args: argparse.Namespace, processes: int, steps: int) -> float:
    """What a training run says that it took."""
    args = argparse.Namespace(**{**vars(args), "workers": 0, "steps": steps})
    setting = SETTINGS["full"]
    rows = make_rows(setting, setting.batch * args.steps * processes, args.model)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += ["run_dense.py", *our_flags(args, setting, rows, folder)]
        env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    found = re.search(r"'train_runtime': '?([\d.]+)", done.stdout)
    if done.returncode or not found:
        sys.exit(f"{processes} processes failed:\n{done.stderr}")
    return float(found.group(1))


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="encoder: a folder or hub name")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps that count")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast (fp32 without)")
    sides = {f"{n} process{'es' * (n > 1)}": partial(measure, processes=n) for n in (2, 1)}
    compare("scaling", sides, parser, "queries/s", ["2 processes"])


if __name__ == "__main__":
    main()
