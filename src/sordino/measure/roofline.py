"""Where a model's time goes, beside what the machine could do: bytes read a token, operations, and measured ceilings.

Decoding reads every weight once a token and is bound by memory; a prompt multiplies and is bound by arithmetic. So a decoded
token's weights over its time are held against the rate at which this machine reads, and the linears' operations in a prompt
against the rate of torch's own integer and bf16 products.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sordino.runtime.kernels import library
from sordino.runtime.modules import QuantLinear, TiedHead

_SIDE = 2048  # of the square matrices whose products are timed
_TRIES = 5
_PATIENCE = 2.0  # seconds after which no more tries are made
_READ = 1 << 29  # bytes: far more than any cache


@dataclass(frozen=True)
class Ceilings:
    """What this machine was seen to do at best, with some number of threads.

    Attributes:
        read: bytes a second from memory.
        int8: operations (a multiplication and an addition are two) a second of ``torch._int_mm``, or of torch's fp32 product
            where the CPU has no integer products and that is faster.
        bf16: the same of torch's bf16 product.
    """

    read: float
    int8: float
    bf16: float

    def to_json(self) -> dict[str, float]:
        """GB and billions of operations a second."""
        return {"read_gb_per_s": self.read / 1e9, "int8_gop_per_s": self.int8 / 1e9, "bf16_gop_per_s": self.bf16 / 1e9}


@dataclass(frozen=True)
class Shares:
    """One run of a prompt and some tokens, and what of it was where.

    Attributes:
        prefill: seconds of the prompt.
        decode: seconds of the tokens after it.
        linears: seconds of the prompt in linears of the decoder's layers.
        native: seconds in the kernels: of the prompt, of the tokens.
        weight_bytes: that a decoded token reads.
        operations: of those linears, for the prompt.
    """

    prefill: float
    decode: float
    linears: float
    native: tuple[float, float]
    weight_bytes: int
    operations: int


def ceilings(threads: int) -> Ceilings:
    """Measure this machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        filled = torch.ones(_READ // 8, dtype=torch.int64)
        codes = torch.ones(_SIDE, _SIDE, dtype=torch.int8)
        numbers = torch.ones(_SIDE, _SIDE, dtype=torch.bfloat16)
        wide = torch.ones(_SIDE, _SIDE)
        work = 2 * _SIDE**3
        return Ceilings(
            _READ / _best(filled.sum),
            work / min(_best(lambda: torch._int_mm(codes, codes.T)), _best(lambda: wide @ wide.T)),
            work / _best(lambda: numbers @ numbers.T),
        )
    finally:
        torch.set_num_threads(before)


def _best(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of some tries."""
    found: list[float] = []
    while len(found) < _TRIES and sum(found) < _PATIENCE:
        found.append(_seconds(work))
    return min(found)


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def shares(model: Any, run: Callable[[], Iterator[float]], prompt_tokens: int) -> Shares:
    """Run once, with the time of linears and kernels taken.

    Args:
        model: a causal LM.
        run: yields the seconds of the prompt when it is done, and those of the tokens after it.
        prompt_tokens: how many it has.
    """
    inside = [m for layer in model.get_decoder().layers for m in layer.modules() if isinstance(m, (QuantLinear, nn.Linear))]
    with _timed(inside) as linears, library.timed() as native:
        phases, before = run(), library.products_seconds()
        prefill = next(phases)
        of_prompt = linears[0] + library.products_seconds() - before, sum(native.values())
        decode = next(phases)
        of_tokens = sum(native.values()) - of_prompt[1]
    operations = 2 * prompt_tokens * sum(m.in_features * m.out_features for m in inside)
    return Shares(prefill, decode, of_prompt[0], (of_prompt[1], of_tokens), weight_bytes(model), operations)


@contextmanager
def _timed(linears: list[Any]) -> Iterator[list[float]]:
    """Seconds in some linears while the body runs, as the list's one entry."""
    total, wanted = [0.0], {id(m) for m in linears}
    kinds: list[Any] = list({type(m) for m in linears})

    def patched(plain: Any) -> Any:
        def forward(self: Any, *args: Any) -> Any:
            started = time.perf_counter()
            out = plain(self, *args)
            total[0] += time.perf_counter() - started if id(self) in wanted else 0
            return out

        return forward

    # In place of the classes' own methods: what the kernels may do depends on hooks and on what a module itself holds.
    own = [(kind, kind.forward) for kind in kinds]
    for kind, plain in own:
        kind.forward = patched(plain)
    try:
        yield total
    finally:
        for kind, plain in own:
            kind.forward = plain


def weight_bytes(model: Any) -> int:
    """Bytes of weights that one decoded token reads: all tensors, but for an embedding table that is not the head as well."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    used = [m for m in model.modules() if m is not table or isinstance(head, TiedHead)]
    held: dict[int, Tensor] = {}
    for module in used:
        held |= {t.data_ptr(): t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None}
    return sum(t.numel() * t.element_size() for t in held.values())
