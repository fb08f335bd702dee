"""Real text for benchmarks that every installation has: the documentation strings of installed packages."""

from __future__ import annotations

import ast
import importlib.util
import random
from pathlib import Path

PACKAGES = ("torch", "transformers", "numpy", "sklearn", "scipy", "sentence_transformers", "accelerate")


def _docstrings(file: Path) -> list[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [paragraph for text in found if text for paragraph in text.split("\n\n")]


def passages(count: int, seed: int = 0) -> list[str]:
    """`count` paragraphs of 5 words or more, no two alike, in random order.

    Raises:
        ValueError: the installed packages have fewer.
    """
    texts: dict[str, None] = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        for folder in spec.submodule_search_locations or () if spec else ():
            for file in sorted(Path(folder).rglob("*.py")):
                texts |= dict.fromkeys(" ".join(text.split()) for text in _docstrings(file))
        usable = [text for text in texts if len(text.split()) >= 5]
        if len(usable) >= 4 * count:
            break
    if len(usable) < count:
        raise ValueError(f"{len(usable)} paragraphs found, {count} wanted")
    return random.Random(seed).sample(usable, count)
