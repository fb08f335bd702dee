"""Settings from a file, in YAML or JSON; and flags from one, checked as the command line is."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin

import yaml
from transformers.hf_argparser import string_to_bool

from src.utils.errors import UserError
from src.utils.files import read_json

#: How a message calls what a flag takes.
KINDS: dict[Any, str] = {string_to_bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def read_arguments(path: str, actions: Mapping[str, argparse.Action], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Read the values of flags from a file.

    Args:
        path: ``.json``, or anything else for YAML.
        actions: by flag name, what the command line does with it.
        hints: by flag name, the type of the field that it fills.

    Returns:
        Values as the command line would give them.

    Raises:
        UserError: the file is missing or broken, names no flag, or has a value of another type than a flag takes.
    """
    found = read_settings(path, "--config")
    if not isinstance(found, dict):
        raise UserError(f"--config {path} must hold flag names with values, found {type(found).__name__}")
    values = {}
    for name, value in found.items():
        if name not in actions:
            near = difflib.get_close_matches(str(name), actions, 1)
            raise UserError(f"--config {path}: {name!r} is no flag" + (f", did you mean {near[0]!r}?" if near else ""))
        values[name] = _convert(f"--config {path}: {name}", value, actions[name], hints[name])
    return values


class _UniqueNames(yaml.SafeLoader):
    """Takes no mapping in which a name stands twice, of which all but the last would be lost."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and (name.tag, name.value) in seen:
                problem = f"{name.value!r} stands there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=name.start_mark)
            seen.add((name.tag, str(name.value)))
        return node


def read_settings(path: str, flag: str) -> Any:
    """What a file of settings holds.

    Args:
        path: JSON when it ends in ``.json``, else YAML.
        flag: the argument it came from, with dashes.

    Raises:
        UserError: the file is missing or broken, or has a name twice in one place.
    """
    if path.endswith(".json"):
        return read_json(path, flag, unique_names=True)
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.load(file, _UniqueNames)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{flag}: no such file: {path}") from error
    except RecursionError as error:
        raise UserError(f"{flag}: {path} is not valid YAML: nested too deeply") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise UserError(f"{flag}: {where} is not valid YAML: {getattr(error, 'problem', error)}") from error


def _convert(where: str, value: Any, action: argparse.Action, hint: Any) -> Any:
    takes = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and (types.NoneType in takes or action.default is None):
        return None
    # A few of transformers' flags take JSON text on the command line, thus the same without quotes here.
    if isinstance(value, dict) and any(dict in (one, get_origin(one)) for one in takes):
        return value
    if action.const is True and action.type is not string_to_bool and isinstance(value, bool):
        # A flag that may stand alone, or be followed by text.
        return True if value else None
    if action.nargs == "+":
        # One value counts as a list, as on the command line.
        items = value if isinstance(value, list) else [value]
        return [_scalar(f"{where}[{place}]", item, action, False) for place, item in enumerate(items)]
    return _scalar(where, value, action, str in takes)


def _scalar(where: str, value: Any, action: argparse.Action, takes_text: bool) -> Any:
    """One value as the command line would give it; `takes_text` for switches that may also be words."""
    kind: Any = action.type
    if action.choices is not None:
        if value not in action.choices:
            raise UserError(f"{where} {value!r} is unknown: choose from {', '.join(map(str, action.choices))}")
        return kind(value)
    if kind is string_to_bool:
        accepted = isinstance(value, bool | str if takes_text else bool)
    elif kind is float:
        # YAML reads 1e-4 as text.
        accepted = isinstance(value, int | float | str) and not isinstance(value, bool)
    else:
        accepted = isinstance(value, int if kind is int else str) and not isinstance(value, bool)
    if accepted:
        with contextlib.suppress(ValueError, argparse.ArgumentTypeError):
            return kind(value)
    wanted = KINDS.get(kind, getattr(kind, "__name__", "another value"))
    advice = f', put it in quotes: "{value}"' if kind is str and isinstance(value, bool | int | float) else ""
    raise UserError(f"{where} must be {wanted}, found {value!r} ({type(value).__name__}){advice}")
