"""``--deepspeed data/deepspeed/stageN.json`` on two CPU processes: trains like DDP, saves, resumes, converts.

DeepSpeed compiles its shared-memory collectives at the first run (a minute); pytest's cache keeps them.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from src.retrieval.trainer import whole_checkpoints
from tests.helpers import ROOT, environment, run
from tests.training_bench import Bench, assert_equal, names, weights, write_data
from tests.workers.forked import Kill, Runs

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

STAGES = (0, 1, 2)


@pytest.fixture(scope="module")
def extensions(request) -> str:
    """Where DeepSpeed keeps what it compiles, freed of the lock that a killed compilation leaves."""
    folder = request.config.cache.mkdir(f"torch-extensions-{torch.__version__}")
    for lock in folder.rglob("lock"):
        if time.time() - lock.stat().st_mtime > 900:
            lock.unlink(missing_ok=True)
    return str(folder)


@pytest.fixture(scope="module")
def bench(tiny_bert, tmp_path_factory, extensions) -> Iterator[Bench]:
    forked = Runs(environment(TORCH_EXTENSIONS_DIR=extensions), ["deepspeed"])
    yield Bench(write_data(tmp_path_factory.mktemp("deepspeed")), tiny_bert, forked, timeout=600)
    forked.close()


@pytest.fixture(scope="module")
def uninterrupted(bench: Bench) -> dict[int, Path]:
    """Output folder of an uninterrupted run by stage."""
    folders = {}
    for stage in STAGES:
        folders[stage] = bench.folder / f"stage{stage}"
        bench.train(folders[stage], 2, None, *zero(stage))
        assert names(folders[stage]) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    return folders


def zero(stage: int) -> tuple[str, Path]:
    return ("--deepspeed", ROOT / "data" / "deepspeed" / f"stage{stage}.json")


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in nested containers and optimizer state objects, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for key in value for tensor in tensors(value[key])]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors(part)]
    return []


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """The same weights, optimizer state (a file per process for ZeRO) and schedule."""
    assert_equal(weights(one), weights(other))
    files = sorted(path.relative_to(one) for path in one.rglob("*.pt"))
    assert files == sorted(path.relative_to(other) for path in other.rglob("*.pt"))
    assert len(files) >= 2
    found = 0
    for path in files:
        a, b = (torch.load(folder / path, weights_only=False) for folder in (one, other))
        assert_equal(tensors(a), tensors(b))
        found += len(tensors(a))
    assert found > 50
    a, b = (torch.load(folder / "scheduler.pt", weights_only=True) for folder in (one, other))
    assert_equal(a, b)


def test_configurations_leave_everything_to_the_flags():
    for stage in STAGES:
        settings = json.loads(zero(stage)[1].read_text())
        assert settings["zero_optimization"]["stage"] == stage
        assert not {"optimizer", "scheduler"} & settings.keys()
        for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            assert settings[name] == "auto"


@pytest.mark.parametrize("stage", STAGES)
def test_trains_like_ddp(bench: Bench, uninterrupted: dict[int, Path], stage: int):
    for step in (2, 4, 6):
        ours = weights(uninterrupted[stage] / f"checkpoint-{step}")
        ddp = weights(bench.whole(2) / f"checkpoint-{step}")
        assert ours.keys() == ddp.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, ddp[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("stage", "kill"), [(0, Kill("optimizer", 4)), (1, Kill("state", 4, rank=1)), (2, Kill("rename", 4))]
)
def test_killed_in_a_save(bench: Bench, uninterrupted: dict[int, Path], tmp_path: Path, stage: int, kill: Kill):
    bench.train(tmp_path, 2, None, *zero(stage), kill=kill)
    assert whole_checkpoints(str(tmp_path)) == [str(tmp_path / "checkpoint-2")]
    bench.train(tmp_path, 2, None, *zero(stage), "--resume_from_checkpoint", True)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert_same_checkpoint(tmp_path / "checkpoint-6", uninterrupted[stage] / "checkpoint-6")


def test_torchrun_resumes_and_the_result_converts(
    bench: Bench, uninterrupted: dict[int, Path], tmp_path: Path, extensions: str
):
    flags = bench.flags(tmp_path, 2, None, *zero(2), "--resume_from_checkpoint", uninterrupted[2] / "checkpoint-4")
    done = run(["run_dense.py", *flags], processes=2, timeout=600, TORCH_EXTENSIONS_DIR=extensions)
    assert done.returncode == 0, done.stderr
    last = tmp_path / "checkpoint-6"
    assert_same_checkpoint(last, uninterrupted[2] / "checkpoint-6")
    model = AutoModel.from_pretrained(last / "encoder")
    saved = weights(last)
    for name, tensor in model.state_dict().items():
        if f"encoder/{name}" in saved:
            assert torch.equal(tensor, saved[f"encoder/{name}"])
    assert AutoTokenizer.from_pretrained(last / "encoder")("abc")["input_ids"]
    codes, output = bench.forked(
        "scripts/ours2st.py", ["--encoder", last / "encoder", "--output_dir", tmp_path / "converted"]
    )
    assert codes == [0], output
    assert (tmp_path / "converted" / "modules.json").is_file()


def test_best_weights(bench: Bench, tmp_path: Path):
    output = bench.train(tmp_path, 2, None, *zero(2), *bench.evaluation(), "--learning_rate", 0.02)
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert f"best checkpoint: {state['best_model_checkpoint']}" in output


def test_resuming_with_and_without_do_not_mix(bench: Bench, uninterrupted: dict[int, Path], tmp_path: Path):
    for source, more, message in (
        (uninterrupted[2], (), "it was saved with --deepspeed"),
        (bench.whole(2), zero(2), "it was saved without --deepspeed"),
    ):
        flags = bench.flags(tmp_path, 2, None, *more, "--resume_from_checkpoint", source / "checkpoint-4")
        codes, output = bench.forked("run_dense.py", flags, 2)
        assert codes == [2, 2], output
        assert message in output
        assert "Traceback" not in output
