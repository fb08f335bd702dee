"""Feed the row reader with generated and mutated rows: each is accepted or told as a problem, and none is a traceback.

    python -m tests.faults.fuzz --inputs 100000

A row that is accepted must come back from a file as it was, give the same numbers, and be written and read again.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import eval_icl, eval_lrlm, eval_mmlu, eval_msc, eval_popqa, eval_qa, eval_qrecc
from src.retrieval.data.rows import (
    check_corpus_row,
    check_eval_row,
    check_further,
    check_hits_row,
    check_lm_row,
    check_train_row,
)
from src.utils.files import json_line
from src.utils.jsonl import BYTE_ORDER_MARK, open_jsonl, parse_row, scan_file
from tests.helpers import evaluation_class

CHECKS: dict[str, Callable[[Any], tuple[list[str], dict[str, Any]]]] = {
    "train": check_train_row,
    "eval": check_eval_row,
    "scoring": partial(check_eval_row, scoring=True),
    "lm": check_lm_row,
    "hits": partial(check_hits_row, corpus_size=5),
    "corpus": partial(check_corpus_row, columns=["title", "text"]),
    "lrlm": eval_lrlm.check_row,
    **{
        task.name: partial(check_further, check=check_eval_row, further=task.check.problems)
        for task in map(evaluation_class, (eval_icl, eval_mmlu, eval_msc, eval_popqa, eval_qa, eval_qrecc))
        if task.check is not None
    },
}
SEEDS: list[dict[str, Any]] = [
    {"query": "a", "pos": ["b"], "neg": ["c", "d"], "teacher_scores": [1, 0.5, -2e3], "task": "qa", "query_id": 7},
    {"query": "a", "history": ["b", "c"], "teacher_scores": [0, 1], "answers": ["x"], "task": "chat"},
    {"query": "é", "pos_index": [0, 2], "answers": ["x", "y"], "key": ["k"], "key_index": [3], "query_id": "q-1"},
    {"query": "a", "pos": [], "neg": ["b"], "context": "c", "answers": ["x"], "task": "lrlm"},
    {"query": "a", "pos": [], "neg": ["b"], "score_inputs": [[1, 2]], "context_inputs": [3], "query_inputs": [4]}
    | {"answer_inputs": [5], "task": "lrlm"},
    {"query": "q", "pos_id": ["a", 7], "pos_grade": [1, 2], "neg_id": ["b"], "key": ["k"], "key_id": ["c"], "pos": []},
    {"query_id": 1, "pred": [0, 4], "score": [0.5, 0.25]},
    {"query_id": 1, "pred_id": ["a", 4], "score": [0.5, 0.25]},
    {"_id": "dök-1", "title": "t", "text": "x"},
    {"text": "A long text.", "query_id": "b-1"},
    {"title": "t", "text": None, "contents": "c", "id": 3},
    {"query": "q", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "anatomy", "possible_answers": ["a"]}
    | {"prop_id": 22, "obj": "x", "options": ["a", "b"], "answers": ["a"], "task_name": "boolq"},
]
FIELDS = sorted({name for seed in SEEDS for name in seed} | {"", "\0", "\ud800", "__class__"})
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**63, -(2**70), 10**400, 0.0, -0.0, 1e39, 1e-400, 5e-324),
    *(float("nan"), float("inf"), -float("inf"), "", " ", "\0", "qa\0", "\ud83d", "\u202e", "x" * 5000, "\ufeff"),
    *([], {}, [None], [[]], [{}], [0], [1.5], ["a", 1], ["", "\udfff"], {"a": 1}, [True], [10**400], [2**63 - 1]),
]
PIECES = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\x00", b"\xff", b"\xc3", b"\xed\xa0\xbd", b"\xef\xbb\xbf"]
PIECES += [b"\r", b"NaN", b"1e400", b"-", b"0" * 4400, b"[" * 120, b'{"a":' * 120, b"\\ud800", b"\\u0000", b" " * 50]


def any_value(rng: random.Random, depth: int = 3) -> Any:
    """Any JSON value, mostly an awkward one."""
    if depth and rng.random() < 0.2:
        return [any_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if depth and rng.random() < 0.1:
        return {rng.choice(FIELDS): any_value(rng, depth - 1) for _ in range(rng.randrange(3))}
    return rng.choice(VALUES)


def any_line(rng: random.Random) -> bytes:
    """A row with some fields changed or lost, or some bytes."""
    row = dict(rng.choice(SEEDS))
    for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
        name = rng.choice(FIELDS)
        if rng.random() < 0.2:
            row.pop(name, None)
        else:
            row[name] = any_value(rng)
    line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    for _ in range(rng.choice((0, 0, 0, 1, 3))):
        place = rng.randrange(len(line) + 1)
        line = line[:place] + rng.choice((b"", rng.choice(PIECES))) + line[place + rng.randrange(4) :]
    return line.replace(b"\n", b" ")


def fuzz(inputs: int, seed: int, folder: Path) -> Counter[str]:
    """Read as many lines and return how many rows each check accepted, and how many it told problems of.

    Raises:
        AssertionError: a row came back otherwise than it was read.
        Exception: whatever a traceback would show.
    """
    rng = random.Random(seed)
    path, again = folder / "rows.json", folder / "again.json"
    lines = [line for line in (any_line(rng) for _ in range(inputs)) if not is_blank(line)]
    tally: Counter[str] = Counter()
    for number, (name, check) in enumerate(CHECKS.items()):
        own = lines[number :: len(CHECKS)]
        found = [problems_of(line, check) for line in own]
        good = [line for line, problems in zip(own, found, strict=True) if not problems]
        tally += Counter({f"{name}: accepted": len(good), f"{name}: problems": len(own) - len(good)})
        path.write_bytes(b"\n".join(own))
        scan = scan_file(str(path), check)
        assert len(scan.places) == len(own)
        assert scan.problem_count == sum(map(len, found))
        if good:
            path.write_bytes(b"\n".join(good))
            check_copies(path, again, name)
    return tally


def is_blank(line: bytes) -> bool:
    """Whether the reader passes a line over."""
    return not line.strip(b"\r\n").removeprefix(BYTE_ORDER_MARK).strip()


def problems_of(line: bytes, check: Callable[[Any], tuple[list[str], dict[str, Any]]]) -> list[str]:
    """What the reader finds in one line."""
    row, problems = parse_row(line.rstrip(b"\r\n").removeprefix(BYTE_ORDER_MARK))
    problems = problems if row is None else check(row)[0]
    assert all(problem.isprintable() for problem in problems), problems
    return problems


def check_copies(path: Path, again: Path, name: str) -> None:
    """Rows that are accepted are the same, and tell the same, after they were written and read again."""
    rows = open_jsonl(str(path), CHECKS[name], name)
    again.write_text("".join(map(json_line, rows)), encoding="utf-8")
    copies = open_jsonl(str(again), CHECKS[name], name)
    assert len(rows) == len(copies)
    for row, copy in zip(rows, copies, strict=True):
        # As text, since NaN is no equal of itself.
        assert json.dumps(row) == json.dumps(copy)
    for column, values in rows.scan.columns.items():
        assert values.dtype.kind in "ifUbS", f"{column} is kept as {values.dtype}"
        np.testing.assert_array_equal(values, copies.scan.columns[column])


def main() -> None:
    """Fuzz and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name, count in sorted(fuzz(args.inputs, args.seed, Path(folder)).items()):
            print(f"{count:7} {name}")
    print(f"{args.inputs} inputs, no traceback, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
