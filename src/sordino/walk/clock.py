"""How long each part of a run took, for its report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by name of a part.

    Attributes:
        spent: wall time so far, that of an interrupted run included; the work folder's own record, stored with its state.
    """

    def __init__(self, spent: dict[str, float]):
        self.spent = spent

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Count the time inside towards a part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.spent[name] = round(self.spent.get(name, 0.0) + time.perf_counter() - started, 3)
