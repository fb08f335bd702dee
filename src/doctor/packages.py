"""The installed packages against what the project asks for. Needs none of them."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

OK, MISSING, PROBLEM = "ok", "missing", "problem"
PROJECT = "llm-embedder-toolkit"
#: What the extras of the project are for.
EXTRAS = {
    "bm25": "the embedded BM25 engine (--retrieval_method bm25)",
    "bench": "benchmarks of training against sentence-transformers",
    "deepspeed": "--deepspeed",
    "gpu": "FAISS indexes on a GPU",
    "lm": "language models in .gguf files",
    "lora": "--lora_r",
    "eval": "ROUGE-L and F1 of the evaluations, and the leaderboard's drawing",
    "dev": "tests and lint",
}
#: Any of them brings FAISS.
FAISS_PACKAGES = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12")


@dataclass(frozen=True)
class Finding:
    """One line of `src.doctor.__main__`.

    Attributes:
        name: what was looked at.
        status: ``ok``, ``missing`` or ``problem``.
        detail: what was found.
        advice: what to do, and what it is needed for; empty when all is well.
        required: whether nothing works without it.
    """

    name: str
    status: str
    detail: str
    advice: str = ""
    required: bool = False

    @property
    def failed(self) -> bool:
        """Whether something required is not as it must be."""
        return self.required and self.status != OK


def installed(*names: str) -> str | None:
    """The version of the first of these packages that is there."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_packages() -> Iterator[Finding]:
    """Python, and each package that the project asks for with the versions it asks for."""
    good = sys.version_info >= (3, 10)
    advice = "" if good else "install Python 3.10 or newer"
    yield Finding("python", OK if good else PROBLEM, f"{platform.python_version()} at {sys.executable}", advice, True)
    try:
        from packaging.requirements import Requirement

        wanted = [Requirement(text) for text in requires(PROJECT) or ()]
    except (ImportError, PackageNotFoundError) as error:
        advice = "run pip install -e . in the project's folder"
        yield Finding("packages", MISSING, f"{PROJECT} is not installed ({error})", advice, True)
        return
    for requirement in wanted:
        marker = requirement.marker
        extras = [extra for extra in ("", *EXTRAS) if marker is None or marker.evaluate({"extra": extra})]
        # What GPUs bring to FAISS is looked at where GPUs are.
        if extras and extras[0] != "gpu":
            yield check_package(requirement, extras[0])


def check_package(requirement: Any, extra: str) -> Finding:
    """A package (a `packaging` requirement) of an extra, or one that all needs (an empty extra)."""
    name, required = requirement.name, not extra
    found = installed(*(FAISS_PACKAGES if name in FAISS_PACKAGES else (name,)))
    advice = f"pip install -e '.[{extra}]', needed for {EXTRAS[extra]}" if extra else "pip install -e ."
    if found is None:
        return Finding(name, MISSING, "not installed", advice, required)
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding(name, PROBLEM, f"{found}, where {requirement.specifier} is asked for", advice, required)
    return Finding(name, OK, found, "", required)
