"""Flags of the command line: fields of dataclasses, help in groups, and what a mistyped flag may have meant.

Imports nothing that takes long, so that ``--help`` and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
from collections.abc import Collection, Iterable, Sequence
from dataclasses import MISSING, Field, fields
from enum import Enum
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from src.utils.errors import UserError

TRUE = ("yes", "true", "t", "y", "1")
FALSE = ("no", "false", "f", "n", "0")
#: What help calls a value.
VALUE_NAMES = {int: "INT", float: "NUMBER", str: "TEXT"}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the one among those `known` that is like it, if there is one."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f", did you mean {near[0]!r}?" if near else ""


def to_bool(text: str) -> bool:
    """Read the value of a flag that is on or off."""
    if text.lower() in TRUE + FALSE:
        return text.lower() in TRUE
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows each flag once, under its first name, with its default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or isinstance(action, argparse._HelpAction):
            return super()._format_action_invocation(action)
        values = self._format_args(action, self._get_default_metavar_for_optional(action)) if action.nargs != 0 else ""
        return f"{action.option_strings[0]} {values}".strip()

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == argparse.ONE_OR_MORE and isinstance(action.metavar, str):
            return f"{action.metavar} ..."
        return super()._format_args(action, default_metavar)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        if (
            not text
            or not action.option_strings
            or default in (None, [], "", argparse.SUPPRESS)
            or "%(default)" in text
        ):
            return text
        if action.nargs == 0 and not default:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else getattr(default, "value", default)
        return f"{text} (default: {str(shown).replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """argparse's parser; mistakes are UserErrors, and name the flag that may have been meant."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, "allow_abbrev": False, **settings})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See argparse."""
        namespace, rest = self.parse_known_args(args, namespace)
        if rest:
            self.refuse(rest)
        return namespace

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Raise a UserError for words that no flag takes."""
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        hint = did_you_mean(flags[0], self._option_string_actions) if flags else ""
        raise UserError(f"unknown arguments: {' '.join(words)}{hint or ' (see --help)'}")

    def error(self, message: str) -> NoReturn:
        """Raise a UserError."""
        raise UserError(f"{message} (see --help)")


def flags_parser(classes: Sequence[type], hidden: Collection[str] = (), **settings: Any) -> Parser:
    """A parser with a flag for each field of dataclasses, which share none.

    A group of the help is named after the class that defines its flags, by the first line of what the class says of
    itself. Help leaves out `hidden` flags, and those whose metadata say ``hidden``.
    """
    parser = Parser(**settings)
    for kind in classes:
        hints = get_type_hints(kind)
        groups: dict[type, Any] = {}
        by_name = {field.name: field for field in fields(kind) if field.init}
        for owner in _owners(kind):
            for name in inspect.get_annotations(owner):
                field = by_name.pop(name, None)
                if field is None:
                    continue
                if owner not in groups:
                    title = (owner.__doc__ or "").partition("\n")[0].strip().removesuffix(".")
                    groups[owner] = parser.add_argument_group(title)
                _add_flag(groups[owner], field, hints[name], hidden)
    return parser


def _owners(kind: type) -> list[type]:
    """A dataclass and its bases, the most special of each flag before those it overrides; first what says so."""
    found = [each for each in kind.__mro__ if hasattr(each, "__dataclass_fields__")]
    return sorted(found, key=lambda each: "first_in_help" not in vars(each))


def _add_flag(group: Any, field: Field[Any], hint: Any, hidden: Collection[str]) -> None:
    settings = dict(field.metadata)
    names = [f"--{field.name}", *([f"--{field.name.replace('_', '-')}"] if "_" in field.name else [])]
    if settings.pop("hidden", False) or field.name in hidden:
        settings["help"] = argparse.SUPPRESS
    kind = _one_type(hint)
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    if default is MISSING:
        settings["required"] = True
    else:
        settings["default"] = default
    if kind in (bool, bool | None):
        settings |= {"type": to_bool, "metavar": "BOOL"}
        if kind is bool or default is not None:
            settings |= {"nargs": "?", "const": True}
    elif get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, Enum)):
        words = get_args(kind) or [each.value for each in kind]
        settings |= {"type": str, "choices": words, "metavar": "WORD"}
    else:
        item = (get_args(kind) or (str,))[0] if get_origin(kind) is list else kind
        settings |= {"type": item, "metavar": VALUE_NAMES.get(item, "VALUE")}
        if get_origin(kind) is list:
            # Of another default, such as an empty text, argparse would make a value.
            settings |= {"nargs": "+", "default": default if isinstance(default, list) else None}
    group.add_argument(*names, **settings)
    if default is True and kind in (bool, bool | None):
        # After the flag itself, whose action is the first of its name.
        no = (f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}")
        group.add_argument(*no, action="store_false", dest=field.name, default=False, help=argparse.SUPPRESS)


def _one_type(hint: Any) -> Any:
    """The type of a flag's value, as transformers' HfArgumentParser chooses it from a union."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    first, second, *_ = kinds = get_args(hint)
    if type(None) not in kinds:
        return first if second is str else second
    if bool in kinds:
        return hint
    return first if second is type(None) else second
