"""scripts/feedback_loop.sh on tiny models: every step runs, a second call does nothing again."""

from __future__ import annotations

import re
import subprocess

from scripts.sample.qa import make
from tests.helpers import ROOT, environment, read_rows, write_rows
from tests.lm.test_score import models  # noqa: F401  (a fixture)


def test_sample_questions_have_their_answer_in_one_passage_only():
    files, subjects = make(30, 10, 0), 4
    texts = [row["text"] for row in files["corpus"]]
    towns = {name: {row["pos_index"][0] // subjects for row in files[name]} for name in ("train", "test")}
    assert len(texts) == len(set(texts)) == 120
    assert not towns["train"] & towns["test"]
    for row in (*files["train"], *files["test"]):
        assert row["pos"] == [texts[row["pos_index"][0]]]
        own = row["pos_index"][0] // subjects * subjects
        answer = row["answers"][0].removeprefix("The ")
        found = [re.search(rf"\b{answer}\b", text) is not None for text in texts[own : own + subjects]]
        assert found.count(True) == 1, answer
    assert make(30, 10, 0) == files


def test_the_loop_runs_through_and_does_nothing_twice(tiny_bert, models, tmp_path):  # noqa: F811
    files = make(6, 2, 0)
    paths = {name: str(write_rows(tmp_path / f"{name}.json", rows)) for name, rows in files.items()}
    settings = {
        "TRAIN": paths["train"],
        "TEST": paths["test"],
        "CORPUS": paths["corpus"],
        "ENCODER": tiny_bert,
        "LM": models["llama"],
        "RERANKER": tiny_bert,
        "OUT": str(tmp_path / "out"),
        "ROUNDS": "1",
        "NPROC": "1",
        "ENCODE_FLAGS": "--add_instruction False --query_max_length 32 --key_max_length 48 --cpu",
        "LM_FLAGS": "--context_max_length 512 --cpu",
        "RANKER_FLAGS": "--query_max_length 32 --key_max_length 48",
        "TRAIN_FLAGS": "--max_steps 2 --train_group_size 3 --use_cpu",
    }

    def loop() -> str:
        done = subprocess.run(
            ["bash", "scripts/feedback_loop.sh"],
            cwd=ROOT,
            env=environment(**settings),
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = loop()
    for step in ("evaluating", "mining", "language model scores", "a reranker learns", "distilling"):
        assert step in first
    table = first[first.index("| round") :]
    assert len(table.splitlines()) == 4
    mined = read_rows(tmp_path / "out" / "round-1" / "mined.json")
    for name in ("lm", "ranker"):
        scored = read_rows(tmp_path / "out" / "round-1" / f"mined.scored.{name}.json")
        for row, own in zip(mined, scored, strict=True):
            assert len(own["teacher_scores"]) == len(row["pos"]) + len(row["neg"])
    again = loop()
    assert "==" not in again
    assert again.endswith(table)
