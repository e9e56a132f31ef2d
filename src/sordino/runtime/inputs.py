"""Rounded inputs of linears, simulated: what calibration and tuning see of ``format.activations``.

The checkpoint's own linears multiply the codes (runtime/modules.py); both round by the same function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sordino.numerics.inputs import fake_encode, token_scale
from sordino.runtime.modules import SCALE


class RoundInput:
    """Forward pre-hook of a linear: rounds its input.

    Attributes:
        bits: width of a code.
        clip: see :func:`token_scale`; only where the linear has no static scale.
    """

    def __init__(self, bits: int, clip: float):
        self.bits, self.clip = bits, clip

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        """The input [..., C] on its grid."""
        x: Tensor = args[0]
        scale: Tensor | None = getattr(module, SCALE, None)
        return (fake_encode(x, token_scale(x, self.bits, self.clip) if scale is None else scale, self.bits),)


def round_inputs(linear: nn.Module, bits: int, clip: float, scale: float | None = None) -> None:
    """Let a linear round its input from now on, with a static scale or (None, and none set before) one for each token."""
    if scale is not None:
        linear.register_buffer(SCALE, torch.tensor([scale]))
    if not any(isinstance(h, RoundInput) for h in linear._forward_pre_hooks.values()):
        linear.register_forward_pre_hook(RoundInput(bits, clip))


def carry_inputs(old: nn.Module, new: nn.Module) -> None:
    """Let a stand-in round its input as the linear does that it stands in for."""
    for hook in old._forward_pre_hooks.values():
        if isinstance(hook, RoundInput):
            new.register_buffer(SCALE, getattr(old, SCALE, None))
            new.register_forward_pre_hook(hook)
