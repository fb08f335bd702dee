#!/usr/bin/env python3
"""Build the sample data: real user requests and the tools that answer them, for tool retrieval.

The source is the installed package ``bfcl-eval`` (Berkeley Function Calling Leaderboard, Apache-2.0). Only
its data files are read; the package is never imported, so none of its many dependencies is needed::

    pip install --no-deps bfcl-eval==2026.3.23
    python scripts/sample/data.py

Written below ``--output_dir`` (JSON lines, the same bytes for the same arguments):

- ``tool/corpus.json``  every tool: ``text`` (what is retrieved), ``name``; the row number is the tool's index
- ``tool/test.json``, ``tool/dev.json``  held-out requests: ``query_id``, ``query``, ``pos_index``, ``task``
- ``tool/train.json``   requests with ``pos``, ``neg`` (texts) and ``pos_index``, ``neg_index``

Functions of the same name and description are one tool (the first schema is kept). A request is one user message; equal
messages are one request, answered by the tools of all of them.

The split is by function name: requests that share a function name or a tool description, directly or through other
requests, form a group, all of which is test, dev or train. So no tool that answers a test request, and no other tool of
the same name or description, occurs in train rows, as a positive or a negative; the same holds for dev. Groups are
drawn within strata (origin and size of the group), each with the same chance: the held-out requests are a fair sample.
"""

from __future__ import annotations

import logging
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.sample.package import package_folder
from src.utils.cli import run
from src.utils.errors import UserError
from src.utils.files import read_jsonl, write_jsonl
from src.utils.parser import Parser

logger = logging.getLogger("scripts.sample.data")

PACKAGE, INSTALL = "bfcl_eval", "pip install --no-deps bfcl-eval==2026.3.23"
TASK = "tool"
#: Files with requests and the functions offered; ``possible_answer/`` says which of these answer.
REQUEST_FILES = (
    *("simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple"),
    *("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple"),
)
#: Files whose functions join the corpus (no offered function answers, or it is not said which one does).
FUNCTION_FILES = ("irrelevance", "live_irrelevance", "live_relevance")
#: Negatives of a row whose request came with no other tool.
RANDOM_NEGATIVES = 4

Rows = list[dict[str, Any]]


class Tool(NamedTuple):
    """One row of the corpus."""

    name: str
    description: str
    text: str


@dataclass
class Request:
    """One user message, the tools that answer it and the other tools that were offered with it."""

    query_id: str
    query: str
    live: bool
    answers: list[int]
    offered: list[int]


def split_words(identifier: str) -> str:
    """``GeometryPresentation.createPresentation`` -> ``Geometry Presentation create Presentation``."""
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", identifier)
    return re.sub(r"[\W_]+", " ", spaced).strip()


def normalise(text: str) -> str:
    """Letters and digits in lower case: names or descriptions that differ in nothing else are the same."""
    return re.sub(r"[\W_]+", "", text).lower()


def render_tool(function: dict[str, Any]) -> str:
    """The text under which a function is retrieved: its name as words, its description, its parameters.

    Descriptions of parameters more than double the length, and a tuned MiniLM found tools no better with them.
    """
    properties = (function.get("parameters") or {}).get("properties") or {}
    text = f"{split_words(function['name'])}. {function['description'].strip()}"
    if properties:
        text += f" Parameters: {', '.join(split_words(name).lower() for name in properties)}"
    return re.sub(r"\s+", " ", text)


def load(folder: Path) -> tuple[list[Tool], list[Request]]:
    """All tools, in the order of the files, and all requests that at least one offered tool answers."""
    tools: list[Tool] = []
    numbers: dict[tuple[str, str], int] = {}
    requests: dict[str, Request] = {}

    def number_of(function: dict[str, Any]) -> int:
        key = (function["name"], function["description"])
        if key not in numbers:
            numbers[key] = len(tools)
            tools.append(Tool(*key, text=render_tool(function)))
        return numbers[key]

    for stem in REQUEST_FILES:
        answering = {
            row["id"]: {name for call in row["ground_truth"] for name in call}
            for row in read_jsonl(folder / "possible_answer" / f"BFCL_v4_{stem}.json")
        }
        for row in read_jsonl(folder / f"BFCL_v4_{stem}.json"):
            query = "\n".join(turn["content"] for turn in row["question"][0] if turn["role"] == "user").strip()
            offered = [(function["name"] in answering[row["id"]], number_of(function)) for function in row["function"]]
            if query and any(answers for answers, _ in offered):
                request = requests.setdefault(query, Request(row["id"], query, stem.startswith("live"), [], []))
                request.answers += [number for answers, number in offered if answers]
                request.offered += [number for answers, number in offered if not answers]
    for stem in FUNCTION_FILES:
        for row in read_jsonl(folder / f"BFCL_v4_{stem}.json"):
            for function in row["function"]:
                number_of(function)
    for path in sorted((folder / "multi_turn_func_doc").glob("*.json")):
        for function in read_jsonl(path):
            number_of(function)
    for request in requests.values():
        request.answers = sorted(set(request.answers))
        request.offered = sorted(set(request.offered) - set(request.answers))
    return tools, list(requests.values())


def group_tools(tools: Sequence[Tool], requests: Sequence[Request]) -> list[Any]:
    """The group of every tool (see the module's text), by union-find."""
    parent: dict[Any, Any] = {}

    def find(item: Any) -> Any:
        while parent.setdefault(item, item) != item:
            item = parent[item]
        return item

    pairs: list[tuple[Any, Any]] = []
    for number, tool in enumerate(tools):
        texts = (normalise(tool.description) or normalise(tool.name), normalise(tool.text))
        pairs += [(number, ("name", normalise(tool.name))), *((number, ("text", text)) for text in texts)]
    pairs += [(request.answers[0], number) for request in requests for number in request.answers]
    for one, other in pairs:
        parent[find(one)] = find(other)
    return [find(number) for number in range(len(tools))]


