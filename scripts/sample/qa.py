#!/usr/bin/env python3
"""Write sample questions on invented towns, whose answers no language model knows and only the passages have.

The same bytes for the same arguments::

    python scripts/sample/qa.py

Written below ``--output_dir`` (JSON lines): ``qa/corpus.json`` (``text``; four passages a town, each on a subject of
its own), ``qa/train.json`` and ``qa/test.json`` (``query``, ``answers``, ``pos``, ``pos_index``, ``task``). No town of
the test is asked about in training. A question names the town, so the town's other passages are near misses.
"""

from __future__ import annotations

import logging
import random
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from src.utils.cli import run
from src.utils.files import write_jsonl
from src.utils.parser import Parser

logger = logging.getLogger("scripts.sample.qa")

#: Words and texts.
TOWNS = Path(__file__).with_name("towns.yaml")


def facts(rng: random.Random, town: str, words: dict[str, list[str]]) -> dict[str, str]:
    """Invent what is known about a town."""

    def draw(kind: str) -> str:
        return rng.choice(words[kind])

    return {
        "town": town,
        "year": str(rng.randrange(1100, 1800)),
        "person": f"{draw('first_names')} {draw('name_starts')}{draw('name_endings')}",
        "river": f"{draw('name_starts')}a",
        "work": draw("works"),
        "month": draw("months"),
        "custom": draw("customs"),
    }


def make(towns: int, held_out: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows by file name."""
    rng, words = random.Random(seed), yaml.safe_load(TOWNS.read_text(encoding="utf-8"))
    names = rng.sample([start + ending for start in words["name_starts"] for ending in words["name_endings"]], towns)
    corpus: list[dict[str, Any]] = []
    questions: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for number, name in enumerate(names):
        known = facts(rng, name, words)
        for subject in words["subjects"]:
            row = {
                "query": rng.choice(subject["questions"]).format(**known),
                "answers": [subject["answer"].format(**known)],
                "pos": [subject["passage"].format(**known)],
                "pos_index": [len(corpus)],
                "task": "qa",
            }
            part = questions["test" if number < held_out else "train"]
            part.append({"query_id": len(part), **row})
            corpus.append({"text": row["pos"][0]})
    for part in questions.values():
        rng.shuffle(part)
    for row in questions["train"]:
        row["neg"] = []
    return {"corpus": corpus, **questions}


def main() -> None:
    """Write them."""
    parser = Parser(description=__doc__)
    parser.add_argument("--output_dir", default="data/sample", help="(default: %(default)s)")
    parser.add_argument("--towns", type=int, default=150, help="four passages each (default: %(default)s)")
    parser.add_argument("--test_towns", type=int, default=50, help="held out for the test (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, rows in make(args.towns, args.test_towns, args.seed).items():
        path = Path(args.output_dir) / "qa" / f"{name}.json"
        logger.info("%s: %d rows", path, write_jsonl(path, rows))


if __name__ == "__main__":
    run(main)
