"""Another engine's process, measured in turns with our own (sordino.measure.workers), and the row that a comparison leaves."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ladder import code_version, cpu, speed
from sordino.measure.shapes import stored
from sordino.measure.workers import Order, Worker, in_turns
from sordino.numerics.machine import multiplies_bf16
from sordino.runtime.kernels import status
from speed import recipe_file

OURS = ["W4", "W4A8KV4 static"]


def making_parser(description: str, needed: str) -> argparse.ArgumentParser:
    """Arguments of a comparison with an engine that is a module under another interpreter."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help=f"an interpreter that has {needed}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="*", default=["smollm2-135m", "llama-3.2-1b"])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    return parser


class Foreign:
    """A process that answers "run" and "memory", a line of JSON each, and says that it is ready first."""

    def __init__(self, name: str, command: Sequence[str]):
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __enter__(self) -> Foreign:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def ask(self, what: str) -> Any:
        """What the process answers."""
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self.answer()

    def shares(self) -> None:
        """Not known of other engines."""

    def answer(self) -> Any:
        """The next line it writes."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the process died")
        return json.loads(line)


def measured_beside(
    name: str,
    config: dict[str, Any],
    folder: Path,
    others: dict[str, tuple[list[str], int]],
    threads: int,
    tokens: tuple[int, int],
) -> dict[str, Any]:
    """Measure our checkpoints of a shape, transformers' model of it, and others: name -> (command, bytes of weights)."""
    workers: list[Any] = []
    for subject in OURS:
        storage = stored(config, str(recipe_file(subject, folder)))
        workers.append(Worker(Order(subject, json.dumps(config), storage=storage), threads, tokens))
    twin = "bf16" if multiplies_bf16() else "fp32"
    workers.append(Worker(Order(f"{twin} twin", json.dumps(config), twin), threads, tokens))
    workers += [Foreign(other, command) for other, (command, _) in others.items()]
    with ExitStack() as stack:
        for worker in workers:
            stack.enter_context(worker)
        speeds = in_turns(workers)
    return {
        "subject": name,
        "version": code_version(),
        "cores": os.cpu_count(),
        "cpu": cpu(),
        "gflops": speed(),
        "kernels": status(),
        "threads": threads,
        "prompt_tokens": tokens[0],
        "new_tokens": tokens[1],
        "models": [
            {
                "model": s.name,
                "prefill": s.prefill,
                "decode": s.decode,
                "peak_memory_bytes": s.peak_memory_bytes,
                "weight_bytes": others[s.name][1] if s.name in others else s.shares and s.shares.weight_bytes,
            }
            for s in speeds
        ],
    }


def version_of(python: str, module: str) -> str:
    """What a module under another interpreter calls itself."""
    found = subprocess.run([python, "-c", f"import {module}; print({module}.__version__)"], capture_output=True, text=True)
    return found.stdout.strip()
