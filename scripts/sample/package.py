"""Packages that carry sample data or weights: where they are installed. They are never imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from src.utils.errors import UserError


def package_folder(module: str, install: str) -> Path:
    """Folder of an installed package; `install` is what to do, for the message, when it is missing."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the sample data needs a package that is not installed: {install}")
    return Path(next(iter(spec.submodule_search_locations)))
