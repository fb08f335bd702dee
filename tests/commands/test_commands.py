"""The documented fine-tuning commands on real rows of the six tasks, with one and with two processes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from tests.helpers import TASKS, TOY_ROWS, read_rows, run, write_rows

pytestmark = pytest.mark.skipif(not TOY_ROWS.is_dir(), reason="the real rows lie beside the development checkout only")

FLAGS = {
    "qa": "--metrics nq --contrastive_weight 0 --stable_distill",
    "icl": "--select_positive random --contrastive_weight 0 --stable_distill",
    "lrlm": "--select_positive teacher --teacher_scores_margin 0.1 --contrastive_weight 0 --teacher_temperature 0.1",
    "chat": "--select_positive teacher --select_negative random --contrastive_weight 0 --teacher_temperature 0.1",
    "tool": "--key_template {text} --metrics ndcg",
    "convsearch": "--key_template {text} --metrics mrr ndcg --cutoffs 3 10 100",
}
SMALL = (
    "--max_steps 2 --eval_steps 2 --save_steps 2 --logging_steps 1 --query_max_length 32 --key_max_length 64 "
    "--learning_rate 1e-4"
)
MULTI_TASK = (
    "--inbatch_same_dataset epoch --use_train_config --gradient_checkpointing --version llm-embedder --max_steps 7 "
    "--save_steps 7 --logging_steps 1 --query_max_length 64 --key_max_length 64 --learning_rate 1e-3"
)


def with_corpus(task: str, folder) -> list[str]:
    """An evaluation file and a corpus made of the task's rows, as the documented command has them."""
    rows = read_rows(TOY_ROWS / f"{task}.json")
    keys = list(dict.fromkeys(key for row in rows for key in row["pos"] + row["neg"][:5]))
    corpus = write_rows(folder / "corpus.json", [{"title": "", "text": key} for key in keys])
    evaluation = write_rows(
        folder / "test.json",
        [
            {"query": row["query"], "answers": row.get("answers"), "pos_index": [keys.index(key) for key in row["pos"]]}
            for row in rows
        ],
    )
    return ["--eval_data", str(evaluation), "--corpus", str(corpus)]


@pytest.mark.parametrize("task", TASKS)
def test_single_task(task, tmp_path, tiny_bert):
    processes = 2 if task in ("qa", "chat") else 1
    command = ["run_dense.py", "--train_data", f"llm-embedder:{task}.json", "--data_root", str(TOY_ROWS)]
    command += [
        "--query_encoder",
        tiny_bert,
        "--output_dir",
        str(tmp_path / "out"),
        *FLAGS[task].split(),
        *SMALL.split(),
    ]
    command += ["--log_path", str(tmp_path / "performance.log"), "--per_device_train_batch_size", str(8 // processes)]
    if task in ("qa", "tool", "convsearch"):
        command += with_corpus(task, tmp_path)
    done = run(command, processes)
    assert done.returncode == 0, done.stderr[-3000:]

    history = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert len(steps) == 2
    assert all(math.isfinite(step["loss"]) and step["loss"] > 0 for step in steps)
    distilled = {"qa", "icl", "lrlm", "chat"}
    assert ("distillation" in steps[0]) == (task in distilled)
    assert ("contrastive" in steps[0]) == (task not in distilled)
    AutoModel.from_pretrained(tmp_path / "out/checkpoint-2/encoder")
    AutoTokenizer.from_pretrained(tmp_path / "out/checkpoint-2/encoder")
    if task in ("qa", "tool", "convsearch"):
        logged = read_rows(tmp_path / "performance.jsonl")[-1]["metrics"]
        assert set(logged) >= {"qa": {"nq_recall@1"}, "tool": {"ndcg@10"}, "convsearch": {"mrr@3", "ndcg@100"}}[task]
        assert all(0 <= value <= 1 for value in logged.values())


@pytest.mark.parametrize("processes", [1, 2])
def test_multi_task(processes, tmp_path, tiny_bert):
    tasks = ["chat", "convsearch", "lrlm", "qa", "tool", "tool", "icl"]
    command = ["run_dense.py", "--train_data", *(f"llm-embedder:{task}.json" for task in tasks)]
    command += ["--data_root", str(TOY_ROWS), "--output_dir", str(tmp_path / "out"), "--query_encoder", tiny_bert]
    command += ["--per_device_train_batch_size", str(8 // processes), *MULTI_TASK.split()]
    done = run(command, processes)
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((tmp_path / "out/checkpoint-7/trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert len(steps) == 7
    assert all(math.isfinite(step["loss"]) for step in steps)
    # One batch a file: tool (twice) and convsearch train contrastively, the other four by distillation alone.
    assert sum("contrastive" in step for step in steps) == 3
    assert sum("distillation" in step for step in steps) == 4


def test_one_and_two_processes_train_alike(tmp_path, tiny_bert):
    """Without dropout, the same global batches give the same weights.

    Plain SGD shows the gradients themselves: Adam would turn the rounding noise of a vanishing gradient into a whole
    step of the learning rate.
    """
    plain = tmp_path / "plain"
    model = AutoModel.from_pretrained(tiny_bert, add_pooling_layer=False)
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    with torch.no_grad():  # A freshly made model embeds all texts nearly alike, and its gradients are mostly rounding.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    model.save_pretrained(plain)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(plain)
    flags = "--max_steps 5 --save_steps 5 --query_max_length 64 --key_max_length 64 --learning_rate 1e-2 "
    flags += "--optim sgd --pooling_method mean --cos_temperature 0.1"
    weights = []
    for processes in (1, 2):
        output = tmp_path / f"out{processes}"
        command = ["run_dense.py", "--train_data", TOY_ROWS / "tool.json", TOY_ROWS / "qa.json", "--output_dir", output]
        command += ["--query_encoder", plain, "--per_device_train_batch_size", 4 // processes, *flags.split()]
        done = run([*command, "--gradient_checkpointing", "--contrastive_weight", "0.5"], processes)
        assert done.returncode == 0, done.stderr[-3000:]
        weights.append(load_file(output / "checkpoint-5/encoder/model.safetensors"))
    start = load_file(plain / "model.safetensors")
    assert any((weights[0][name] - tensor).abs().max() > 1e-3 for name, tensor in start.items()), "nothing was trained"
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=2e-6)
