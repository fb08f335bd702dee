"""Settings from a YAML or JSON file; and flags from one, as words of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, get_args, get_origin

import yaml

from src.utils.errors import UserError
from src.utils.files import read_json
from src.utils.parser import did_you_mean


def read_arguments(
    path: str, actions: Mapping[str, argparse.Action], hints: Mapping[str, Any]
) -> tuple[list[str], dict[str, Any]]:
    """Read flags from a file, as command line words and as values that no word expresses (None, empty, an object).

    `actions` of the command line and `hints`, the types of the fields, are by flag name.
    """
    settings = read_settings(path, "--config")
    if not isinstance(settings, dict):
        raise UserError(f"--config {path} must hold flag names with values, found {type(settings).__name__}")
    words: list[str] = []
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in actions:
            raise UserError(f"--config {path}: {name!r} is no flag{did_you_mean(str(name), actions)}")
        action, where = actions[name], f"--config {path}: {name}"
        if value is None or value == [] or isinstance(value, dict):
            if type(value) not in {get_origin(kind) or kind for kind in (hints[name], *get_args(hints[name]))}:
                raise UserError(f"{where} cannot be {value!r}")
            values[name] = value
        elif action.nargs == "+":
            # One value counts as a list, as on the command line.
            items = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(_word(f"{where}[{place}]", item, action) for place, item in enumerate(items))]
        elif action.nargs == "?" and value is True:
            words.append(f"--{name}")
        elif action.nargs == "?" and value is False and action.type is str:
            # As when the flag is left out.
            values[name] = None
        else:
            words.append(f"--{name}={_word(where, value, action)}")
    return words, values


def _word(where: str, value: Any, action: argparse.Action) -> str:
    if action.type is str and not isinstance(value, str):
        advice = f', put it in quotes: "{value}"' if isinstance(value, bool | int | float) else ""
        raise UserError(f"{where} must be text, found {value!r} ({type(value).__name__}){advice}")
    return str(value)


class _UniqueNames(yaml.SafeLoader):
    """Refuses a mapping with a name twice, of which all but the last would be lost."""

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
    """Read the JSON (``.json``) or YAML file that `flag` names; no object may have a name twice."""
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
