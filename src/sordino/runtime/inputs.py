"""What happens to the input of a linear: an online rotation (R4), and rounding, simulated for calibration and tuning.

The checkpoint's own linears multiply the codes (runtime/modules.py); both round by the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sordino.numerics.hadamard import rotation
from sordino.numerics.inputs import fake_encode, token_scale
from sordino.runtime.modules import SCALE, input_groups


class RotateInput:
    """Forward pre-hook of a linear: multiplies its input by a Hadamard matrix, as its weight is."""

    def __init__(self, size: int):
        self.rotation = rotation(size)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        """The input [..., C] in the rotated basis."""
        return (self.rotation.apply(args[0]),)


class RoundInput:
    """Forward pre-hook of a linear: rounds its input.

    Attributes:
        bits: width of a code.
        static: whether the linear's ``input_scale`` is the scale; else it is the share of a token's largest entry that the
            codes reach, one for each group of channels.
        group: channels of a token that share a dynamic scale; None for all.
        trained: says what takes the place of ``input_scale`` while it is trained.
    """

    def __init__(self, bits: int, static: bool, group: int | None = None):
        self.bits, self.static, self.group = bits, static, group
        self.trained: Callable[[], Tensor] | None = None

    def __call__(self, module: Any, args: tuple[Any, ...]) -> tuple[Tensor]:
        """The input [..., C] on its grid."""
        x: Tensor = args[0]
        scale: Tensor = module.get_buffer(SCALE) if self.trained is None else self.trained()
        return (fake_encode(x, scale if self.static else token_scale(x, self.bits, scale, self.group), self.bits),)


def round_inputs(linear: Any, bits: int, static: bool, group: int | None, scale: float | None = None) -> None:
    """Let a linear round its input from now on; ``scale``, where given, becomes its ``input_scale``, of every group alike."""
    if scale is not None:
        linear.register_buffer(SCALE, torch.full((input_groups(linear.in_features, group),), scale))
    if rounding(linear) is None:
        linear.register_forward_pre_hook(RoundInput(bits, static, group))


def rounding(linear: nn.Module) -> RoundInput | None:
    """The hook that rounds the input of a linear, if there is one."""
    return next((h for h in linear._forward_pre_hooks.values() if isinstance(h, RoundInput)), None)


def rotate_input(linear: Any) -> None:
    """Let a linear rotate its input from now on, before it rounds it."""
    linear.register_forward_pre_hook(RotateInput(linear.in_features), prepend=True)


def rotated(linear: nn.Module, x: Tensor) -> Tensor:
    """What the weight of a linear sees of an input [..., C], but for rounding."""
    hook = next((h for h in linear._forward_pre_hooks.values() if isinstance(h, RotateInput)), None)
    return x if hook is None else hook.rotation.apply(x)


def carry_inputs(old: nn.Module, new: nn.Module) -> None:
    """Let a stand-in treat its input as the linear does that it stands in for."""
    turned = any(isinstance(h, RotateInput) for h in new._forward_pre_hooks.values())
    for hook in old._forward_pre_hooks.values():
        if isinstance(hook, RoundInput):
            new.register_buffer(SCALE, getattr(old, SCALE))
        if isinstance(hook, RoundInput) or (isinstance(hook, RotateInput) and not turned):
            new.register_forward_pre_hook(hook)
