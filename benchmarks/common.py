"""What the benchmarks share: sides in processes of their own, repeated in turn, and a result file."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "sentence-transformers", "faiss-cpu", "faiss-gpu", "numpy")
#: What a side tells: its rate, or that and other numbers by name.
Numbers = Mapping[str, float]


def installed_versions() -> dict[str, str]:
    """Of the packages that matter here."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    """Processor, cores, memory, accelerator and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": ", ".join(sorted(models)) or platform.processor(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **installed_versions(),
    }


def shown_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments for a result file: a model's folder says nothing to others, its shape does."""
    from transformers import AutoConfig

    shown = {key: value for key, value in vars(args).items() if key not in ("side", "sides", "output")}
    if os.path.isdir(folder := shown.get("model", "")):
        config = AutoConfig.from_pretrained(folder)
        shown["model"] = f"{config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}"
    return shown


def peak_mib() -> dict[str, float]:
    """Peak memory by where it was: of the process, and of what PyTorch held on the GPU."""
    peaks = {"peak_mib": peak_process_mib()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peaks["peak_gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return peaks


def peak_process_mib() -> float:
    """Peak resident memory in MiB of this process, or of the largest that it started and waited for.

    On Linux without what the process that started this one held.
    """
    started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return max(started, int(found.group(1)) / 1024)
    return max(started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def timed(function: Callable[[], Any]) -> float:
    """Seconds that one call takes."""
    wait_for_device()
    start = time.perf_counter()
    function()
    wait_for_device()
    return time.perf_counter() - start


def wait_for_device() -> None:
    """Until a GPU has done what it was given, where one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def compare(
    module: str,
    sides: Mapping[str, Callable[[argparse.Namespace], float | Numbers]],
    parser: argparse.ArgumentParser,
    unit: str,
    ours: Sequence[str],
    result_name: Callable[[argparse.Namespace], str] | None = None,
    default: Sequence[str] | None = None,
) -> None:
    """Run every side `--repeats` times, in turn and each in a process of its own; print and save the comparison.

    Args:
        module: name of the benchmark, also of its result file.
        sides: name to a function from the arguments to a rate (more is better) on the same work, or to numbers by
            name, among them ``rate``.
        parser: the benchmark's own arguments.
        unit: of the rate.
        ours: the sides that are ours; the ratio to each of the others is shown.
        result_name: from the arguments to the name of the result file, when it is not the benchmark's.
        default: the sides that run unless others are named; all when None.
    """
    parser.add_argument("--repeats", type=int, default=3, help="times that each side runs; the median counts")
    parser.add_argument("--threads", type=int, default=1, help="threads of each side")
    parser.add_argument("--output", type=Path, help="result file; below benchmarks/results/ when left out")
    parser.add_argument("--sides", nargs="+", choices=list(sides), default=list(default or sides))
    parser.add_argument("--side", choices=list(sides), help="run one side here and print its numbers as JSON")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: at least 1")
    if str(getattr(args, "device", "cpu")).startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: there is no GPU, or this torch cannot use it")
    if args.side:
        found = sides[args.side](args)
        numbers = found if isinstance(found, Mapping) else {"rate": found}
        print(json.dumps({**peak_mib(), **numbers}))
        return
    chosen = [name for name in sides if name in args.sides]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    for _ in range(args.repeats):
        for name in chosen:
            command = [sys.executable, "-m", f"benchmarks.{module}", *sys.argv[1:], "--side", name]
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr}")
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name:<44} {runs[name][-1]['rate']:>12.1f} {unit}", flush=True)
    table = {
        name: {key: round(statistics.median(run[key] for run in each), 3) for key in each[0]}
        for name, each in runs.items()
    }
    ratios = {
        f"{mine} / {other}": round(table[mine]["rate"] / table[other]["rate"], 2)
        for mine in chosen
        for other in chosen
        if mine in ours and other not in ours
    }
    others = [key for key in next(iter(table.values())) if key != "rate"]
    print(f"\n{'median':<44} {unit:>16}" + "".join(f" {key:>14}" for key in others))
    for name, row in table.items():
        print(f"{name:<44} {row['rate']:>16.1f}" + "".join(f" {row[key]:>14.2f}" for key in others))
    for name, ratio in ratios.items():
        print(f"{name}: {ratio}")
    result = {
        "unit": unit,
        "sides": table,
        "ratios": ratios,
        "arguments": shown_arguments(args),
        "machine": machine(),
    }
    on_gpu = "_gpu" if str(getattr(args, "device", "cpu")).startswith("cuda") else ""
    path = args.output or RESULTS / f"{result_name(args) if result_name else module}{on_gpu}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"saved: {path}")
