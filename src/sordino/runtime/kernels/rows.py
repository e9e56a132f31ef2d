"""What attention, caches and online rotations ask of the kernels; None (or False) says that torch has to do it.

Shapes: B batch, K key heads, S tokens, d head size.
"""

from __future__ import annotations

import ctypes
from functools import cache
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from sordino.numerics.hadamard import Rotation
from sordino.numerics.kv import KvGrid
from sordino.runtime.kernels import library
from sordino.runtime.kernels.linear import TYPES, able

LARGEST_HEAD = 512
_NO_TURN = library.Turn()


@cache
def turn_of(turn: Rotation) -> library.Turn:
    """A rotation as the kernels see it; kept, since they hold its address."""
    return library.Turn(_left(turn).data_ptr(), turn.left.shape[0], turn.power)


@cache
def _left(turn: Rotation) -> Tensor:
    """The small factor of a rotation with the scale of the large one, fp32."""
    with torch.inference_mode(False):
        return (turn.left / sqrt(1 << turn.power)).float().contiguous()


def _rowwise(x: Tensor) -> bool:
    """Whether the kernels find entries of x one behind another."""
    return x.device.type == "cpu" and x.is_contiguous()


def format_of(grid: KvGrid, share: Tensor) -> library.Format | None:
    """How a cache stores rows, as the kernels see it; None where they cannot read the scales [K]."""
    if share.dtype not in TYPES or not _rowwise(share):
        return None
    return library.Format(share.data_ptr(), grid.bits, grid.symmetric, grid.static, TYPES[share.dtype])


def turned(turn: Rotation, x: Tensor) -> Tensor | None:
    """``turn.apply(x)`` for x [..., d], summed in fp32 and rounded once."""
    native = library.active()
    if native is None or not able(x) or x.shape[-1] != turn.size or x.numel() == 0:
        return None
    x = x.contiguous()
    out = torch.empty_like(x)
    how = ctypes.addressof(turn_of(turn))
    rows = x.numel() // turn.size
    native.sordino_turn(how, x.data_ptr(), out.data_ptr(), TYPES[x.dtype], rows, torch.get_num_threads())
    return out


def rotate(turn: Rotation, x: Tensor) -> Tensor:
    """``turn.apply(x)``, by the kernels where they can; differentiable."""
    if x.requires_grad and torch.is_grad_enabled() and able(x.detach()):
        out: Tensor = _Turn.apply(x, turn)  # type: ignore[no-untyped-call]
        return out
    found = turned(turn, x)
    return turn.apply(x) if found is None else found


