"""Progress bars on stderr, with ETA and peak memory, for everything longer than two seconds."""

from __future__ import annotations

import logging
import os
import warnings
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sordino.heap import peak_memory

_NAMES = {
    "block": "quantizing blocks",
    "survey": "surveying",
    "targets": "full precision",
    "distill": "distilling",
    "eval": "evaluating windows",
    "tasks": "answering tasks",
    "write": "writing",
    "look": "looking",
    "round": "rounding weights",
    "sensitivity": "rounding one by one",
    "tokens": "errors across tokens",
    "depth": "errors along depth",
}


class Bars:
    """One bar per kind of work, made when first heard of; call it with (what, done, total)."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:>20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}"),
            console=console,
            disable=not console.is_terminal,  # a log file or a pipe gets errors only
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Move a bar."""
        memory = f"peak {peak_memory() / 2**30:.1f} GiB"
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(_NAMES.get(what, what), total=total, memory=memory)
        self._progress.update(self._tasks[what], completed=done, total=total, memory=memory)


def quiet_libraries() -> None:
    """Keep other libraries' bars and notices off the terminal; their errors still reach the user through ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|torch|huggingface_hub)(\.|$)")
