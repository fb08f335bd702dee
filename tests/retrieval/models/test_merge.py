"""Merged models: bit for bit what arithmetic says, with all that makes a folder a model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts import merge_models
from src.retrieval.data.tasks import Instruction
from src.retrieval.models.cross_encoder import CrossEncoder, RankerConfig, load_cross_encoder
from src.retrieval.models.dense import DenseRetriever, EncoderConfig, load_dense_retriever
from src.retrieval.models.merge import merge_states
from src.utils.cli import run as run_entry
from tests.helpers import write_rows

FILE = "model.safetensors"
LENGTHS = {"query_max_length": 32, "key_max_length": 32}


def moved(source: str, target: Path, seed: int) -> str:
    """A copy of an encoder whose weights a little training might have moved."""
    shutil.copytree(source, target)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(target / FILE).items()
    }
    save_file(weights, target / FILE, {"format": "pt"})
    return str(target)


@pytest.fixture
def models(tiny_bert: str, tmp_path: Path) -> list[str]:
    return [moved(tiny_bert, tmp_path / name, seed) for seed, name in enumerate("abc")]


@pytest.fixture
def merge(monkeypatch, capfd):
    """Run the command in this process; return what it printed."""

    def call(*flags, expect: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["merge_models.py", *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            run_entry(merge_models.main)
        printed = capfd.readouterr()
        assert int(stop.value.code or 0) == expect, printed.err
        return printed.err if expect else printed.out

    return call


def weights(folder: Path | str) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in load_file(Path(folder) / FILE).items()}


def test_the_mean_is_that_of_numpy(models, merge, tmp_path):
    merge("--models", *models, "--weights", 1, 2, 5, "--output_dir", tmp_path / "merged")
    sources, found = [weights(model) for model in models], weights(tmp_path / "merged" / "encoder")
    for name, value in found.items():
        expected = sum(share / 8 * each[name] for share, each in zip((1, 2, 5), sources, strict=True))
        assert np.array_equal(value, expected.astype(np.float32)), name
    card = (tmp_path / "merged" / "encoder" / "README.md").read_text()
    assert "| `c` | 0.625 |" in card
    # It is loaded and used like any other, and another merge may take its place.
    vectors = DenseRetriever.from_pretrained(str(tmp_path / "merged")).encode_keys(["a text"])
    merge("--models", models[0], "--output_dir", tmp_path / "merged")
    assert not np.allclose(DenseRetriever.from_pretrained(str(tmp_path / "merged")).encode_keys(["a text"]), vectors)


def test_what_else_is_in_an_earlier_merge_is_kept(models, merge, tmp_path):
    merge("--models", *models, "--output_dir", tmp_path / "merged")
    trained = tmp_path / "merged" / "checkpoint-5" / "trainer_state.json"
    trained.parent.mkdir()
    trained.touch()
    assert "holds other files" in merge("--models", models[0], "--output_dir", tmp_path / "merged", expect=2)
    assert trained.is_file()


def test_the_merge_of_one_is_that_one(models, merge, tmp_path):
    merge("--models", models[0], "--output_dir", tmp_path / "merged")
    one, same = load_file(Path(models[0]) / FILE), load_file(tmp_path / "merged" / "encoder" / FILE)
    assert all(torch.equal(one[name], tensor) for name, tensor in same.items())
    texts = ["a", "b c"]
    vectors = [
        DenseRetriever.from_pretrained(path).encode_keys(texts) for path in (models[0], str(tmp_path / "merged"))
    ]
    assert np.array_equal(*vectors)


@pytest.mark.parametrize("way", [0.0, 0.25, 1.0])
def test_slerp_keeps_to_the_arc(way):
    angle, (start, end) = np.pi / 3, (2.0, 2.0)
    first = torch.tensor([start, 0.0])
    second = end * torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float32)
    merged = merge_states([{"w": first}, {"w": second}], [1 - way, way], "slerp")["w"]
    expected = 2 * np.array([np.cos(way * angle), np.sin(way * angle)])
    np.testing.assert_allclose(merged.numpy(), expected, atol=1e-6)


def test_slerp_of_parallel_weights_is_their_mean():
    merged = merge_states([{"w": torch.tensor([2.0, 0])}, {"w": torch.tensor([4.0, 0])}], [0.5, 0.5], "slerp")
    assert merged["w"].tolist() == [3, 0]
    zeros = merge_states([{"w": torch.zeros(2)}, {"w": torch.tensor([4.0, 0])}], [0.5, 0.5], "slerp")
    assert zeros["w"].tolist() == [2, 0]


def test_whole_numbers_are_those_of_the_first():
    states = [{"places": torch.tensor([1, 2])}, {"places": torch.tensor([3, 4])}]
    assert merge_states(states, [0.5, 0.5], "linear")["places"].tolist() == [1, 2]


def test_untied_encoders_and_dense_layers(models, merge, tmp_path):
    folders = []
    for number in (0, 1):
        torch.manual_seed(number)
        settings = EncoderConfig(
            models[number],
            models[number + 1],
            tie_encoders=False,
            pooling_method=("mean", "dense"),
            dense_dim=8,
            new_dense=True,
        )
        load_dense_retriever(settings).save(str(tmp_path / f"untied-{number}"))
        folders.append(tmp_path / f"untied-{number}")
    merge("--models", *folders, "--method", "slerp", "--output_dir", tmp_path / "merged")
    states = [DenseRetriever.from_pretrained(str(folder)).state_dict() for folder in (*folders, tmp_path / "merged")]
    expected = merge_states(states[:2], [0.5, 0.5], "slerp")
    assert expected.keys() == states[2].keys()
    assert all(torch.equal(states[2][name], tensor) for name, tensor in expected.items())
    assert any("dense.linear" in name for name in expected)


def test_rankers(models, merge, tmp_path):
    folders = []
    for number in (0, 1):
        torch.manual_seed(number)
        load_cross_encoder(RankerConfig(models[number], 32, 32)).save(str(tmp_path / f"ranker-{number}"))
        folders.append(tmp_path / f"ranker-{number}")
    merge("--models", *folders, "--output_dir", tmp_path / "merged")
    states = [
        CrossEncoder.from_pretrained(str(folder), **LENGTHS).state_dict() for folder in (*folders, tmp_path / "merged")
    ]
    for name, tensor in states[2].items():
        assert torch.equal(tensor, ((states[0][name].double() + states[1][name].double()) / 2).float())
    assert "## Merge" in (tmp_path / "merged" / "ranker" / "README.md").read_text()
    assert "some are encoders and some rankers" in merge(
        "--models", folders[0], models[0], "--output_dir", tmp_path / "other", expect=2
    )


def test_the_last_checkpoints_of_a_run(models, merge, tmp_path):
    for step, model in enumerate(models):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        shutil.copytree(model, folder / "encoder")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    merge("--models", tmp_path / "run", "--last", 2, "--output_dir", tmp_path / "merged")
    merge("--models", *models[1:], "--output_dir", tmp_path / "same")
    found, same = (load_file(tmp_path / name / "encoder" / FILE) for name in ("merged", "same"))
    assert all(torch.equal(found[name], tensor) for name, tensor in same.items())
    message = merge("--models", tmp_path / "run", "--last", 4, "--output_dir", tmp_path / "more", expect=2)
    assert "--last 4: " in message
    assert "3 complete checkpoints" in message


def test_both_ends_and_the_merge_are_compared(models, merge, tmp_path):
    corpus = write_rows(tmp_path / "corpus.json", [{"text": f"key {number}"} for number in range(9)])
    rows = [{"query": f"query {number}", "pos_index": [number]} for number in range(5)]
    evaluation = tmp_path / "evaluation.yaml"
    evaluation.write_text(json.dumps({"key_template": "{text}", "metrics": ["ndcg"], "cutoffs": [3], **LENGTHS}))
    flags = ["--models", *models[:2], "--output_dir", tmp_path / "merged"]
    flags += ["--corpus", corpus, "--evaluation", evaluation]
    missing = merge(*flags, "--eval_data", tmp_path / "missing.json", expect=2)
    assert "missing.json" in missing
    assert not (tmp_path / "merged").exists()
    # What is trusted of the models is so in their evaluations.
    pickled = Path(models[1])
    torch.save(load_file(pickled / FILE), pickled / "pytorch_model.bin")
    (pickled / FILE).unlink()
    flags += ["--eval_data", write_rows(tmp_path / "rows.json", rows), "--allow_pickle", "True"]
    table = merge(*flags).strip().splitlines()
    assert table[0] == "| model | ndcg@3 |"
    assert [line.split(" | ")[0].removeprefix("| ") for line in table[2:]] == [*models[:2], str(tmp_path / "merged")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--models is needed"),
        (["--models", "A"], "--output_dir is needed"),
        (["--models", "A", "B", "--weights", "1", "--output_dir", "X"], "one for each of the 2 models, found 1"),
        (["--models", "A", "B", "--weights", "0", "0", "--output_dir", "X"], "one of them above 0, found [0.0, 0.0]"),
        (["--models", "A", "B", "C", "--method", "slerp", "--output_dir", "X"], "slerp merges two models, found 3"),
        (["--models", "A", "--method", "mean", "--output_dir", "X"], "choose from linear, slerp"),
        (["--models", "A", "B", "--last", "2", "--output_dir", "X"], "name one training run"),
        (["--models", "A", "--corpus", "c", "--output_dir", "X"], "are for --eval_data"),
        (["--models", "nowhere", "--output_dir", "X"], "nowhere: no such folder"),
        (["--models", "A", "--output_dir", "A"], "holds the model"),
        (["--models", "A", "LLAMA", "--output_dir", "X"], "cannot be merged: one has weights"),
        (["--models", "A", "B", "--output_dir", "FULL"], "holds other files"),
    ],
)
def test_what_cannot_be_merged_is_refused(flags, message, models, merge, tiny_llama, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    named = dict(zip("ABC", models, strict=True)) | {
        "LLAMA": tiny_llama,
        "X": tmp_path / "x",
        "FULL": tmp_path / "full",
    }
    assert message in merge(*[named.get(flag, flag) for flag in flags], expect=2)
    assert not (tmp_path / "x").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_instructions_of_all_tasks_are_kept_and_two_for_one_are_refused(models, merge, tmp_path):
    told = {"base": None, "qa": {"qa": Instruction("ask: ")}, "tool": {"tool": Instruction("use: ", "tool: ")}}
    told["other"] = {"qa": Instruction("question: ")}
    for name, instructions in told.items():
        model = DenseRetriever.from_pretrained(models[0])
        model.instructions = instructions
        model.save(str(tmp_path / name))
    merge("--models", *(tmp_path / name for name in ("base", "qa", "tool")), "--output_dir", tmp_path / "x")
    assert DenseRetriever.from_pretrained(str(tmp_path / "x")).instructions == {**told["qa"], **told["tool"]}
    assert "| tool | `use: ` | `tool: ` |" in (tmp_path / "x" / "encoder" / "README.md").read_text()
    message = merge("--models", tmp_path / "qa", tmp_path / "other", "--output_dir", tmp_path / "y", expect=2)
    assert (
        "other: the instruction of the task 'qa' is before queries 'question: '; of a model named earlier, " in message
    )
    assert not (tmp_path / "y").exists()


def test_models_that_pool_differently_are_refused(models, merge, tmp_path):
    folders = []
    for name, pooling in (("mean", "mean"), ("cls", "cls")):
        load_dense_retriever(EncoderConfig(models[0], pooling_method=(pooling,))).save(str(tmp_path / name))
        folders.append(tmp_path / name)
    assert "pool and compare differently" in merge("--models", *folders, "--output_dir", tmp_path / "x", expect=2)
