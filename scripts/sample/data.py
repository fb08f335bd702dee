#!/usr/bin/env python3
"""Build the sample data: real user requests and the tools that answer them, for tool retrieval.

The source is the installed package ``bfcl-eval`` (Berkeley Function Calling Leaderboard, Apache-2.0). Only
its data files are read; the package is never imported, so none of its many dependencies is needed::

    pip install --no-deps bfcl-eval==2026.3.23
    python scripts/sample/data.py

Written below ``--output_dir`` (JSON lines, the same bytes for the same arguments):

- ``tool/corpus.json``  every tool: ``text`` (what is retrieved), ``name``; the row number is the tool's index
- ``tool/test.json``    held-out requests: ``query_id``, ``query``, ``pos_index``, ``task``
- ``tool/dev.json``     likewise, for choosing settings
- ``tool/train.json``   requests with ``pos``, ``neg`` (texts) and ``pos_index``, ``neg_index``

What is a tool: functions that agree in name and description are one tool (the first schema is kept). What is
a request: one user message; equal messages are one request, answered by the tools of all of them.

The split is by function name. Requests that share a function name or a tool description, directly or
through other requests, form a group, and a group lies wholly in test, dev or train. No tool that answers a
test request, and no other tool of the same name or description, occurs in train rows, neither as a positive
nor as a negative; the same holds for dev. Groups are drawn at random within strata (origin and size of the
group), each with the same chance, so that the held-out requests are a fair sample of all requests.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "bfcl_eval"
INSTALL = "pip install --no-deps bfcl-eval==2026.3.23"
TASK = "tool"

#: Files with requests and the functions offered; ``possible_answer/`` says which of these answer.
REQUEST_FILES = (
    "simple_python",
    "simple_java",
    "simple_javascript",
    "multiple",
    "parallel",
    "parallel_multiple",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
)
#: Files whose functions join the corpus (no offered function answers, or it is not said which one does).
FUNCTION_FILES = ("irrelevance", "live_irrelevance", "live_relevance")

#: Negatives of a row whose request came with no other tool.
RANDOM_NEGATIVES = 4


Render = Callable[[dict[str, Any]], str]


class SampleDataError(Exception):
    """A problem that the user can fix; its text is the whole message."""


@dataclass(frozen=True)
class Tool:
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


def find_data_dir() -> Path:
    """The data folder of the installed package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "data"
        if folder.is_dir():
            return folder
    raise SampleDataError(f"the sample data needs the package bfcl-eval; install it with: {INSTALL}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one JSON-lines file of the package."""
    try:
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError) as error:
        raise SampleDataError(f"cannot read {path} ({error}); reinstall it with: {INSTALL}") from error


def split_words(identifier: str) -> str:
    """``GeometryPresentation.createPresentation`` -> ``Geometry Presentation create Presentation``."""
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", identifier)
    return re.sub(r"[\W_]+", " ", spaced).strip()


def normalise(text: str) -> str:
    """Letters and digits in lower case: names or descriptions that differ in nothing else are the same."""
    return re.sub(r"[\W_]+", "", text).lower()


def render_tool(function: dict[str, Any]) -> str:
    """The text under which a function is retrieved: its name as words, its description, its parameters.

    The parameters' descriptions are left out: they more than double the length (and so the time), and a tuned
    MiniLM found tools no better with them.
    """
    schema = function.get("parameters") or {}
    parameters = [split_words(name).lower() for name in schema.get("properties") or {}]
    text = f"{split_words(function['name'])}. {function['description'].strip()}"
    if parameters:
        text += f" Parameters: {', '.join(parameters)}"
    return re.sub(r"\s+", " ", text)


def load(data_dir: Path, render: Render = render_tool) -> tuple[list[Tool], list[Request]]:
    """All tools, in order of first sight, and all requests that at least one offered tool answers."""
    tools: list[Tool] = []
    tool_ids: dict[tuple[str, str], int] = {}
    requests: dict[str, Request] = {}

    def tool_id(function: dict[str, Any]) -> int:
        key = (function["name"], function["description"])
        if key not in tool_ids:
            tool_ids[key] = len(tools)
            tools.append(Tool(*key, text=render(function)))
        return tool_ids[key]

    for stem in REQUEST_FILES:
        answering = {
            row["id"]: {name for call in row["ground_truth"] for name in call}
            for row in read_rows(data_dir / "possible_answer" / f"BFCL_v4_{stem}.json")
        }
        for row in read_rows(data_dir / f"BFCL_v4_{stem}.json"):
            query = "\n".join(m["content"] for m in row["question"][0] if m["role"] == "user").strip()
            names = answering[row["id"]]
            ids = [(function["name"] in names, tool_id(function)) for function in row["function"]]
            if not query or not any(answers for answers, _ in ids):
                continue
            request = requests.setdefault(query, Request(row["id"], query, stem.startswith("live"), [], []))
            for answers, number in ids:
                (request.answers if answers else request.offered).append(number)
    for stem in FUNCTION_FILES:
        for row in read_rows(data_dir / f"BFCL_v4_{stem}.json"):
            for function in row["function"]:
                tool_id(function)
    for path in sorted((data_dir / "multi_turn_func_doc").glob("*.json")):
        for function in read_rows(path):
            tool_id(function)

    for request in requests.values():
        request.answers = sorted(set(request.answers))
        request.offered = sorted(set(request.offered) - set(request.answers))
    return tools, list(requests.values())


