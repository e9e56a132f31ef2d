"""Symmetric rounding of activations: ``x ≈ code * scale`` with codes -2^(b-1) … 2^(b-1) - 1.

Dynamic scales are one a token, or one a token and group of channels (BiSup's hosts, spec section 2), from the largest entry; a
static scale is one number found on calibration text (PrefixQuant, spec section 4). Shapes: C channels, G groups, g = C/G.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sordino.numerics.straight import fake_round, tiles

_LEAST = 1e-8  # of a scale: a token of zeros has codes of zero


def token_scale(x: Tensor, bits: int, clip: float | Tensor = 1.0, group: int | None = None) -> Tensor:
    """Scales of tokens, without gradients.

    Args:
        x: [..., C].
        bits: width of a code.
        clip: share of the largest entry that the codes reach; a number, or [G] for groups.
        group: channels that share a scale, g; None for all of a token.

    Returns:
        fp32 [..., 1]; with groups [..., C], a channel's own.
    """
    return moving_scale(x.detach(), bits, clip, group)


def moving_scale(x: Tensor, bits: int, clip: float | Tensor = 1.0, group: int | None = None) -> Tensor:
    """As :func:`token_scale`, with gradients by the largest entries: a quieter loud channel makes all steps finer."""
    size = x.shape[-1] if group is None else group
    peak = x.unflatten(-1, (-1, size)).abs().amax(-1).float()
    scale: Tensor = (peak * (clip / ((1 << (bits - 1)) - 1))).clamp(min=_LEAST)
    return scale if group is None else scale.repeat_interleave(size, -1)


def encode(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes, int8 [..., C], of x [..., C] at a scale that broadcasts to it (round half to even)."""
    half = 1 << (bits - 1)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    for values, out, s in tiles(x, codes, scale):
        out.copy_(torch.div(values, s).round_().clamp_(-half, half - 1))
    return codes


def fake_encode(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``code * scale`` in the dtype of x [..., C], differentiable as numerics/straight.py says."""
    half = 1 << (bits - 1)
    return fake_round(x, scale, -half, half - 1)
