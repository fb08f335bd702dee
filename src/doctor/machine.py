"""What this machine can do, once the packages are there: devices, engines, free room and communication."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import faiss
import psutil
import torch
from huggingface_hub import constants

from src.doctor.packages import EXTRAS, MISSING, OK, PROBLEM, Finding, installed, judge
from src.retrieval.search.bm25.anserini import find_anserini
from src.utils.devices import DTYPES
from src.utils.display import human_bytes
from src.utils.errors import UserError
from src.utils.files import check_writable
from src.utils.flags import default_data_root
from src.utils.jsonl import available_cores

#: Below this, in bytes, a line is a problem: a checkpoint of a base-size encoder with its optimizer takes over 1 GiB.
LEAST_ROOM = 2 << 30
#: Seconds that processes get to find each other.
PATIENCE = 120


def trains_in(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a step of a small layer under autocast gives finite gradients."""
    try:
        layer = torch.nn.Linear(64, 64, device=device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            output = layer(torch.ones(8, 64, device=device))
        output.float().square().mean().backward()
        # In a precision that autocast does not know it only warns.
        return layer.weight.grad is not None and bool(layer.weight.grad.isfinite().all()) and output.dtype == dtype
    except RuntimeError:
        return False


def check_devices() -> Iterator[Finding]:
    """CPU and GPUs, and in which precisions they train."""
    # --fp16 means fp32 on a CPU.
    good = [name for name in ("fp32", "bf16") if trains_in(torch.device("cpu"), DTYPES[name])]
    detail = f"{available_cores()} cores, {platform.machine()}; trains in {', '.join(good)}"
    yield judge("cpu", "fp32" in good, detail, required=True)
    if not torch.cuda.is_available():
        reason = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds none"
        yield Finding("gpu", MISSING, reason, "not required: small models train and search on a CPU")
        return
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        good = [name for name, dtype in DTYPES.items() if trains_in(device, dtype)]
        free, total = torch.cuda.mem_get_info(device)
        detail = f"{torch.cuda.get_device_name(device)}, {human_bytes(free)} of {human_bytes(total)} free"
        yield judge(f"gpu {number}", "fp32" in good, f"{detail}; trains in {', '.join(good) or 'nothing'}")


def check_engines(anserini_dir: str | None) -> Iterator[Finding]:
    """FAISS on a GPU, Anserini with its Java, and what DeepSpeed compiles with."""
    if hasattr(faiss, "StandardGpuResources"):
        count = faiss.get_num_gpus()
        yield judge("FAISS on a GPU", count > 0, f"{count} GPUs", "FAISS finds no GPU")
    else:
        advice = f"pip install -e '.[gpu]', needed for {EXTRAS['gpu']} (exact search needs no FAISS)"
        yield Finding("FAISS on a GPU", MISSING, "this FAISS was built for CPUs", advice)
    try:
        yield Finding("Anserini and Java", OK, find_anserini(anserini_dir).source)
    except UserError as error:
        advice = "needed for --bm25_backend anserini; the embedded engine ranks English alike"
        yield Finding("Anserini and Java", MISSING, str(error), advice)
    if installed("deepspeed"):
        absent = " and ".join(name for name in ("ninja", "g++") if shutil.which(name) is None)
        detail = f"{absent} not found" if absent else "ninja and g++ found"
        advice = f"install {absent}: DeepSpeed compiles operators when it first runs"
        yield judge("DeepSpeed's compiler", not absent, detail, advice, otherwise=MISSING)


def check_room(output_dir: str) -> Iterator[Finding]:
    """Free memory and disk."""
    memory = psutil.virtual_memory()
    yield room("memory", memory.available, memory.total, "--dry_run of a command estimates what it takes")
    existing = Path(output_dir).absolute()
    while not existing.exists():
        existing = existing.parent
    for name, folder in {"disk here": Path.cwd(), "disk of --output_dir": existing}.items():
        usage = shutil.disk_usage(folder)
        yield room(name, usage.free, usage.total, f"make room, or write elsewhere than {folder}")
    try:
        check_writable(output_dir, "output_dir")
        yield Finding("output_dir", OK, f"{output_dir} can be written to", required=True)
    except UserError as error:
        yield Finding("output_dir", PROBLEM, str(error), "name another folder with --output_dir", True)


def room(name: str, free: int, total: int, advice: str) -> Finding:
    """Judge free bytes."""
    return judge(name, free >= LEAST_ROOM, f"{human_bytes(free)} of {human_bytes(total)} free", advice)


def check_environment() -> Iterator[Finding]:
    """Folders of models and data."""
    cache = constants.HF_HUB_CACHE
    there = "" if os.path.isdir(cache) else " (not there yet)"
    names = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if name in os.environ]
    settings = ", ".join(f"{name}={os.environ[name]}" for name in names) or "HF_HUB_OFFLINE not set"
    offline = "models must be there already" if constants.HF_HUB_OFFLINE else "others are downloaded"
    yield Finding("model cache", OK, f"{cache}{there}; {settings}: {offline}")
    root = default_data_root()
    advice = "set LLM_EMBEDDER_DATA or give --data_root, needed for paths like llm-embedder:qa/train.json"
    yield judge("data root", os.path.isdir(root), root, advice, otherwise=MISSING)


def check_processes(processes: int, patience: float = PATIENCE) -> Finding:
    """Whether processes started by torchrun can exchange tensors."""
    name = f"{processes} processes"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", "src.doctor.gather_check"]
    advice = "torchrun needs it: see the message, firewalls between processes, and MASTER_ADDR"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        try:
            printed, errors = started.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(psutil.NoSuchProcess):
                launcher = psutil.Process(started.pid)
                for process in (launcher, *launcher.children(recursive=True)):
                    process.kill()
            return Finding(name, PROBLEM, f"did not find each other within {patience:g} seconds", advice, True)
    lines = [line for line in errors.splitlines() if "rror" in line] or ["no message"]
    detail = f"exit code {started.returncode}: {lines[0].strip()}" if started.returncode else printed.strip()
    return judge(name, started.returncode == 0, detail, advice, True)
