"""Rounding of activations: ``x ≈ code * scale``.

Dynamic scales are one a token, or one a token and group of channels (BiSup's hosts, spec section 2), from its extremes; a
static scale is one number found on calibration text (PrefixQuant, spec section 4). Symmetric codes are -2^(b-1) … 2^(b-1) - 1;
others -z … 2^b - 1 - z, where z is a zero point of the token's (and group's) own, and so are integers that reach from its
smallest entry to its largest. Shapes: C channels, G groups, g = C/G.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sordino.numerics.straight import fake_round, tiles

_LEAST = 1e-8  # of a scale: a token of zeros has codes of zero


@dataclass(frozen=True)
class InputGrid:
    """Which numbers the input of a linear is rounded to.

    Attributes:
        bits: width of a code.
        static: the scale is given; else it comes from each token's extremes.
        group: channels of a token that share a dynamic scale, g; None for all.
        symmetric: no zero points; static scales have none.
    """

    bits: int
    static: bool = False
    group: int | None = None
    symmetric: bool = True

    @staticmethod
    def of(stored: dict[str, Any]) -> InputGrid:
        """As a checkpoint's ``inputs`` say."""
        return InputGrid(stored["bits"], stored["mode"] == "static", stored.get("group"), stored.get("symmetric", True))

    def stored(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        said = {"bits": self.bits, "mode": "static" if self.static else "dynamic"}
        return said | ({} if self.group is None else {"group": self.group}) | ({} if self.symmetric else {"symmetric": False})

    @property
    def bounds(self) -> tuple[int, int]:
        """Least and largest symmetric code."""
        half = 1 << (self.bits - 1)
        return -half, half - 1

    def fit(self, x: Tensor, share: float | Tensor, moving: bool = False) -> tuple[Tensor, Any, Any]:
        """Scale, least and largest code.

        Args:
            x: [..., C], or, by groups, [..., G, g].
            share: static: the scale, fp32 [1]. Dynamic: the share of the extremes that codes reach, a number or fp32 [1], [G].
            moving: whether dynamic scales have gradients by x: a quieter loud channel makes all steps finer.

        Returns:
            The scale fp32 [..., 1]; the codes' bounds, numbers or likewise.
        """
        if self.static:
            return torch.as_tensor(share), *self.bounds
        x = x if moving else x.detach()
        share = share[:, None] if isinstance(share, Tensor) and self.group is not None else share
        if self.symmetric:
            peak = x.abs().amax(-1, keepdim=True).float()
            return (peak * (share / self.bounds[1])).clamp(min=_LEAST), *self.bounds
        top = (1 << self.bits) - 1
        low, high = reach(x, share)
        scale = ((high - low) / top).clamp(min=_LEAST)
        zero = (-low.detach() / scale.detach()).round()
        return scale, -zero, top - zero

    def fake(self, x: Tensor, share: float | Tensor, moving: bool = False) -> Tensor:
        """``code * scale`` in the dtype of x [..., C], differentiable as numerics/straight.py says."""
        if self.static or self.group is None:
            return fake_round(x, *self.fit(x, share, moving))
        parts = x.unflatten(-1, (-1, self.group))
        return fake_round(parts, *self.fit(parts, share, moving)).flatten(-2)


def reach(x: Tensor, share: float | Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry of every row of x [..., n], or zero, times a share: fp32 [..., 1] each."""
    return x.amin(-1, keepdim=True).float().clamp(max=0) * share, x.amax(-1, keepdim=True).float().clamp(min=0) * share


def encode(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Symmetric codes, int8 [..., C], of x [..., C] at a scale that broadcasts to it (round half to even)."""
    half = 1 << (bits - 1)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    for values, out, s in tiles(x, codes, scale):
        out.copy_(torch.div(values, s).round_().clamp_(-half, half - 1))
    return codes
