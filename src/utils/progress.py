"""Progress bars: on a terminal a bar, elsewhere (a file, a pipe) now and then a line of the log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

#: A line tells of so many parts of the whole, and comes no sooner than so many seconds after the one before.
PARTS = 10
SECONDS = 10


class _Lines(tqdm):
    """Counts as a bar does, and logs a line where a tenth is done, unless the last one was a moment ago."""

    disable: bool
    _told, _last = 0, 0.0

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Called by tqdm where it would draw."""
        now, total = time.monotonic(), self.total or 0
        self._last = self._last or now
        if self.n <= 0 or total <= 0 or PARTS * self.n // total <= self._told or now - self._last < SECONDS:
            return
        self._told, self._last = PARTS * self.n // total, now
        rate = self.n / max(self.format_dict["elapsed"], 1e-9)
        done = f"{self.n / total:.0%}, {self.n:,.0f} of {total:,.0f}, {rate:,.3g} a second"
        logger.info("%s: %s", self.desc.rstrip(": "), done)

    def close(self) -> None:
        """End without the line that a bar leaves behind."""
        if not self.disable:
            self.disable = True
            self._decr_instances(self)


def progress(
    total: int,
    description: str,
    shown: bool = True,
    unit: str = "text",
    items: Iterable[Any] | None = None,
    **settings: Any,
) -> tqdm:
    """A bar over `total` units, or over `items`, as tqdm has it; lines of the log where stderr is no terminal."""
    kind = tqdm if sys.stderr.isatty() else _Lines
    return kind(items, total=total, desc=description, unit=unit, disable=not shown, smoothing=0.1, **settings)
