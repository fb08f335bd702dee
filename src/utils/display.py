"""Readable numbers: sizes, counts and quantiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

#: A label and a text; see `src.utils.cli.show_plan`.
Line = tuple[str, str]

QUANTILES = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}


def human_bytes(size: float) -> str:
    """Bytes with a fitting unit."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def metric_text(value: float) -> str:
    """A metric in four decimals; a count, which is whole and above 1, as it is."""
    return f"{value:.0f}" if value > 1 and value == int(value) else f"{value:.4f}"


def describe_tasks(counts: Mapping[str, int]) -> str:
    """The number of rows of each task."""
    return "task " + ", ".join(f"{task} {count:,}" for task, count in sorted(counts.items()))


def summarize(values: Iterable[float] | Mapping[float, int]) -> dict[str, float]:
    """``count``, ``min``, ``median``, ``p95`` and ``max`` of numbers (or of counts by number); 0 for none.

    A quantile is the smallest number which at least that share does not exceed.
    """
    counts = Counter(values)
    numbers = sorted(counts) or [0]
    reached = np.cumsum([counts[number] for number in numbers])
    quantiles = {name: numbers[np.searchsorted(reached, share * reached[-1])] for name, share in QUANTILES.items()}
    return {"count": int(reached[-1]), **quantiles}


def describe(values: Iterable[float] | Mapping[float, int]) -> str:
    """Median, 95 % quantile and maximum in words."""
    shown = {
        name: f"{value:,.0f}" if value == int(value) else f"{value:,.4g}" for name, value in summarize(values).items()
    }
    return f"median {shown['median']}, 95 % up to {shown['p95']}, max {shown['max']}"
