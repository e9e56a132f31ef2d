"""How the process of another engine answers foreign.py; needs the standard library alone, as it runs under any interpreter."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable


def answer(run: Callable[[], list[float]]) -> None:
    """Say that the engine is ready, then answer every line: "memory" with bytes at most, others with what ``run`` gives.

    Args:
        run: reads the prompt and decodes behind it; seconds of either.
    """
    _tell("ready")
    for line in sys.stdin:
        _tell(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if line.strip() == "memory" else run())


def _tell(what: object) -> None:
    print(json.dumps(what), flush=True)
