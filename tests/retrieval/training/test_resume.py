"""Checkpoints: a run that was killed and resumed ends exactly where an uninterrupted one does.

Every run is a ``run_dense.py`` process (or two) of its own, dropout on, with gradient accumulation; a kill is a
SIGKILL that the process sends itself at a chosen point, see `tests.workers.forked`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import run_dense
from src.retrieval.jobs import train
from src.retrieval.models import checkpoint_folders
from src.retrieval.models.checkpoint_folders import (
    check_complete,
    checkpoint_to_resume,
    complete_checkpoints,
    remove_oldest,
)
from src.retrieval.models.dense import EncoderConfig, load_dense_retriever
from src.retrieval.training.sampler import GlobalBatchSampler
from src.retrieval.training.sharding import check_optimizer_state, optimizer_layout
from src.retrieval.training.trainer import RetrievalTrainer
from src.utils.errors import UserError
from src.utils.manifest import CHECKSUMS
from tests.faults.checkpoints import damages, write_damaged
from tests.helpers import environment, run
from tests.training_bench import LAST, Bench, assert_same_checkpoint, names, weights, write_data
from tests.workers.forked import Kill, Runs

SETTINGS = [(1, None), (2, None), (1, "epoch"), (2, "epoch")]


@pytest.fixture(scope="module")
def bench(tiny_bert, tmp_path_factory) -> Iterator[Bench]:
    forked = Runs(environment())
    yield Bench(write_data(tmp_path_factory.mktemp("resume")), tiny_bert, forked)
    forked.close()


@pytest.mark.parametrize(("processes", "policy"), SETTINGS)
def test_killed_within_an_epoch(bench: Bench, tmp_path: Path, processes: int, policy: str | None):
    bench.train(tmp_path, processes, policy, kill=Kill("training", 3, rank=processes - 1))
    assert names(tmp_path) == ["checkpoint-2"]
    output = bench.train(tmp_path, processes, policy, "--resume_from_checkpoint", True)
    assert f"resuming from {tmp_path}/checkpoint-2" in output
    for step in range(4, LAST[policy] + 1, 2):
        assert_same_checkpoint(tmp_path / f"checkpoint-{step}", bench.whole(processes, policy) / f"checkpoint-{step}")


@pytest.mark.parametrize(
    ("point", "processes", "policy", "rank"),
    [
        ("weights", 1, None, 0),
        ("encoder", 2, "epoch", 0),
        ("optimizer", 1, "epoch", 0),
        ("optimizer", 2, None, 0),
        ("state", 2, "epoch", 1),
        ("rename", 1, None, 0),
        ("rename", 2, None, 0),
    ],
)
def test_killed_in_a_save(bench: Bench, tmp_path: Path, point: str, processes: int, policy: str | None, rank: int):
    bench.train(tmp_path, processes, policy, kill=Kill(point, 4, rank))
    assert names(tmp_path) == ["checkpoint-2", ".checkpoint-4.partial"]
    assert complete_checkpoints(str(tmp_path)) == [str(tmp_path / "checkpoint-2")]
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint_to_resume(str(tmp_path / ".checkpoint-4.partial"), str(tmp_path))
    output = bench.train(tmp_path, processes, policy, "--resume_from_checkpoint", True)
    assert f"resuming from {tmp_path}/checkpoint-2" in output
    assert names(tmp_path) == names(bench.whole(processes, policy))
    last = f"checkpoint-{LAST[policy]}"
    assert_same_checkpoint(tmp_path / last, bench.whole(processes, policy) / last)


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_while_an_old_checkpoint_is_removed(bench: Bench, tmp_path: Path, processes: int):
    limit = ("--save_total_limit", 1)
    bench.train(tmp_path, processes, None, *limit, kill=Kill("rotation", 4))
    assert names(tmp_path) == ["checkpoint-4", ".checkpoint-2.old"]
    left = [path.name for path in (tmp_path / ".checkpoint-2.old").rglob("*") if path.is_file()]
    assert left == ["trainer_state.json"]
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint_to_resume(str(tmp_path / ".checkpoint-2.old"), str(tmp_path))
    bench.train(tmp_path, processes, None, *limit, "--resume_from_checkpoint", True)
    assert names(tmp_path) == ["checkpoint-6"]
    assert_same_checkpoint(tmp_path / "checkpoint-6", bench.whole(processes) / "checkpoint-6")


@pytest.mark.parametrize(
    ("step", "processes", "policy", "more"),
    [
        (4, 1, "epoch", ()),  # between two epochs
        (6, 2, "epoch", ()),
        (4, 2, None, ("--dataloader_num_workers", 2)),  # how rows are loaded is no matter
    ],
)
def test_explicit_path(
    bench: Bench, tmp_path: Path, step: int, processes: int, policy: str | None, more: tuple[Any, ...]
):
    source = bench.whole(processes, policy) / f"checkpoint-{step}"
    bench.train(tmp_path, processes, policy, *more, "--resume_from_checkpoint", source)
    last = f"checkpoint-{LAST[policy]}"
    assert names(tmp_path)[-1] == last
    assert_same_checkpoint(tmp_path / last, bench.whole(processes, policy) / last)


@pytest.mark.parametrize(("processes", "policy"), [(1, "epoch"), (2, None)])
def test_resumed_by_a_fresh_launch(bench: Bench, tmp_path: Path, processes: int, policy: str | None):
    """As a user does it: ``python run_dense.py``, and torchrun."""
    bench.train(tmp_path, processes, policy, kill=Kill("optimizer", 4))
    flags = bench.flags(tmp_path, processes, policy, "--resume_from_checkpoint", "True")
    done = run(["run_dense.py", *flags], processes)
    assert done.returncode == 0, done.stderr
    last = f"checkpoint-{LAST[policy]}"
    assert_same_checkpoint(tmp_path / last, bench.whole(processes, policy) / last)


def test_the_comparison_sees_a_lost_random_state(bench: Bench, tmp_path: Path):
    """Dropout is on: with another random state the weights come out otherwise."""
    source = tmp_path / "source"
    shutil.copytree(bench.whole() / "checkpoint-4", source)
    shutil.copy(bench.whole() / "checkpoint-2" / "rng_state.pth", source / "rng_state.pth")
    (source / CHECKSUMS).unlink()
    bench.train(tmp_path / "out", 1, None, "--resume_from_checkpoint", source)
    one, other = (weights(folder / "checkpoint-6") for folder in (tmp_path / "out", bench.whole()))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_early_exit_saves_and_resumes(bench: Bench, tmp_path: Path):
    bench.train(tmp_path, 1, "epoch", "--save_steps", 1000, "--early_exit_steps", 3)
    assert names(tmp_path) == ["checkpoint-3"]
    bench.train(tmp_path, 1, "epoch", "--resume_from_checkpoint", True)
    assert_same_checkpoint(tmp_path / "checkpoint-8", bench.whole(1, "epoch") / "checkpoint-8")


def test_a_run_that_reached_its_last_step_takes_no_more(bench: Bench, tmp_path: Path):
    """Neither the step of an early exit nor that of --max_steps is passed by starting the command again."""
    for flag in ("--early_exit_steps", "--max_steps"):
        for _ in range(2):
            bench.train(tmp_path / flag, 1, "epoch", flag, 3, "--save_steps", 1000, "--resume_from_checkpoint", True)
            assert names(tmp_path / flag) == ["checkpoint-3"]


def test_a_finished_run_stays_as_it_is(bench: Bench, tmp_path: Path):
    shutil.copytree(bench.whole() / "checkpoint-6", tmp_path / "checkpoint-6")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    bench.train(tmp_path, 1, None, "--resume_from_checkpoint", True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if "checkpoint" in str(path)} == before


@pytest.mark.parametrize(
    ("strategy", "expected"), [("no", ["checkpoint-6"]), ("epoch", ["checkpoint-3", "checkpoint-6"])]
)
def test_saved_at_the_end_whatever_the_strategy(bench: Bench, tmp_path: Path, strategy: str, expected: list[str]):
    bench.train(tmp_path, 1, None, "--save_strategy", strategy)
    assert names(tmp_path) == expected
    assert_same_checkpoint(tmp_path / "checkpoint-6", bench.whole() / "checkpoint-6")


def test_untied_encoders(bench: Bench, tmp_path: Path, tiny_bert: str):
    untied = ("--tie_encoders", False, "--key_encoder", tiny_bert)
    bench.train(tmp_path / "whole", 1, None, *untied)
    bench.train(tmp_path / "killed", 1, None, *untied, kill=Kill("encoder", 4))
    bench.train(tmp_path / "killed", 1, None, *untied, "--resume_from_checkpoint", True)
    last = tmp_path / "killed" / "checkpoint-6"
    assert_same_checkpoint(last, tmp_path / "whole" / "checkpoint-6")
    saved = weights(last)
    assert {name.partition("/")[0] for name in saved} == {"query_encoder", "key_encoder"}
    assert not torch.equal(
        *(saved[f"{name}/embeddings.word_embeddings.weight"] for name in ("query_encoder", "key_encoder"))
    )
    config = EncoderConfig(str(last), str(last), tie_encoders=False, query_max_length=64, key_max_length=64)
    loaded = load_dense_retriever(config)
    for name, encoder in loaded.encoders.items():
        for key, tensor in encoder.backbone.state_dict().items():
            if f"{name}/{key}" in saved:
                assert torch.equal(tensor, saved[f"{name}/{key}"])
    # A tied run refuses them in one line.
    codes, output = bench.forked(
        "run_dense.py", bench.flags(tmp_path / "killed", 1, None, "--resume_from_checkpoint", True)
    )
    assert codes == [2]
    assert "was it trained with the same --tie_encoders?" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("processes", [1, 2])
def test_best_checkpoint_is_kept(bench: Bench, tmp_path: Path, processes: int):
    output = bench.train(
        tmp_path, processes, None, *bench.evaluation(), "--learning_rate", 0.02, "--eval_steps", 1, "--save_steps", 3
    )
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    curve = {log["step"]: log["eval_ndcg@10"] for log in state["log_history"] if "eval_ndcg@10" in log}
    assert sorted(curve) == [0, 1, 2, 3, 4, 5, 6]
    # The model before the first step is in no checkpoint.
    del curve[0]
    best = max(curve, key=curve.__getitem__)
    assert state["best_metric"] == curve[best]
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")
    assert f"best checkpoint: {tmp_path}/checkpoint-{best}" in output
    assert f"checkpoint-{best}" in names(tmp_path)


def test_best_weights_are_loaded_at_the_end(bench: Bench, tmp_path: Path, monkeypatch):
    trained: list[RetrievalTrainer] = []
    scores = iter([0.9, 0.2, 0.6, 0.5, 0.4, 0.3, 0.1])

    class Remembered(RetrievalTrainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            trained.append(self)

    monkeypatch.setattr(train, "evaluate", lambda *_: {"ndcg@10": next(scores)})
    monkeypatch.setattr(train, "RetrievalTrainer", Remembered)
    more = ("--eval_steps", 1, "--save_steps", 1, "--save_total_limit", 1)
    monkeypatch.setattr(sys, "argv", ["run_dense.py", *bench.flags(tmp_path, 1, None, *bench.evaluation(), *more)])
    run_dense.main()
    # With a limit of one the best outlives the last, as transformers has it.
    assert names(tmp_path) == ["checkpoint-2"]
    saved = weights(tmp_path / "checkpoint-2")
    loaded = trained[0].model.encoders["encoder"].backbone.state_dict()
    for name, tensor in saved.items():
        assert torch.equal(loaded[name.partition("/")[2]], tensor)


def fake_checkpoint(folder: Path, *files: str, age: int = 0) -> Path:
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('{"global_step": 1, "log_history": []}')
        os.utime(folder / name, (10**9 - age, 10**9 - age))
    return folder


def test_what_resume_means(tmp_path: Path):
    out = str(tmp_path)
    assert checkpoint_to_resume(None, out) is None
    assert checkpoint_to_resume("False", out) is None
    assert checkpoint_to_resume("True", out) is None
    assert checkpoint_to_resume("True", str(tmp_path / "missing")) is None
    for step in (10, 9):
        fake_checkpoint(tmp_path / f"checkpoint-{step}", "trainer_state.json")
    # Half-written by something else, removed half-way, or no checkpoint at all.
    fake_checkpoint(tmp_path / "checkpoint-11", "optimizer.pt")
    fake_checkpoint(tmp_path / ".checkpoint-12.partial", "trainer_state.json")
    fake_checkpoint(tmp_path / "checkpoint-best", "trainer_state.json")
    (tmp_path / "checkpoint-13").write_text("a file")
    assert checkpoint_to_resume("true", out) == str(tmp_path / "checkpoint-10")
    assert checkpoint_to_resume(str(tmp_path / "checkpoint-9"), out) == str(tmp_path / "checkpoint-9")
    assert checkpoint_to_resume(str(tmp_path / "checkpoint-best"), out) == str(tmp_path / "checkpoint-best")
    for bad in ("missing", "checkpoint-11", ".checkpoint-12.partial", "checkpoint-13"):
        with pytest.raises(UserError, match=r"no complete checkpoint .*checkpoint-9, .*checkpoint-10$"):
            checkpoint_to_resume(str(tmp_path / bad), out)


def test_optimizer_state_is_needed(tmp_path: Path):
    zero = "zero_pp_rank_{}_mp_rank_00_{}_states.pt"
    parts = [f"global_step4/{zero.format(rank, 'optim')}" for rank in range(2)]
    saved = {
        optimizer_layout(None, False, 2): ["optimizer.pt"],
        optimizer_layout(0, False, 2): ["global_step4/mp_rank_00_model_states.pt"],
        optimizer_layout(2, False, 2): ["global_step4/mp_rank_00_model_states.pt", *parts],
        optimizer_layout(2, False, 1): ["global_step4/mp_rank_00_model_states.pt", parts[0]],
        optimizer_layout(3, False, 2): [f"global_step4/{zero.format(rank, 'model')}" for rank in range(2)] + parts,
        optimizer_layout(None, True, 2): ["optimizer_0/__0_0.distcp"],
    }
    assert len(saved) == 6
    for number, (layout, files) in enumerate(saved.items()):
        folder = str(fake_checkpoint(tmp_path / str(number), *files))
        check_optimizer_state(folder, layout)
        for other in saved.keys() - {layout}:
            with pytest.raises(UserError, match=f"saved with {layout}, and this run has {other}"):
                check_optimizer_state(folder, other)


def test_unusable_checkpoints_end_in_one_line(bench: Bench, tmp_path: Path):
    bench.train(tmp_path, 1, None, "--save_only_model", "--early_exit_steps", 1)
    for path, message in ((True, "it has no optimizer state"), (tmp_path / "nowhere", "no complete checkpoint")):
        codes, output = bench.forked("run_dense.py", bench.flags(tmp_path, 1, None, "--resume_from_checkpoint", path))
        assert codes == [2]
        assert message in output
        assert "Traceback" not in output
    assert names(tmp_path) == ["checkpoint-1"]


def copy_without_checksums(source: Path, target: Path) -> None:
    """As an earlier version wrote it."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("checksums.json"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("scheduler.pt", None, "scheduler.pt, the state of the learning rate's schedule, is missing"),
        ("rng_state.pth", None, "rng_state.pth, the state of the random numbers, is missing"),
        ("trainer_state.json", "{", "is not valid JSON"),
        ("trainer_state.json", '{"global_step": "four", "log_history": []}', "is damaged: it has no number of steps"),
        ("trainer_state.json", '{"global_step": 4, "log_history": [], "of": "later"}', "is of another version"),
        ("optimizer.pt", "junk", "the state of the optimizer or of the random numbers is damaged"),
        ("scheduler.pt", "junk", "the state of the optimizer or of the random numbers is damaged"),
        ("encoder/model.safetensors", "\x10\0\0\0\0\0\0\0{", "cannot load the encoder"),
        ("encoder/config.json", "{", "config.json' is not a valid JSON file"),
    ],
)
def test_damaged_checkpoints_end_in_one_line(
    bench: Bench, tmp_path: Path, name: str, content: str | None, message: str
):
    damaged = tmp_path / "checkpoint-4"
    copy_without_checksums(bench.whole() / "checkpoint-4", damaged)
    if content is None:
        (damaged / name).unlink()
    else:
        (damaged / name).write_text(content)
    flags = bench.flags(tmp_path, 1, None, "--resume_from_checkpoint", damaged)
    codes, output = bench.forked("run_dense.py", flags)
    assert codes == [2], output
    assert message in output
    assert "Traceback" not in output
    assert names(tmp_path) == ["checkpoint-4"]


