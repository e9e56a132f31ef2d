"""Another engine's process, measured in turns with our own (sordino.measure.workers), and the row that a comparison leaves."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers

from ladder import ROWS, code_version, cpu, keep, speed
from sordino.measure.shapes import config_of, shape, stored
from sordino.measure.workers import Order, Worker, in_turns
from sordino.numerics.machine import multiplies_bf16
from sordino.runtime.kernels import status
from speed import recipe_file

# An interpreter, a folder with a model of transformers, one for the engine's -> a command that lacks threads, prompt tokens and
# new tokens, and bytes of weights.
Export = Callable[[str, Path, Path], tuple[list[str], int]]
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


def measure_exported(args: argparse.Namespace, name: str, file: str, export: Export, versions: dict[str, str]) -> None:
    """Rows beside an engine that makes its own model of one of transformers.

    Args:
        args: of :func:`making_parser`.
        name: of the engine's model in the row.
        file: under benchmarks/rows.
        export: see :data:`Export`.
        versions: fields of the row, and the modules whose versions they hold.
    """
    for subject in args.shapes:
        config, tokens = shape(subject), (args.prompt_tokens, args.new_tokens)
        with tempfile.TemporaryDirectory() as folder:
            plain, made = Path(folder) / "plain", Path(folder) / "made"
            transformers.AutoModelForCausalLM.from_config(config_of(config), dtype=torch.bfloat16).save_pretrained(plain)
            command, size = export(args.python, plain, made)
            command += [str(n) for n in (args.threads, *tokens)]
            row = measured_beside(subject, config, Path(folder), {name: (command, size)}, args.threads, tokens)
        row |= {field: version_of(args.python, module) for field, module in versions.items()}
        keep(ROWS / file, row)
        print(json.dumps(row, indent=1), flush=True)


def version_of(python: str, module: str) -> str:
    """What a module under another interpreter calls itself."""
    found = subprocess.run([python, "-c", f"import {module}; print({module}.__version__)"], capture_output=True, text=True)
    return found.stdout.strip()
