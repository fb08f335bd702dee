"""``--deepspeed data/deepspeed/stageN.json`` on two CPU processes: trains like DDP, saves, resumes, converts.

DeepSpeed compiles its shared-memory collectives at the first run (a minute); pytest's cache keeps them.
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from src.retrieval.models.checkpoint_folders import complete_checkpoints
from src.retrieval.training.sharding import zero_stage
from src.utils.errors import UserError
from tests.helpers import ROOT, environment, read_rows, run, write_rows
from tests.training_bench import Bench, assert_close, assert_equal, names, weights, write_data
from tests.workers.forked import Kill, Runs

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

STAGES = (0, 1, 2, 3)
SETTINGS = ROOT / "data" / "deepspeed"


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
    """Output folder of an uninterrupted run by stage; that of stage 3 is evaluated on the way."""
    folders = {}
    for stage in STAGES:
        folders[stage] = bench.folder / f"stage{stage}"
        more = [*bench.evaluation(), "--log_path", folders[stage] / "train.log"] if stage == 3 else []
        output = bench.train(folders[stage], 2, None, *zero(stage), *more)
        (folders[stage] / "output.txt").write_text(output)
        assert names(folders[stage]) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    return folders


def zero(name: int | str) -> tuple[str, str]:
    """The flag with our settings; weights are divided however small they are, and CPU optimizers are PyTorch's."""
    settings = json.loads((SETTINGS / f"stage{name}.json").read_text())
    if settings["zero_optimization"]["stage"] == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    # DeepSpeed's own takes minutes to compile.
    return ("--deepspeed", json.dumps({**settings, "zero_force_ds_cpu_optimizer": False}))


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


def test_settings_leave_everything_to_the_flags():
    files = sorted(SETTINGS.glob("*.json"))
    assert [path.stem for path in files] == [
        *("stage0", "stage1", "stage2", "stage2_offload", "stage3", "stage3_offload")
    ]
    for path in files:
        settings = json.loads(path.read_text())
        stage, _, offload = path.stem.partition("_")
        zero = settings["zero_optimization"]
        assert f"stage{zero['stage']}" == stage
        assert sorted(name for name in zero if name.startswith("offload_")) == (
            ["offload_optimizer", "offload_param"][: zero["stage"] - 1] if offload else []
        )
        assert not {"optimizer", "scheduler"} & settings.keys()
        for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            assert settings[name] == "auto"
        assert [settings[name]["enabled"] for name in ("fp16", "bf16")] == ["auto", "auto"]
        assert settings["gradient_clipping"] == "auto"
        assert f"stage{zero_stage(str(path))}" == stage


@pytest.mark.parametrize("stage", STAGES)
def test_trains_like_ddp(bench: Bench, uninterrupted: dict[int, Path], stage: int):
    for step in (2, 4, 6):
        assert_close(uninterrupted[stage] / f"checkpoint-{step}", bench.whole(2) / f"checkpoint-{step}")


def test_texts_without_padding_train_like_ddp(bench: Bench, tmp_path: Path):
    for name, engine in (("ddp", ()), ("zero", zero(3))):
        packed = ("--padding_free", True, "--early_exit_steps", 2)
        assert "without padding" in bench.train(tmp_path / name, 2, None, *engine, *packed)
    assert_close(tmp_path / "zero" / "checkpoint-2", tmp_path / "ddp" / "checkpoint-2")


def test_offloading_trains_like_ddp(bench: Bench, tmp_path: Path):
    bench.train(tmp_path, 2, None, *zero("3_offload"), "--early_exit_steps", 2)
    assert_close(tmp_path / "checkpoint-2", bench.whole(2) / "checkpoint-2")


def test_weights_lie_divided_between_steps(bench: Bench, tmp_path: Path):
    flags = bench.flags(tmp_path, 2, None, *zero(3), "--early_exit_steps", 1, "--save_only_model")
    codes, output = bench.forked("tests/workers/zero_watched.py", flags, 2, timeout=600)
    assert codes == [0, 0], output
    count = len(weights(tmp_path / "checkpoint-1"))
    # Two processes, two batches a step.
    assert output.count(f"ZeRO-3 has divided {count} of {count} weights") == 4


