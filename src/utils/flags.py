"""Fields and checks of the settings classes."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import field, fields
from typing import Any

from src.utils.errors import UserError

#: Precisions, as flags name them.
DTYPE_NAMES = ("fp32", "fp16", "bf16")


def flag(default: Any, help: str, hidden: bool = False) -> Any:
    """A dataclass field that is a command line flag; ``--help`` leaves out a `hidden` one."""
    metadata = {"help": help, "hidden": hidden}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def flags_of(settings: type, args: Any) -> dict[str, Any]:
    """The fields of a settings dataclass that are flags of `args` too, with their values."""
    return {each.name: getattr(args, each.name) for each in fields(settings) if hasattr(args, each.name)}


def dry_run_flag() -> Any:
    """The field of ``--dry_run``."""
    return flag(False, "Check flags, data and models' settings, print what the run would do, and write nothing.")


def data_root_flag() -> Any:
    """The field of ``--data_root``."""
    text = "What the path prefix llm-embedder: stands for (LLM_EMBEDDER_DATA sets the default)."
    return field(default_factory=default_data_root, metadata={"help": text})


def check_choice(flag: str, value: str | None, choices: Collection[str]) -> None:
    """Raise a UserError naming the choices unless `value` is one of them (or None)."""
    if value is not None and value not in choices:
        raise UserError(f"--{flag} {value!r} is unknown: choose from {', '.join(choices)}")


def check_name(flag: str, value: str | None, needed: bool = False) -> None:
    """Raise a UserError for a name that cannot be part of a file name, or for none where one is `needed`."""
    elsewhere = value and (os.sep in value or "\0" in value or value in (os.curdir, os.pardir))
    if elsewhere or (value and value.isspace()) or (needed and not value):
        raise UserError(f"--{flag} {value!r} becomes a part of file names: it must not be blank, nor hold {os.sep!r}")


def check_positive(settings: object, *flags: str) -> None:
    """Raise a UserError for the first of these flags whose value, other than None, is not above 0."""
    for flag in flags:
        value = getattr(settings, flag)
        # Nor is NaN.
        if value is not None and not value > 0:
            raise UserError(f"--{flag} must be above 0, found {value}")


def refuse(cases: Mapping[str, object]) -> None:
    """Raise a UserError with the first message whose case is true."""
    for message, case in cases.items():
        if case:
            raise UserError(message)


def default_data_root() -> str:
    """The folder that LLM_EMBEDDER_DATA names, or that of the released data."""
    return os.environ.get("LLM_EMBEDDER_DATA", "/data/llm-embedder")
