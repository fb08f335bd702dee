"""Compare the installed packages with those that the project requires. Needs none of them."""

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
    "deepspeed": "--deepspeed",
    "gpu": "FAISS indexes on a GPU",
    "lm": "language models in .gguf files",
    "lora": "--lora_r",
    "qlora": "--load_in_4bit",
    "eval": "ROUGE-L and F1 of the evaluations, and the leaderboard's drawing",
    "dev": "tests and lint",
}
#: Any of them brings FAISS.
FAISS_PACKAGES = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12")


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was examined, its state, and what to do about it; `required` by everything else."""

    name: str
    status: str
    detail: str
    advice: str = ""
    required: bool = False

    @property
    def failed(self) -> bool:
        """Whether something required is missing or a problem."""
        return self.required and self.status != OK


def judge(
    name: str, good: bool, detail: str, advice: str = "", required: bool = False, otherwise: str = PROBLEM
) -> Finding:
    """Make a finding that is ok, or has another status and advice."""
    return Finding(name, OK if good else otherwise, detail, "" if good else advice, required)


def installed(*names: str) -> str | None:
    """The version of the first of these packages that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_packages() -> Iterator[Finding]:
    """Python, and each required package with its versions."""
    detail, good = f"{platform.python_version()} at {sys.executable}", sys.version_info >= (3, 10)
    yield judge("python", good, detail, "install Python 3.10 or newer", True)
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(text) for text in requires(PROJECT) or ()]
    except (ImportError, PackageNotFoundError) as error:
        advice = "run pip install -e . in the project's folder"
        yield Finding("packages", MISSING, f"{PROJECT} is not installed ({error})", advice, True)
        return
    for requirement in requirements:
        marker = requirement.marker
        extras = [extra for extra in ("", *EXTRAS) if marker is None or marker.evaluate({"extra": extra})]
        # FAISS on GPUs is a finding of the machine.
        if extras and extras[0] != "gpu":
            yield check_package(requirement, extras[0])


def check_package(requirement: Any, extra: str) -> Finding:
    """Judge a package (a requirement of `packaging`) of an extra; without one it is required."""
    name, required = requirement.name, not extra
    present = installed(*(FAISS_PACKAGES if name in FAISS_PACKAGES else (name,)))
    advice = f"pip install -e '.[{extra}]', needed for {EXTRAS[extra]}" if extra else "pip install -e ."
    if present is None:
        return Finding(name, MISSING, "not installed", advice, required)
    good = requirement.specifier.contains(present, prereleases=True)
    detail = present if good else f"{present}, where {requirement.specifier} is asked for"
    return judge(name, good, detail, advice, required)