def placed(mean: Tensor | None, turn: Rotation | None, x: Tensor) -> Tensor:
    """Keys [B, K, S, d] without their mean [K, d] and rotated, as far as there is either: what :func:`store` rounds."""
    x = x if mean is None else x - mean[:, None].to(x.dtype)
    return x if turn is None else rotate(turn, x)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Rotation) -> Tensor:
        """Rotate."""
        ctx.turn = turn
        return rotate(turn, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Rotate back."""
        return rotate(ctx.turn.transposed(), grads[0]), None


def _alike(*given: Tensor) -> None:
    """Refuse operands that the kernels would misread.

    Raises:
        TypeError: if they differ in dtype or shape.
    """
    if any(x.dtype != given[0].dtype or x.shape != given[0].shape for x in given):
        raise TypeError(f"operands differ: {', '.join(f'{x.dtype} {list(x.shape)}' for x in given)}")


def norm(how: library.Norm, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sum of x [..., n] and what is added, and its RMS norm; the kernels have to be there and :func:`able`."""
    native = library.present()
    x = x.contiguous()
    if added is not None:
        _alike(x, added)
        added = added.contiguous()
    out, total = torch.empty_like(x), x if added is None else torch.empty_like(x)
    other = None if added is None else added.data_ptr()
    native.sordino_norm(
        ctypes.addressof(how), x.data_ptr(), other, total.data_ptr(), out.data_ptr(), TYPES[x.dtype],
        x.numel() // x.shape[-1], x.shape[-1], torch.get_num_threads(),
    )  # fmt: skip
    return total, out


def place(how: library.Norm, x: Tensor, cos: Tensor, sin: Tensor, size: int) -> Tensor:
    """Queries or keys [B, S, K d] -> [B, K, S, d], normed and with rotary embedding; cos and sin [B or 1, S, d], contiguous."""
    native = library.present()
    x = x.contiguous()
    texts, tokens, width = x.shape
    if x.dtype != cos.dtype or cos.shape[1:] != (tokens, size):
        raise TypeError(f"{x.dtype} {list(x.shape)} and angles {cos.dtype} {list(cos.shape)}")
    out = x.new_empty((texts, width // size, tokens, size))
    native.sordino_place(
        ctypes.addressof(how), x.data_ptr(), cos.data_ptr(), sin.data_ptr(), int(cos.shape[0] == 1), out.data_ptr(),
        TYPES[x.dtype], texts, tokens, width // size, size, torch.get_num_threads(),
    )  # fmt: skip
    return out


def glu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    native = library.present()
    _alike(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    native.sordino_glu(gate.data_ptr(), up.data_ptr(), out.data_ptr(), TYPES[gate.dtype], gate.numel(), torch.get_num_threads())
    return out


def store(grid: KvGrid, share: Tensor, mean: Tensor | None, turn: Rotation | None, x: Tensor, room: Tensor, place: int) -> bool:
    """Take a mean [K, d] off x [B, K, S, d], rotate, round, pack into rows ``place`` … of room uint8 [B, K, room, bytes]."""
    native, how = library.active(), format_of(grid, share)
    if native is None or how is None or not able(x) or not _rowwise(room) or x.shape[-1] > LARGEST_HEAD:
        return False
    if mean is not None and (mean.dtype != x.dtype or not mean.is_contiguous() or mean.shape != (x.shape[1], x.shape[3])):
        return False
    x = x.contiguous()
    texts, heads, tokens, size = x.shape
    if room.shape[:2] != x.shape[:2] or room.shape[3] != grid.row_bytes(size) or place + tokens > room.shape[2]:
        return False
    rotation, off = _NO_TURN if turn is None else turn_of(turn), None if mean is None else mean.data_ptr()
    done = native.sordino_store(
        ctypes.addressof(how), ctypes.addressof(rotation), off, x.data_ptr(), TYPES[x.dtype],
        texts * heads, heads, tokens, size,
        room.data_ptr(), room.shape[2], place, torch.get_num_threads(),
    )  # fmt: skip
    return bool(done == 0)


def attend(how: library.Block, query: Tensor, keys: Tensor, values: Tensor, length: int, first: Tensor | None) -> Tensor | None:
    """Causal attention [B, S, H, d] of queries [B, H, S, d], the last S of ``length`` rows; None where the kernels cannot.

    Sums are the same to the bit for a text alone and in a batch, with a cache and without one (kernels/attention.h).

    Args:
        how: of the layer, what tells of attention; the queries are rotated as its keys are.
        query: in the layer's dtype.
        keys: rows [B, K, room, w] of a cache, packed or numbers.
        values: likewise.
        length: how many of them are filled.
        first: int64 [B], the row where each text begins; None: 0.
    """
    native = library.active()
    if native is None or not able(query) or TYPES[query.dtype] != how.type or not (_rowwise(keys) and _rowwise(values)):
        return None
    query = query.contiguous()
    texts, heads, tokens, size = query.shape
    if keys.shape[:3] != values.shape[:3] or keys.shape[:2] != (texts, how.key_heads) or (heads, size) != (how.heads, how.size):
        return None
    held = library.Held(keys.data_ptr(), values.data_ptr(), length, keys.shape[2])
    out = query.new_empty((texts, tokens, heads, size))
    begin = None if first is None else first.data_ptr()
    done = native.sordino_attend(
        ctypes.addressof(how), query.data_ptr(), ctypes.addressof(held), begin, texts, tokens, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out if done == 0 else None


def load(grid: KvGrid, share: Tensor, room: Tensor, tokens: int, size: int, dtype: torch.dtype) -> Tensor | None:
    """Values [B, K, S, d] of the first S rows of room uint8 [B, K, room, bytes]."""
    native, how = library.active(), format_of(grid, share)
    if native is None or how is None or dtype not in TYPES or not _rowwise(room):
        return None
    texts, heads = room.shape[:2]
    out = torch.empty((texts, heads, tokens, size), dtype=dtype)
    done = native.sordino_load(
        ctypes.addressof(how), room.data_ptr(), room.shape[2], texts * heads, heads, tokens, size, TYPES[dtype], out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out if done == 0 else None