def test_another_number_of_processes_is_told(bench: Bench, tmp_path: Path):
    shutil.copytree(bench.whole() / "checkpoint-4", tmp_path / "checkpoint-4")
    output = bench.train(tmp_path, 2, None, "--resume_from_checkpoint", True)
    assert "was saved by 1 process(es) and 2 go on" in output
    own = shutil.copytree(bench.whole(2) / "checkpoint-4", tmp_path / "two")
    (own / "rng_state_1.pth").unlink()
    check_complete(str(own), 0, 2)
    with pytest.raises(UserError, match=r"rng_state_1\.pth, the state of the random numbers, is missing"):
        check_complete(str(own), 1, 2)


@pytest.mark.parametrize("name", ["encoder/model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_files_of_a_checkpoint_are_compared_with_their_checksums(bench: Bench, tmp_path: Path, tiny_bert, name: str):
    damaged = Path(shutil.copytree(bench.whole() / "checkpoint-4", tmp_path / "checkpoint-4"))
    with open(damaged / name, "r+b") as file:
        middle = os.path.getsize(damaged / name) // 2
        file.seek(middle)
        byte = file.read(1)[0]
        file.seek(middle)
        file.write(bytes([byte ^ 1]))
    message = f"{damaged / name} is damaged: it is not what was written"
    with pytest.raises(UserError, match=message):
        checkpoint_to_resume("True", str(tmp_path))
    encoder = str(damaged / "encoder")
    if name.startswith("encoder"):
        with pytest.raises(UserError, match=message):
            load_dense_retriever(EncoderConfig(encoder))
    else:
        load_dense_retriever(EncoderConfig(encoder))


def test_steps_of_another_size_are_refused(bench: Bench, tmp_path: Path):
    """Saved with 4 queries, 2 accumulated: 8 a step. Also under another number of processes."""
    shutil.copytree(bench.whole() / "checkpoint-2", tmp_path / "checkpoint-2")
    for processes, more, found in (
        (1, ("--gradient_accumulation_steps", 4), "16 (1 processes × 4 queries × 4 accumulated)"),
        (2, ("--per_device_train_batch_size", 4), "16 (2 processes × 4 queries × 2 accumulated)"),
    ):
        flags = bench.flags(tmp_path, processes, None, "--resume_from_checkpoint", True, *more)
        codes, output = bench.forked("run_dense.py", flags, processes)
        assert set(codes) == {2}, output
        assert (
            f"its steps are of 8 queries (1 processes × 4 queries × 2 accumulated), those of this run of {found}"
            in output
        )
        assert "it has seen 16 rows in 2 steps, and 32 would be passed over" in output
    skipped = ("--gradient_accumulation_steps", 4, "--ignore_data_skip", "--max_steps", 3)
    bench.train(tmp_path, 1, None, "--resume_from_checkpoint", True, *skipped)


def test_steps_of_the_same_size_go_over_the_same_rows(bench: Bench, tmp_path: Path):
    """2 queries, 4 accumulated, in place of 4 and 2: the batches of the sampler say so; and other orders are told."""
    big, small = (GlobalBatchSampler(None, [13, 9], size, 42).batches(1) for size in (4, 2))
    for step in range(3):
        assert (
            np.concatenate(big[2 * step : 2 * step + 2]).tolist()
            == np.concatenate(small[4 * step : 4 * step + 4]).tolist()
        )
    halves = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4)
    bench.train(tmp_path / "source", 1, None, "--early_exit_steps", 1)
    checkpoint = tmp_path / "source" / "checkpoint-1"
    output = bench.train(tmp_path / "out", 1, None, "--resume_from_checkpoint", checkpoint, *halves)
    assert names(tmp_path / "out")[-1] == "checkpoint-6"
    assert "rows come in another order" not in output
    output = bench.train(
        *(tmp_path / "seed", 1, None, "--resume_from_checkpoint", checkpoint, "--seed", 7, "--dataloader_drop_last")
    )
    assert "was trained with --dataloader_drop_last False, not True; --seed 42, not 7: rows come in another" in output
    assert "goes on with other keys" not in output
    output = bench.train(tmp_path / "group", 1, None, "--resume_from_checkpoint", checkpoint, "--train_group_size", 2)
    assert "was trained with --train_group_size 3, and goes on with other keys for each query" in output


def test_batches_of_one_file_cut_otherwise_are_told(bench: Bench, tmp_path: Path):
    bench.train(tmp_path, 1, "epoch", "--early_exit_steps", 1)
    halves = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4)
    output = bench.train(tmp_path, 1, "epoch", "--resume_from_checkpoint", True, *halves)
    assert "1 processes × 4 queries × 2 accumulated, not 1 processes × 2 queries × 4 accumulated: rows come" in output