def test_adapters_train_like_ddp_with_divided_weights(bench: Bench, tmp_path: Path):
    flags = ("--lora_r", 3, "--learning_rate", 0.01, "--early_exit_steps", 2)
    bench.train(tmp_path / "ddp", 2, None, *flags)
    bench.train(tmp_path / "zero", 2, None, *flags, *zero(3))
    assert_close(tmp_path / "zero" / "checkpoint-2", tmp_path / "ddp" / "checkpoint-2")
    assert (tmp_path / "zero" / "checkpoint-2" / "adapters" / "encoder" / "adapter_config.json").is_file()


def test_ranker_trains_like_ddp_with_divided_weights(bench: Bench, tmp_path: Path):
    flags = ["--train_data", bench.folder / "a.json", "--ranker", bench.encoder, "--train_group_size", 3]
    flags += ["--query_max_length", 32, "--key_max_length", 32, "--max_steps", 2, "--learning_rate", 1e-3]
    # Rows to rerank, of which the processes have different numbers.
    keyed = [{"query": f"a{n}", "key": ["a", "b", "c"][: n + 1], "key_index": [0, 1, 2][: n + 1]} for n in range(3)]
    write_rows(tmp_path / "keyed.json", [{**row, "pos_index": [0]} for row in keyed])
    flags += ["--eval_data", tmp_path / "keyed.json", "--metrics", "mrr", "--eval_steps", 2]
    for name, more in (("ddp", ()), ("zero", zero(3))):
        line = [*flags, *more, "--output_dir", tmp_path / name, "--log_path", tmp_path / f"{name}.log"]
        codes, output = bench.forked("run_ranker.py", line, 2, timeout=600)
        assert codes == [0, 0], output
    assert_close(tmp_path / "zero" / "checkpoint-2", tmp_path / "ddp" / "checkpoint-2")
    one, two = ([each["metrics"] for each in read_rows(tmp_path / f"{name}.jsonl")] for name in ("ddp", "zero"))
    assert one == two


def test_half_precision_saves_the_weights_that_are_trained(bench: Bench, tmp_path: Path):
    bench.train(tmp_path, 2, None, *zero(3), "--bf16", "--early_exit_steps", 2)
    saved = weights(tmp_path / "checkpoint-2")
    rounded = [name for name, tensor in saved.items() if torch.equal(tensor, tensor.bfloat16().float())]
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert len(rounded) < len(saved) / 2, "what DeepSpeed computes with was saved, not what it trains"


@pytest.mark.parametrize(
    ("stage", "kill"), [(0, Kill("optimizer", 4)), (1, Kill("state", 4, rank=1)), (2, Kill("rename", 4))]
)
def test_killed_in_a_save(bench: Bench, uninterrupted: dict[int, Path], tmp_path: Path, stage: int, kill: Kill):
    bench.train(tmp_path, 2, None, *zero(stage), kill=kill)
    assert complete_checkpoints(str(tmp_path)) == [str(tmp_path / "checkpoint-2")]
    bench.train(tmp_path, 2, None, *zero(stage), "--resume_from_checkpoint", True)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert_same_checkpoint(tmp_path / "checkpoint-6", uninterrupted[stage] / "checkpoint-6")


def test_torchrun_resumes_and_the_result_converts(
    bench: Bench, uninterrupted: dict[int, Path], tmp_path: Path, extensions: str
):
    flags = bench.flags(tmp_path, 2, None, *zero(3), "--resume_from_checkpoint", uninterrupted[3] / "checkpoint-4")
    done = run(["run_dense.py", *flags], processes=2, timeout=600, TORCH_EXTENSIONS_DIR=extensions)
    assert done.returncode == 0, done.stderr
    last = tmp_path / "checkpoint-6"
    assert_same_checkpoint(last, uninterrupted[3] / "checkpoint-6")
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


