"""Counts of values: their quantiles, in memory that grows with the different values and not with how many there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


def shown(value: float) -> str:
    """A number for people: four digits, or all of a whole one."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.4g}"


class Distribution:
    """Values counted as they come.

    Args:
        values: the first of them.
        digits: significant digits that are kept of each (None: all), so that there are not too many different ones.
    """

    def __init__(self, values: Iterable[float] = (), digits: int | None = None) -> None:
        self.digits = digits
        self.counts: Counter[float] = Counter()
        for value in values:
            self.add(value)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[value if self.digits is None else float(f"{value:.{self.digits}g}")] += 1

    @property
    def mean(self) -> float:
        """Arithmetic mean; 0 without values."""
        return sum(value * count for value, count in self.counts.items()) / max(len(self), 1)

    def quantile(self, share: float) -> float:
        """The smallest value that at least this share of all values does not exceed; 0 without values."""
        wanted = share * len(self)
        reached = 0
        for value in sorted(self.counts):
            reached += self.counts[value]
            if reached >= wanted:
                return value
        return 0

    def summary(self) -> dict[str, float]:
        """``count``, ``min``, ``median``, ``p95``, ``max``."""
        shares = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
        return {"count": len(self), **{name: self.quantile(share) for name, share in shares.items()}}

    def describe(self) -> str:
        """The summary in words."""
        found = self.summary()
        return f"median {shown(found['median'])}, 95 % up to {shown(found['p95'])}, max {shown(found['max'])}"
