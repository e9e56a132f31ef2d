"""Symmetric rounding of activations: ``x ≈ code * scale`` with codes -2^(b-1) … 2^(b-1) - 1.

Dynamic scales are one a token, from its largest entry; a static scale is one number found on calibration text (PrefixQuant,
spec section 4). Shapes: T tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1e-8  # of a scale: a token of zeros has codes of zero


def token_scale(x: Tensor, bits: int, clip: float | Tensor = 1.0) -> Tensor:
    """Scales of tokens, [..., C] -> fp32 [..., 1]; ``clip`` is the share of the largest entry that the codes reach."""
    peak = x.detach().abs().amax(-1, keepdim=True).float()
    return (peak * (clip / ((1 << (bits - 1)) - 1))).clamp(min=_LEAST)


def encode(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes, int8 [..., C], of x [..., C] at a scale that broadcasts to it (round half to even)."""
    return _nearest(x.float() / scale, bits).to(torch.int8)


def fake_encode(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``code * scale`` in the dtype of x [..., C], differentiable in both.

    Gradients go straight through the rounding; an entry that is clipped has none, and pulls at the scale with its whole code
    (LSQ without its gradient scale; PrefixQuant, spec section 5).
    """
    if not (x.requires_grad or scale.requires_grad):
        return (_nearest(x.float() / scale, bits) * scale).to(x.dtype)
    half = 1 << (bits - 1)
    steps = x.float() / scale
    near = steps + (steps.detach().round() - steps.detach())
    return (near.clamp(-half, half - 1) * scale).to(x.dtype)


def _nearest(steps: Tensor, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    return steps.round_().clamp_(-half, half - 1)
