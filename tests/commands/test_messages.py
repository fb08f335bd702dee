"""What messages tell users to do, each command can: the flags that they name exist there."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import sys
from collections.abc import Iterator

import pytest

from evaluation.runner.run import run_task
from tests.helpers import ROOT, evaluation_class

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for pattern in ("run_*.py", "src/**/*.py", "evaluation/*.py", "scripts/*.py")
    for path in sorted(ROOT.glob(pattern))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
COMMANDS = [name for name in TREES if re.match(r"run_|evaluation\.(eval_|report)|scripts\.", name)]
# It loads what the quickstart has written.
COMMANDS.remove("scripts.quickstart_report")
COMMANDS += ["src.validate.__main__", "src.doctor.__main__", "src.retrieval.report.plot"]
#: Of other programs.
FOREIGN = {"nproc_per_node", "no-deps"}
#: What names flags that some of the commands that use it lack, and why that is right.
ELSEWHERE = {
    **dict.fromkeys(("load_adapters", "add_adapters", "TextEncoder"), "of a training run, which has the flags"),
    **dict.fromkeys(("SourceSettings", "append_eos", "check_reads_alike"), "of a training run, too"),
    "check_alike": "of the training run that a model comes from",
    **dict.fromkeys(("load_encoder", "_read_modules", "_st_pooling"), "of an encoder, where it can be loaded"),
    "instruction_for": "only where texts get instructions",
    **dict.fromkeys(("packer_of", "may_pack"), "only where the flag is"),
    "_check_head": "of an encoder in a ranker's place, which run_ranker.py trains",
    "_chosen_pooling": "only where instructions are given",
    "DenseRetriever": "of two encoders, which such a command has not",
    **dict.fromkeys(("choose_engine", "find_anserini", "_jar_in", "_jar_of_pyserini"), "only to retrieve"),
    **dict.fromkeys(("read_history", "draw", "read_results"), "of the runs whose logs these are"),
}


def definitions(tree: ast.Module) -> dict[str, ast.AST]:
    """Functions, classes and constants of a module."""
    found: dict[str, ast.AST] = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        found |= dict.fromkeys([getattr(node, "name", None) or "", *names], node)
    return found


def imports(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Name in a module → (module of ours, name there, empty for the module itself)."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found[alias.asname or alias.name] = (whole, "") if whole in TREES else (node.module, alias.name)
    return found


DEFINED = {name: definitions(tree) for name, tree in TREES.items()}
IMPORTED = {name: imports(tree) for name, tree in TREES.items()}


def uses(module: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    """What of our modules a piece of code refers to."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
            where, name = IMPORTED[module].get(inner.value.id, ("", "x"))
            yield (where, inner.attr) if not name else ("", "")
        elif isinstance(inner, ast.Name):
            yield IMPORTED[module].get(inner.id, (module, inner.id))


def reached(module: str) -> set[tuple[str, str]]:
    """All that a command may run, by module and name."""
    waiting, found = [(module, name) for name in DEFINED[module]], set()
    while waiting:
        where, name = waiting.pop()
        if (where, name) not in found and name in DEFINED.get(where, {}):
            found.add((where, name))
            waiting += uses(where, DEFINED[where][name])
    return found


def named_flags(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Flags in messages of errors and of the log, and the message."""
    for inner in ast.walk(node):
        logs = isinstance(inner, ast.Call) and getattr(inner.func, "attr", "") in ("info", "warning")
        if logs or isinstance(inner, ast.Raise):
            parts = [part.value for part in ast.walk(inner) if isinstance(part, ast.Constant)]
            text = "".join(part for part in parts if isinstance(part, str))
            yield from ((flag, text) for flag in re.findall(r"(?<![\w-])--([a-zA-Z][\w-]+)", text))


class Parsed(BaseException):
    """The command's parser is known: nothing is run."""


def flags_of(command: str, monkeypatch) -> set[str]:
    """All flags that a command takes."""

    def parse(parser, *args, **kwargs):
        raise Parsed({option.lstrip("-") for option in parser._option_string_actions})

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    monkeypatch.setattr(sys, "argv", [command])
    module = importlib.import_module(command)
    with pytest.raises(Parsed) as parsed:
        module.main() if hasattr(module, "main") else run_task(evaluation_class(module))
    return parsed.value.args[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_that_messages_name_are_there(command, monkeypatch):
    own = flags_of(command, monkeypatch) | FOREIGN
    # Settings speak of their own flags, messages that begin with one of what was given; some name the command to take.
    wrong = [
        f"{module}.{name}: --{flag}"
        for module, name in sorted(reached(command))
        if not name.endswith("Args") and name not in ELSEWHERE
        for flag, text in named_flags(DEFINED[module][name])
        if flag not in own and not text.startswith(f"--{flag}") and not re.search(r"run_\w+\.py", text)
    ]
    assert not wrong