def test_best_weights_and_their_metrics(bench: Bench, uninterrupted: dict[int, Path]):
    bench.assert_metrics_of_training(uninterrupted[3], (uninterrupted[3] / "output.txt").read_text())


def test_resuming_with_and_without_do_not_mix(bench: Bench, uninterrupted: dict[int, Path], tmp_path: Path):
    for source, more, message in (
        (uninterrupted[2], (), "it was saved with --deepspeed, ZeRO 1 or 2 on 2 processes"),
        (bench.whole(2), zero(2), "it was saved with neither --deepspeed nor --fsdp"),
        (
            uninterrupted[2],
            ("--deepspeed", SETTINGS / "stage3.json"),
            "and this run has --deepspeed, ZeRO 3 on 2 processes",
        ),
    ):
        flags = bench.flags(tmp_path, 2, None, *more, "--resume_from_checkpoint", source / "checkpoint-4")
        codes, output = bench.forked("run_dense.py", flags, 2)
        assert codes == [2, 2], output
        assert message in output
        assert "Traceback" not in output


def test_divided_weights_take_batches_in_one_piece(bench: Bench, tmp_path: Path):
    flags = bench.flags(tmp_path, 2, None, *zero(3), "--length_split_tokens", 64)
    codes, output = bench.forked("run_dense.py", flags, 2)
    assert (codes[0], output.count("error:")) == (2, 1), output
    assert "--length_split_tokens 64: where weights are sharded over processes" in output


def test_half_precision_needs_a_stage_that_keeps_fp32_weights(bench: Bench, tmp_path: Path):
    codes, output = bench.forked("run_dense.py", bench.flags(tmp_path, 2, None, *zero(0), "--bf16"), 2)
    assert (codes[0], output.count("error:")) == (2, 1), output
    assert "--deepspeed: ZeRO stage 0 with --bf16 keeps no fp32 weights that could be saved: use stage 1" in output


def test_divided_weights_that_are_no_numbers_are_not_saved(bench: Bench, tmp_path: Path):
    """A learning rate at the limit of fp32 spoils the weights in a step that is saved, when no loss tells yet."""
    flags = bench.flags(tmp_path, 2, None, *zero(3), "--learning_rate", "3e38", "--save_steps", 1)
    codes, output = bench.forked("run_dense.py", flags, 2, timeout=600)
    assert codes == [2, 2], output
    assert (
        "step 2: modules_by_name.encoder.backbone.embeddings.word_embeddings.weight has weights that are no" in output
    )
    assert names(tmp_path) == ["checkpoint-1"]


def test_teacher_scores_are_not_rounded_to_half_precision(bench: Bench, tmp_path: Path):
    """A softmax does not see what is added to all scores; bf16 would, whose numbers near 2000 are 8 apart."""
    losses = []
    for name, more in (("scores", 0), ("shifted", 2000)):
        folder = tmp_path / name
        shutil.copytree(bench.folder, folder, ignore=shutil.ignore_patterns("stage*", "whole*"))
        for number, file in enumerate(("a.json", "b.json")):
            rng = random.Random(number)
            rows = read_rows(folder / file)
            write_rows(
                folder / file, [row | {"teacher_scores": [more + rng.random() for _ in range(6)]} for row in rows]
            )
        distil = (
            "--contrastive_weight",
            0,
            "--teacher_temperature",
            0.1,
            "--early_exit_steps",
            1,
            "--logging_steps",
            1,
        )
        replace(bench, folder=folder).train(folder / "out", 2, None, *zero(2), "--bf16", *distil)
        state = json.loads((folder / "out" / "checkpoint-1" / "trainer_state.json").read_text())
        losses.append(state["log_history"][0]["distillation"])
    assert losses[0] > 0.1
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_settings_without_zero():
    assert zero_stage('{"zero_optimization": null}') == 0
    with pytest.raises(UserError, match="zero_optimization must hold a JSON object"):
        zero_stage('{"zero_optimization": 2}')
