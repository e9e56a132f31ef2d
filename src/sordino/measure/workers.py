"""Processes that hold one model each and are measured in turns, one round after another.

So every model's memory is its own, and what else the machine does falls on all of them alike.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor

from sordino.api import load
from sordino.contract import Progress
from sordino.errors import SordinoError
from sordino.heap import keep_freed_memory, peak_memory
from sordino.measure.roofline import Shares, shares
from sordino.measure.shapes import config_of, random_checkpoint
from sordino.progress import quiet_libraries

ROUNDS = 5  # that count; one more warms up
PATIENCE = 90.0  # seconds of one model after which it takes part in no more rounds, if there is one that counts
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Speed:
    """Seconds of one model, one entry a round, fewer if it is very slow; all have the same numbers of tokens.

    Attributes:
        name: checkpoint or model; "bf16 twin" and "fp32 twin" for full precision of random weights.
        prefill: of the whole prompt, up to the first token's logits.
        decode: of all new tokens.
        peak_memory_bytes: of the model's process, loading included.
        load: seconds until a checkpoint was there; None for random weights.
        shares: of one more run, where its time went; not of very slow ones.
    """

    name: str
    prefill: list[float]
    decode: list[float]
    peak_memory_bytes: int
    load: float | None = None
    shares: Shares | None = None


@dataclass(frozen=True, eq=False)
class Order:
    """What a worker shall hold: a checkpoint by its name, or a random model of a shape (a config as JSON).

    Attributes:
        name: of the row.
        shape: of a random model; None for a checkpoint.
        precision: "bf16" or "fp32" for full precision.
        storage: the quantization config of a random checkpoint.
    """

    name: str
    shape: str | None = None
    precision: str | None = None
    storage: dict[str, Any] | None = None


class Subject(Protocol):
    """What can be measured in turns."""

    name: str

    def ask(self, what: str) -> Any:
        """For "run": seconds of a prompt and of the tokens after it; for "memory": bytes at most."""

    def answer(self) -> Any:
        """Wait until it is loaded; seconds that took, if they mean something."""

    def shares(self) -> Shares | None:
        """Where the time of one more run goes."""


def in_turns(workers: Sequence[Subject], progress: Progress | None = None) -> list[Speed]:
    """Measure workers one after another, round after round."""
    loads: dict[str, Any] = {}
    for i, worker in enumerate(workers):
        if progress is not None:
            progress("load", i, len(workers))
        loads[worker.name] = worker.answer()
    seconds: dict[str, list[tuple[float, float]]] = {w.name: [] for w in workers}
    steps = [w for _ in range(ROUNDS + 1) for w in workers]
    for i, worker in enumerate(steps):
        if progress is not None:
            progress("bench", i, len(steps))
        spent = seconds[worker.name]
        if len(spent) < 2 or sum(map(sum, spent)) < PATIENCE:
            spent.append(worker.ask("run"))
    out = []
    for worker in workers:
        prefill, decode = map(list, zip(*seconds[worker.name][1:], strict=True))
        load, peak = loads[worker.name], worker.ask("memory")  # before anything that is not the model's own
        found = worker.shares() if len(prefill) == ROUNDS else None
        out.append(Speed(worker.name, prefill, decode, peak, load if isinstance(load, float) else None, found))
    return out


class Worker:
    """A process that holds one model and measures it when asked."""

    def __init__(self, order: Order, threads: int, tokens: tuple[int, int]):
        self.name = order.name
        context: Any = get_context("spawn" if sys.platform == "win32" else "forkserver")
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload([__name__])
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(far, order, threads, tokens), daemon=True)
        with _no_main_module():
            self._process.start()
        far.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()

    def ask(self, what: str) -> Any:
        """Send a question and wait for the answer."""
        self._pipe.send(what)
        return self.answer()

    def shares(self) -> Shares | None:
        """Where the time of one more run goes."""
        found: Shares = self.ask("shares")
        return found

    def answer(self) -> Any:
        """Wait for the answer; the worker's errors become the caller's."""
        try:
            found = self._pipe.recv()
        except EOFError:
            raise SordinoError(f"{self.name}: the process that measured it died; out of memory?") from None
        if isinstance(found, SordinoError):
            raise found
        return found


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Keep new processes from running the caller's script again, which they need nothing of."""
    real = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = real


def _serve(pipe: Connection, order: Order, threads: int, tokens: tuple[int, int]) -> None:
    """Load, then answer questions until the caller is gone."""
    quiet_libraries()
    keep_freed_memory()
    torch.set_num_threads(threads)
    try:
        started = time.perf_counter()
        model = _open(order)
        pipe.send(time.perf_counter() - started if order.shape is None else "ready")
        answers: dict[str, Callable[[], Any]] = {
            "run": lambda: tuple(_phases(model, *tokens)),
            "shares": lambda: shares(model, lambda: _phases(model, *tokens), tokens[0]),
            "memory": peak_memory,
        }
        while True:
            pipe.send(answers[pipe.recv()]())
    except SordinoError as error:
        pipe.send(error)
    except EOFError:
        pass


def _open(order: Order) -> Any:
    """A checkpoint by its name, or a model of random weights or codes."""
    if order.shape is None:
        return load(order.name)[0]
    config = json.loads(order.shape)
    if order.storage is not None:
        return random_checkpoint(config, order.storage)
    assert order.precision is not None
    dtype = PRECISIONS[order.precision]
    return transformers.AutoModelForCausalLM.from_config(config_of(config), dtype=dtype).eval()


def _phases(model: Any, prompt_tokens: int, new_tokens: int) -> Iterator[float]:
    """Seconds of a prompt, then of the tokens after it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, prompt_tokens), generator=generator)
    with torch.inference_mode():
        started = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        token = _likeliest(out.logits)
    yield time.perf_counter() - started
    with torch.inference_mode():
        started = time.perf_counter()
        for _ in range(new_tokens):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = _likeliest(out.logits)
    yield time.perf_counter() - started


def _likeliest(logits: Tensor) -> Tensor:
    """The next token [B, 1], found in fp32 as transformers' `generate` does; in bf16 torch takes three times as long."""
    return logits[:, -1:].float().argmax(-1)
