#!/usr/bin/env python3
"""Build the sample data: real user requests and the tools that answer them, for tool retrieval.

The source is the installed package ``bfcl-eval`` (Berkeley Function Calling Leaderboard, Apache-2.0). Only its data
files are read; the package is never imported, so none of its many dependencies is needed::

    pip install --no-deps bfcl-eval==2026.3.23
    python scripts/sample_data.py

Written below ``--output_dir`` (JSON lines, the same bytes for the same arguments):

- ``tool/corpus.json``  every tool: ``text`` (what is retrieved), ``name``; the row number is the tool's index
- ``tool/test.json``    held-out requests: ``query_id``, ``query``, ``pos_index``, ``task``
- ``tool/dev.json``     likewise, for choosing settings
- ``tool/train.json``   requests with ``pos``, ``neg`` (texts) and ``pos_index``, ``neg_index``

What is a tool: functions that agree in name and description are one tool (the first schema is kept). What is a
request: one user message; equal messages are one request, answered by the tools of all of them.

The split is by function name. Requests that share a function name or a tool description, directly or through other
requests, form a group, and a group lies wholly in test, dev or train. No tool that answers a test request, and no other
tool of the same name or description, occurs in train or dev rows, neither as a positive nor as a negative; the same
holds between dev and train. Groups are drawn at random within strata (origin and size of the group), each with the
same chance, so that the held-out requests are a fair sample of all requests.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
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
    """The text under which a function is retrieved: its name as words, its description and its parameters."""
    schema = function.get("parameters") or {}
    parameters = []
    for name, parameter in (schema.get("properties") or {}).items():
        description = parameter.get("description", "") if isinstance(parameter, dict) else ""
        words = split_words(name).lower()
        parameters.append(f"{words}: {description.strip()}" if description.strip() else words)
    text = f"{split_words(function['name'])}. {function['description'].strip()}"
    if parameters:
        text += f" Parameters: {'; '.join(parameters)}"
    return re.sub(r"\s+", " ", text)


def load(data_dir: Path, render: Callable[[dict[str, Any]], str] = render_tool) -> tuple[list[Tool], list[Request]]:
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
            ids = [(function["name"] in answering[row["id"]], tool_id(function)) for function in row["function"]]
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
