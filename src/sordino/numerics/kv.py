"""Rounding of keys and values: ``x ≈ (code - zero) * scale``, codes 0 … 2^b - 1 (PrefixQuant, spec section 4.2).

Dynamic: a scale for each token and head, from its extremes, and a zero point unless symmetric. Static: one scale a head,
found on calibration text. Shapes: B batch, K key heads, S tokens, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sordino.numerics.inputs import reach
from sordino.numerics.packing import pack, packed_words, unpack
from sordino.numerics.straight import fake_round

_LEAST = 1e-8


@dataclass(frozen=True)
class KvGrid:
    """Which numbers keys or values are rounded to.

    Attributes:
        bits: width of a code.
        symmetric: zero points are 2^(b-1) everywhere.
        static: scales are given; else they come from each token's extremes.
    """

    bits: int
    symmetric: bool
    static: bool

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def fit(self, x: Tensor, share: Tensor, moving: bool = False) -> tuple[Tensor, Tensor]:
        """Scale and zero point for x [B, K, S, d].

        Args:
            x: what is to be rounded.
            share: fp32 [K]; static: the scales. Dynamic: the share of a token's extremes that the codes reach.
            moving: whether dynamic scales have gradients by x.

        Returns:
            fp32 [B, K, S, 1] each (static: [K, 1, 1]); scales are numbers that bf16 holds.
        """
        half, share = 1 << (self.bits - 1), share.float()[:, None, None]
        if self.static:
            return share, torch.full_like(share, half)
        x = (x if moving else x.detach()).float()
        if self.symmetric:
            scale = _stored(x.abs().amax(-1, keepdim=True) * share / (half - 1))
            return scale, torch.full_like(scale, half)
        low, high = reach(x, share)
        scale = _stored((high - low) / self.top)
        return scale, (-low.detach() / scale.detach()).round().clamp(0, self.top)

    def encode(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes, uint8 like x [B, K, S, d]."""
        return ((x.float() / scale).round() + zero).clamp(0, self.top).to(torch.uint8)

    def fake(self, x: Tensor, share: Tensor, moving: bool = False) -> Tensor:
        """``(code - zero) * scale`` in the dtype of x [B, K, S, d]; gradients as numerics/straight.py says."""
        scale, zero = self.fit(x, share, moving)
        return fake_round(x, scale, -zero, self.top - zero)

    @staticmethod
    def decode(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of codes."""
        return ((codes.float() - zero) * scale).to(dtype)

    # Packed rows: the codes of one token and head, behind them its own scale and zero point where they are not fixed.

    def row_bytes(self, size: int) -> int:
        """Bytes of a packed row for head size d."""
        return 4 * packed_words(size, self.bits) + (0 if self.static else 2 + (not self.symmetric))

    def pack(self, x: Tensor, share: Tensor) -> Tensor:
        """Round and pack [B, K, S, d] -> uint8 [B, K, S, :meth:`row_bytes`]."""
        scale, zero = self.fit(x, share)
        codes = self.encode(x, scale, zero)
        parts = [pack(codes.reshape(-1, x.shape[-1]), self.bits).view(torch.uint8).view(*x.shape[:-1], -1)]
        if not self.static:
            parts.append(scale.to(torch.bfloat16).view(torch.uint8))
            parts += [] if self.symmetric else [zero.to(torch.uint8)]
        return torch.cat(parts, -1)

    def unpack(self, rows: Tensor, share: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """Values of packed rows [B, K, S, :meth:`row_bytes`] -> [B, K, S, d]."""
        words = 4 * packed_words(size, self.bits)
        packed = rows[..., :words].reshape(-1, words).contiguous().view(torch.int32)
        codes = unpack(packed, self.bits, size).view(*rows.shape[:-1], size)
        if self.static:
            scale, zero = share.float()[:, None, None], torch.tensor(float(1 << (self.bits - 1)))
        else:
            scale = rows[..., words : words + 2].contiguous().view(torch.bfloat16).float()
            zero = torch.tensor(float(1 << (self.bits - 1))) if self.symmetric else rows[..., words + 2 :].float()
        return self.decode(codes, scale, zero.to(rows.device), dtype)


def _stored(scale: Tensor) -> Tensor:
    """The nearest bf16 number, gradients straight through, never zero."""
    return scale.clamp(min=_LEAST).to(torch.bfloat16).float()
