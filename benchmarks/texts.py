"""Real text for benchmarks that every installation has: the documentation strings of installed packages."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import random
import sys
import tempfile
from pathlib import Path

from src.utils.files import read_json, write_json

DISTRIBUTIONS = ("transformers", "numpy", "scikit-learn", "scipy", "sentence-transformers", "accelerate")
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

    Finding them takes a minute, so that they are kept among the temporary files for the next process.

    Raises:
        ValueError: the installed packages have fewer.
    """
    cache = cache_file(count, seed)
    if not cache.exists():
        write_json(cache, _find_passages(count, seed))
    return read_json(cache, "passages")


def cache_file(count: int, seed: int) -> Path:
    """Where they are kept."""
    versions = [importlib.metadata.version(name) for name in (*DISTRIBUTIONS, "torch")]
    made_of = json.dumps([count, seed, sys.version, versions])
    return Path(tempfile.gettempdir()) / f"passages-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.json"


def _find_passages(count: int, seed: int) -> list[str]:
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