def draw_groups(groups: Sequence[list[Request]], every: int, rng: random.Random) -> set[int]:
    """Draw one group of every ``every``, at random among groups of like origin and size."""
    order = list(range(len(groups)))
    rng.shuffle(order)
    order.sort(key=lambda g: (sum(request.live for request in groups[g]) * 2 > len(groups[g]), len(groups[g])))
    picks = [first + rng.randrange(every) for first in range(-rng.randrange(every), len(order), every)]
    return {order[pick] for pick in picks if 0 <= pick < len(order)}


def split(
    requests: Sequence[Request], tool_groups: Sequence[Any], test_every: int, dev_every: int, rng: random.Random
) -> dict[str, list[Request]]:
    """Test, dev and train requests, by whole groups, each in the order of the source."""
    members: dict[Any, list[Request]] = defaultdict(list)
    for request in requests:
        members[tool_groups[request.answers[0]]].append(request)
    groups = list(members.values())
    part_of: dict[str, str] = {}
    for part, every in (("test", test_every), ("dev", dev_every)):
        chosen = draw_groups(groups, every, rng)
        part_of |= {request.query_id: part for g in chosen for request in groups[g]}
        groups = [group for g, group in enumerate(groups) if g not in chosen]
    return {
        part: [request for request in requests if part_of.get(request.query_id, "train") == part]
        for part in ("test", "dev", "train")
    }


def training_rows(
    tools: Sequence[Tool],
    requests: Sequence[Request],
    tool_groups: Sequence[Any],
    barred: set[Any],
    max_per_name: int,
    rng: random.Random,
) -> Rows:
    """One row for every request and tool that answers it, its first positive; the request's other answers follow.

    At most ``max_per_name`` rows have one name: rows of one function in a batch are false negatives of each other.
    Negatives are the tools offered with the request that do not answer it, else random tools of other groups than the
    answers'. No negative is of a ``barred`` group.
    """
    allowed = [number for number, group in enumerate(tool_groups) if group not in barred]
    pairs = [(request, number) for request in requests for number in request.answers]
    rng.shuffle(pairs)
    taken: Counter[str] = Counter()
    rows = []
    for request, number in pairs:
        name = normalise(tools[number].name)
        if taken[name] == max_per_name:
            continue
        taken[name] += 1
        positives = [number, *(other for other in request.answers if other != number)]
        texts = {tools[i].text for i in positives}
        negatives = distinct(tools, (i for i in request.offered if tool_groups[i] not in barred), texts)
        while not negatives:
            drawn = rng.sample(allowed, min(RANDOM_NEGATIVES, len(allowed)))
            negatives = distinct(tools, (i for i in drawn if tool_groups[i] != tool_groups[number]), texts)
        rows.append(
            {
                "query_id": f"{request.query_id}#{number}",
                "query": request.query,
                "pos": [tools[i].text for i in positives],
                "neg": [tools[i].text for i in negatives],
                "pos_index": positives,
                "neg_index": negatives,
                "task": TASK,
            }
        )
    return rows


def distinct(tools: Sequence[Tool], numbers: Iterable[int], seen: set[str]) -> list[int]:
    """The tools whose texts are neither in ``seen`` nor repeated."""
    kept: dict[str, int] = {}
    for number in numbers:
        if tools[number].text not in seen:
            kept.setdefault(tools[number].text, number)
    return list(kept.values())


def make(seed: int, test_every: int = 6, dev_every: int = 12, max_per_name: int = 4) -> dict[str, Rows]:
    """Rows by file name."""
    tools, requests = load(package_folder(PACKAGE, INSTALL) / "data")
    tool_groups = group_tools(tools, requests)
    parts = split(requests, tool_groups, test_every, dev_every, random.Random(seed))
    held_out = {
        part: [
            {"query_id": request.query_id, "query": request.query, "pos_index": request.answers, "task": TASK}
            for request in parts[part]
        ]
        for part in ("test", "dev")
    }
    barred = {tool_groups[number] for rows in held_out.values() for row in rows for number in row["pos_index"]}
    train = training_rows(tools, parts["train"], tool_groups, barred, max_per_name, random.Random(seed))
    return {"corpus": [{"text": tool.text, "name": tool.name} for tool in tools], **held_out, "train": train}


def main() -> None:
    """Write them."""
    parser = Parser(description=__doc__)
    parser.add_argument("--output_dir", default="data/sample", help="tool/ is written there (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the random negatives")
    parser.add_argument("--test_every", type=int, default=6, help="one group in this many is held out for test.json")
    parser.add_argument("--dev_every", type=int, default=12, help="dev.json takes one group in this many of the rest")
    parser.add_argument("--max_per_name", type=int, default=4, help="training rows of one function name, at most")
    args = parser.parse_args()
    if min(args.test_every, args.dev_every) < 2 or args.max_per_name < 1:
        raise UserError("--test_every and --dev_every must be at least 2, --max_per_name at least 1")
    for name, rows in make(args.seed, args.test_every, args.dev_every, args.max_per_name).items():
        path = Path(args.output_dir) / TASK / f"{name}.json"
        logger.info("%s: %d rows", path, write_jsonl(path, rows))


if __name__ == "__main__":
    run(main)