@pytest.mark.parametrize("name", ["scaler of a GPU", "junk", "none"])
def test_a_scaler_that_is_of_no_use(bench: Bench, tmp_path: Path, name: str):
    """fp16 on a GPU leaves one, and --bf16 or a CPU needs none."""
    shutil.copytree(bench.whole() / "checkpoint-4", tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / "scaler.pt"
    if name == "junk":
        path.write_text("junk")
    elif name != "none":
        torch.save(torch.amp.GradScaler("cpu").state_dict(), path)
    more = ("--bf16",) if name == "scaler of a GPU" else ()
    output = bench.train(tmp_path, 1, None, "--resume_from_checkpoint", True, *more)
    assert (f"{path} is not needed: only fp16 scales losses" in output) == (name != "none")
    if not more:
        assert_same_checkpoint(tmp_path / "checkpoint-6", bench.whole() / "checkpoint-6")


def test_the_state_of_a_scaler(tmp_path: Path, caplog):
    """A good one is loaded; without, and of every damaged one, the scaler stays as it begins."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    begin = scaler.state_dict()
    trainer = SimpleNamespace(accelerator=SimpleNamespace(scaler=scaler))
    load = partial(RetrievalTrainer._load_scaler, trainer, str(tmp_path))
    for damaged in (
        None,
        b"junk",
        b"",
        {},
        [],
        5,
        {"scale": 2.0},
        {**begin, "scale": "x"},
        {**begin, "scale": math.nan},
    ):
        if isinstance(damaged, bytes):
            (tmp_path / "scaler.pt").write_bytes(damaged)
        elif damaged is not None:
            torch.save(damaged, tmp_path / "scaler.pt")
        caplog.clear()
        load()
        assert scaler.state_dict() == begin
        assert f"scaler.pt is {'missing' if damaged is None else 'damaged'}" in caplog.text
    torch.save({**begin, "scale": 4.0}, tmp_path / "scaler.pt")
    load()
    assert scaler.state_dict()["scale"] == 4.0


def test_checkpoints_that_lack_weights_are_refused(bench: Bench, tmp_path: Path):
    copy_without_checksums(bench.whole() / "checkpoint-4", tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / "encoder" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if "layer.1.output" not in name}
    save_file(kept, path, metadata={"format": "pt"})
    flags = bench.flags(tmp_path, 1, None, "--resume_from_checkpoint", True)
    codes, output = bench.forked("run_dense.py", flags)
    assert codes == [2], output
    assert "lacks 4 weights, among them encoder.layer.1.output" in output


def test_the_oldest_written_go_first(tmp_path: Path):
    """A new run in a folder with a longer old one must not lose what it has just saved."""
    for step, age in ((2, 1), (4, 0), (90, 8), (100, 9)):
        fake_checkpoint(tmp_path / f"checkpoint-{step}", "trainer_state.json", age=age)
    out, newest = str(tmp_path), str(tmp_path / "checkpoint-4")
    remove_oldest(out, None, {newest})
    for limit in (4, 10):
        remove_oldest(out, limit, {newest})
        assert len(names(tmp_path)) == 4
    remove_oldest(out, 3, {newest})
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-90"]
    remove_oldest(out, 1, {newest, str(tmp_path / "checkpoint-90")})
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-90"]
    remove_oldest(out, 1, {newest})
    assert names(tmp_path) == ["checkpoint-4"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path):
    fake_checkpoint(tmp_path / "checkpoint-4", "trainer_state.json", "stale.pt")
    fake_checkpoint(tmp_path / ".checkpoint-4.partial", "trainer_state.json")
    checkpoint_folders.replace_folder(str(tmp_path / ".checkpoint-4.partial"), str(tmp_path / "checkpoint-4"))
    assert names(tmp_path) == ["checkpoint-4"]
    assert os.listdir(tmp_path / "checkpoint-4") == ["trainer_state.json"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_checkpoint_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch, failing: int):
    """Whichever of the two renames fails."""
    fake_checkpoint(tmp_path / "checkpoint-4", "trainer_state.json", "old.pt")
    fake_checkpoint(tmp_path / ".checkpoint-4.partial", "trainer_state.json")
    calls, rename = [], os.rename

    def renaming(source, target):
        calls.append(source)
        if len(calls) == failing:
            raise PermissionError("not now")
        rename(source, target)

    monkeypatch.setattr(checkpoint_folders.os, "rename", renaming)
    with pytest.raises(PermissionError, match="not now"):
        checkpoint_folders.replace_folder(str(tmp_path / ".checkpoint-4.partial"), str(tmp_path / "checkpoint-4"))
    assert names(tmp_path) == ["checkpoint-4", ".checkpoint-4.partial"]
    assert (tmp_path / "checkpoint-4" / "old.pt").is_file()


def test_a_kill_between_the_renames_loses_no_checkpoint(tmp_path: Path):
    """What is then on the disk: the old one set aside, the new one not yet named."""
    fake_checkpoint(tmp_path / ".checkpoint-4.replaced", "trainer_state.json", "old.pt")
    fake_checkpoint(tmp_path / ".checkpoint-4.partial", "trainer_state.json")
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint_to_resume(str(tmp_path / ".checkpoint-4.partial"), str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint_to_resume(str(tmp_path / ".checkpoint-4.replaced"), str(tmp_path / "elsewhere"))
    assert checkpoint_to_resume("True", str(tmp_path)) == str(tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-4" / "old.pt").is_file()
    # Killed after both, or before the old one was removed.
    fake_checkpoint(tmp_path / ".checkpoint-4.replaced", "trainer_state.json", "older.pt")
    checkpoint_folders.remove_unfinished(str(tmp_path))
    assert names(tmp_path) == ["checkpoint-4"]
    assert (tmp_path / "checkpoint-4" / "old.pt").is_file()


def test_no_damaged_checkpoint_ends_in_a_traceback(bench: Bench, tmp_path: Path, monkeypatch):
    """Every fifth of `damages`; a state of the loss scaler is done without, and so is what only the log shows."""
    source = Path(shutil.copytree(bench.whole() / "checkpoint-4", tmp_path / "source"))
    torch.save(torch.amp.GradScaler("cpu").state_dict(), source / "scaler.pt")
    tried = list(damages(source))[::5]
    assert len(tried) >= 40
    refused = 0
    for number, (name, damage, change) in enumerate(tried):
        folder = write_damaged(source, tmp_path / f"checkpoint-{number}", name, change)
        more = ("--resume_from_checkpoint", folder, "--early_exit_steps", 5, "--save_strategy", "no")
        monkeypatch.setattr(sys, "argv", ["run_dense.py", *bench.flags(tmp_path / "out" / str(number), 1, None, *more)])
        told = ""
        try:
            run_dense.main()
        except UserError as error:
            told = str(error)
        assert not told or (str(folder) in told and "\n" not in told and name != "scaler.pt"), (name, damage, told)
        refused += bool(told)
    assert refused >= 25