class Groups:
    """Union-find over hashable items."""

    def __init__(self) -> None:
        self._parent: dict[Any, Any] = {}

    def find(self, item: Any) -> Any:
        """The representative of the item's group."""
        root = item
        while self._parent.setdefault(root, root) != root:
            root = self._parent[root]
        while self._parent[item] != root:
            self._parent[item], item = root, self._parent[item]
        return root

    def join(self, first: Any, second: Any) -> None:
        """Make the groups of both items one."""
        self._parent[self.find(first)] = self.find(second)


def group_by_name(tools: Sequence[Tool], requests: Sequence[Request]) -> tuple[list[Any], list[Any]]:
    """The group of every tool and of every request (see the module's text)."""
    groups = Groups()
    for number, tool in enumerate(tools):
        groups.join(number, ("name", normalise(tool.name)))
        groups.join(number, ("text", normalise(tool.description) or normalise(tool.name)))
        groups.join(number, ("text", normalise(tool.text)))
    for request in requests:
        for number in request.answers[1:]:
            groups.join(request.answers[0], number)
    return (
        [groups.find(number) for number in range(len(tools))],
        [groups.find(request.answers[0]) for request in requests],
    )


def draw_groups(groups: Sequence[list[Request]], every: int, rng: random.Random) -> set[int]:
    """One group of every ``every``, at random among groups of like origin and size."""
    order = list(range(len(groups)))
    rng.shuffle(order)
    order.sort(key=lambda g: (sum(r.live for r in groups[g]) * 2 > len(groups[g]), len(groups[g])))
    start = -rng.randrange(every)
    chosen = set()
    for first in range(start, len(order), every):
        pick = first + rng.randrange(every)
        if 0 <= pick < len(order):
            chosen.add(order[pick])
    return chosen


def split(
    requests: Sequence[Request], request_groups: Sequence[Any], test_every: int, dev_every: int, seed: int
) -> tuple[list[Request], list[Request], list[Request]]:
    """Train, dev and test requests, by whole groups, each in the order of the source."""
    members: dict[Any, list[Request]] = defaultdict(list)
    for request, group in zip(requests, request_groups, strict=True):
        members[group].append(request)
    rng = random.Random(seed)
    parts: dict[str, set[str]] = {}
    groups = list(members.values())
    for part, every in (("test", test_every), ("dev", dev_every)):
        chosen = draw_groups(groups, every, rng)
        parts[part] = {request.query_id for g in chosen for request in groups[g]}
        groups = [group for g, group in enumerate(groups) if g not in chosen]
    held_out = parts["test"] | parts["dev"]
    return (
        [request for request in requests if request.query_id not in held_out],
        [request for request in requests if request.query_id in parts["dev"]],
        [request for request in requests if request.query_id in parts["test"]],
    )


def training_rows(
    tools: Sequence[Tool],
    requests: Sequence[Request],
    tool_groups: Sequence[Any],
    barred: set[Any],
    max_per_name: int,
    rng: random.Random,
) -> list[dict[str, Any]]:
    """One row for every request and tool that answers it, at most ``max_per_name`` rows for one name.

    The cap makes it rare that rows of one function meet in a batch, where each would be a false negative of
    the other. A row's first positive is its own; the request's other answers follow. Negatives are the tools
    offered with the request that do not answer it, else random tools of other groups than the answers'. No
    negative is of a ``barred`` group.
    """
    allowed = [number for number, group in enumerate(tool_groups) if group not in barred]
    pairs = [(request, number) for request in requests for number in request.answers]
    rng.shuffle(pairs)
    taken: dict[str, int] = defaultdict(int)
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


def evaluation_rows(requests: Iterable[Request]) -> list[dict[str, Any]]:
    """Requests with the corpus rows that answer them."""
    return [
        {"query_id": request.query_id, "query": request.query, "pos_index": request.answers, "task": TASK}
        for request in requests
    ]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines under a temporary name, then rename: the file is whole or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SampleDataError(f"cannot write {path}: {error.strerror or error}") from error


def build(args: argparse.Namespace) -> str:
    """Write the four files and return the line of counts."""
    tools, requests = load(find_data_dir())
    tool_groups, request_groups = group_by_name(tools, requests)
    train, dev, test = split(requests, request_groups, args.test_every, args.dev_every, args.seed)
    barred = {tool_groups[number] for request in [*dev, *test] for number in request.answers}
    rows = training_rows(tools, train, tool_groups, barred, args.max_per_name, random.Random(args.seed))
    folder = Path(args.output_dir) / TASK
    write_rows(folder / "corpus.json", ({"text": tool.text, "name": tool.name} for tool in tools))
    write_rows(folder / "test.json", evaluation_rows(test))
    write_rows(folder / "dev.json", evaluation_rows(dev))
    write_rows(folder / "train.json", rows)
    return (
        f"{len(requests)} requests, {len(tools)} tools, {len(rows)} train pairs, {len(dev)} dev requests, "
        f"{len(test)} held-out requests, in {folder}"
    )


def whole_number(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least ``least``."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
        return number

    return parse


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Build the tool-retrieval sample data from the installed package bfcl-eval.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", default="data/sample", help="folder in which tool/ is written")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of the random negatives")
    group = parser.add_argument_group("split and selection")
    group.add_argument(
        "--test_every", type=whole_number(2), default=6, help="hold out one group of requests in this many"
    )
    group.add_argument(
        "--dev_every",
        type=whole_number(2),
        default=12,
        help="dev.json takes one group in this many of the rest",
    )
    group.add_argument(
        "--max_per_name", type=whole_number(1), default=4, help="training rows of one function name, at most"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 0, or 2 after one line about what to fix."""
    try:
        print(build(parse_args(argv)))
    except SampleDataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
