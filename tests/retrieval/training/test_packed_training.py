"""Training without padding takes the same steps as training with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import environment
from tests.training_bench import Bench, assert_same_checkpoint, weights, without_dropout, write_data
from tests.workers.forked import Kill, Runs

SGD = ("--optim", "sgd", "--learning_rate", 0.05, "--max_grad_norm", 0, "--use_cpu")
PACKED = ("--padding_free", True)


@pytest.fixture(scope="module")
def bench(tiny_bert, tmp_path_factory) -> Iterator[Bench]:
    """Runs on an encoder without dropout, whose random numbers depend on the shapes of tensors."""
    folder = tmp_path_factory.mktemp("packed")
    forked = Runs(environment(), [])
    yield Bench(write_data(folder), without_dropout(tiny_bert, folder), forked)
    forked.close()


def assert_same_way(one: Path, other: Path, most: float) -> None:
    """From the second step to the last, two runs are apart by no more than `most` of the way that training took."""
    ours, theirs, began = (
        weights(folder) for folder in (one / "checkpoint-6", other / "checkpoint-6", other / "checkpoint-2")
    )
    assert ours.keys() == theirs.keys()
    apart = sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs)
    way = sum(float((theirs[name] - began[name]).square().sum()) for name in theirs)
    assert way > 1e-6
    assert (apart / way) ** 0.5 < most


#: Totals of few sizes, as CUDA graphs need them, without the graphs.
GRAPHS = ("--torch_compile_backend", "eager", "--torch_compile_mode", "reduce-overhead")
GRAPHS += ("--gradient_accumulation_steps", 1)


@pytest.mark.parametrize(
    ("processes", "more", "most"),
    [
        (1, (), 1e-3),
        (2, (), 1e-3),
        (1, ("--grad_cache_chunk_size", 3), 1e-3),
        (2, ("--grad_cache_chunk_size", 3), 1e-3),
        (1, ("--tie_encoders", False, "--key_encoder", "ENCODER"), 1e-3),
        (1, ("--lora_r", 2), 1e-3),
        (1, ("--matryoshka_dims", 8, "--mask_margin", 0.1), 1e-3),
        (1, ("--gradient_checkpointing", True), 1e-3),
        (1, ("--pooling_method", "last"), 1e-3),
        (1, ("--pooling_method", "cls", "dense"), 1e-3),
        (1, ("--bf16", True), 0.1),
        (1, ("--torch_compile", True, "--torch_compile_backend", "eager"), 1e-3),
        (2, GRAPHS, 1e-3),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_packed_steps_are_those_of_padded_ones(bench: Bench, tmp_path: Path, processes: int, more: tuple, most: float):
    if "--lora_r" in more:
        pytest.importorskip("peft")
    more = tuple(bench.encoder if flag == "ENCODER" else flag for flag in more)
    padded = bench.train(tmp_path / "padded", processes, None, *SGD, *more)
    output = bench.train(tmp_path / "packed", processes, None, *SGD, *more, *PACKED)
    assert "reads texts without padding" in output
    assert "without padding" not in padded
    assert_same_way(tmp_path / "packed", tmp_path / "padded", most)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_packed_run_goes_on_as_if_nothing_had_happened(
    tiny_bert: str, bench: Bench, tmp_path: Path, processes: int
):
    dropout = Bench(bench.folder, tiny_bert, bench.forked)
    dropout.train(tmp_path / "undisturbed", processes, None, *PACKED)
    dropout.train(tmp_path / "out", processes, None, *PACKED, kill=Kill("training", 3))
    dropout.train(tmp_path / "out", processes, None, *PACKED, "--resume_from_checkpoint", True)
    assert_same_checkpoint(tmp_path / "out" / "checkpoint-6", tmp_path / "undisturbed" / "checkpoint-6")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_packed_ranker_takes_the_steps_of_a_padded_one(bench: Bench, tmp_path: Path, processes: int):
    for name, padding_free in (("packed", True), ("padded", False)):
        flags = [
            *("--train_data", bench.folder / "a.json", bench.folder / "b.json", "--ranker", bench.encoder),
            *("--output_dir", tmp_path / name, "--query_max_length", 32, "--key_max_length", 32, "--save_steps", 2),
            *("--train_group_size", 3, "--per_device_train_batch_size", 8 // processes, "--num_train_epochs", 2),
            *(*SGD, "--learning_rate", 0.5, "--padding_free", padding_free),
        ]
        codes, output = bench.forked("run_ranker.py", list(map(str, flags)), processes)
        assert codes == [0] * processes, output
        assert ("reads texts without padding" in output) == padding_free
    assert_same_way(tmp_path / "packed", tmp_path / "padded", 1e-3)


def test_evaluations_during_a_compiled_run_are_those_of_its_checkpoint(bench: Bench, tmp_path: Path):
    more = (*bench.evaluation(), "--log_path", tmp_path / "train.log", *PACKED, "--use_cpu", *GRAPHS, "--max_steps", 6)
    bench.assert_metrics_of_training(tmp_path, bench.train(tmp_path, 1, None, *more))
