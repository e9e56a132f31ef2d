"""Symmetric rounding of activations: ``x ≈ code * scale`` with codes -2^(b-1) … 2^(b-1) - 1.

Dynamic scales are one a token, or one a token and group of channels (BiSup's hosts, spec section 2), from the largest entry; a
static scale is one number found on calibration text (PrefixQuant, spec section 4). Shapes: C channels, G groups, g = C/G.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LEAST = 1e-8  # of a scale: a token of zeros has codes of zero


def token_scale(x: Tensor, bits: int, clip: float | Tensor = 1.0, group: int | None = None) -> Tensor:
    """Scales of tokens.

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
    """As :func:`token_scale`, with gradients by the largest entries."""
    size = x.shape[-1] if group is None else group
    peak = x.unflatten(-1, (-1, size)).abs().amax(-1).float()
    scale: Tensor = (peak * (clip / ((1 << (bits - 1)) - 1))).clamp(min=_LEAST)
    return scale if group is None else scale.repeat_interleave(size, -1)


def encode(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes, int8 [..., C], of x [..., C] at a scale that broadcasts to it (round half to even)."""
    return _nearest(x.float() / scale, bits).to(torch.int8)


def fake_encode(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``code * scale`` in the dtype of x [..., C], differentiable in both as :func:`fake_round` is."""
    half = 1 << (bits - 1)
    return fake_round(x, scale, -half, half - 1)


def fake_round(x: Tensor, scale: Tensor, low: Any, high: Any) -> Tensor:
    """``clamp(round(x / scale), low, high) * scale`` in the dtype of x; low and high are numbers, or tensors that broadcast.

    Gradients go straight through the rounding; an entry that is clipped has none, and pulls at the scale with its whole code
    (LSQ without its gradient scale; PrefixQuant, spec section 5).
    """
    steps = x.float() / scale
    if not (x.requires_grad or scale.requires_grad):
        return (steps.round_().clamp_(low, high) * scale).to(x.dtype)
    near = steps + (steps.detach().round() - steps.detach())
    return (near.clamp(low, high) * scale).to(x.dtype)


def _nearest(steps: Tensor, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    return steps.round_().clamp_(-half, half - 1)
