"""How long each part of a run took, for its report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Clock:
    """Seconds by name of a part.

    Attributes:
        spent: wall time so far, that of an interrupted run included.
    """

    def __init__(self, spent: Mapping[str, float]):
        self.spent = dict(spent)

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Count the time inside towards a part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.spent[name] = round(self.spent.get(name, 0.0) + time.perf_counter() - started, 3)
