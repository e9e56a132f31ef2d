"""What happens to the input of a linear: an online rotation (R4) or order, and rounding, simulated for calibration and tuning.

The checkpoint's own linears multiply the codes (runtime/modules.py); both round by the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sordino.numerics.hadamard import rotation
from sordino.numerics.inputs import InputGrid
from sordino.numerics.kept import round_with_kept
from sordino.runtime.kernels.rows import rotate
from sordino.runtime.modules import ORDER, SCALE, input_groups


class RotateInput:
    """Forward pre-hook of a linear: multiplies its input by a Hadamard matrix, as its weight is."""

    def __init__(self, size: int):
        self.rotation = rotation(size)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        """The input [..., C] in the rotated basis."""
        return (rotate(self.rotation, args[0]),)


class OrderInput:
    """Forward pre-hook of a linear: puts its input channels in the order of the columns of its weight, its ``input_order``."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        """The input [..., C], in order."""
        return (args[0].index_select(-1, module.get_buffer(ORDER)),)


class RoundInput:
    """Forward pre-hook of a linear: rounds its input.

    Attributes:
        grid: what it is rounded to, by the linear's ``input_scale``: the scale, or the share of the extremes that the codes of
            a dynamic one reach, one for each group of channels.
        kept: the last channels, at 8 bits.
        trained: says what takes the place of ``input_scale`` while it is trained.
        once: rounds for all linears of a site, while it is trained.
        moving: whether dynamic scales have gradients, while channels are trained to be louder or quieter.
    """

    def __init__(self, grid: InputGrid, kept: int = 0):
        self.grid, self.kept = grid, kept
        self.trained: Callable[[], Tensor] | None = None
        self.once: Once | None = None
        self.moving = False

    def __call__(self, module: Any, args: tuple[Any, ...]) -> tuple[Tensor]:
        """The input [..., C] on its grid."""
        x: Tensor = args[0]
        return (self._round(module, x) if self.once is None else self.once(x, lambda: self._round(module, x)),)

    def _round(self, module: Any, x: Tensor) -> Tensor:
        share: Tensor = module.get_buffer(SCALE) if self.trained is None else self.trained()
        if self.kept:
            return round_with_kept(x, self.grid, share, self.kept, self.moving)
        return self.grid.fake(x, share, self.moving)


class Once:
    """Rounds an input once for all linears of a site, which are called with one tensor one after another.

    Args:
        uses: how many linears there are; after the last one the tensors are let go.
    """

    def __init__(self, uses: int) -> None:
        self.uses = uses
        self._last: tuple[Tensor, Tensor] | None = None
        self._left = 0

    def __call__(self, x: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` gives, or gave for this very tensor."""
        if self._last is None or self._last[0] is not x:
            self._last, self._left = (x, make()), self.uses
        rounded = self._last[1]
        self._left -= 1
        if not self._left:
            self._last = None
        return rounded


def round_inputs(linear: Any, grid: InputGrid, scale: float | None = None, kept: int = 0) -> None:
    """Let a linear round its input from now on; ``scale``, where given, becomes its ``input_scale``, of every group alike."""
    if scale is not None:
        linear.register_buffer(SCALE, torch.full((input_groups(linear.in_features, grid.group),), scale))
    if rounding(linear) is None:
        linear.register_forward_pre_hook(RoundInput(grid, kept))


def rounding(linear: nn.Module) -> RoundInput | None:
    """The hook that rounds the input of a linear, if there is one."""
    return next((h for h in linear._forward_pre_hooks.values() if isinstance(h, RoundInput)), None)


def rotate_input(linear: Any) -> None:
    """Let a linear rotate its input from now on, before it rounds it."""
    linear.register_forward_pre_hook(RotateInput(linear.in_features), prepend=True)


def order_input(linear: Any, order: Tensor) -> None:
    """Let a linear put its input in this order, int32 [C], from now on, before it rounds it."""
    linear.register_buffer(ORDER, order)
    linear.register_forward_pre_hook(OrderInput(), prepend=True)


def turned(linear: nn.Module, x: Tensor) -> Tensor:
    """What the weight of a linear sees of an input [..., C], but for rounding."""
    for hook in linear._forward_pre_hooks.values():
        if isinstance(hook, RotateInput | OrderInput):
            x = hook(linear, (x,))[0]
    return x


def carry_inputs(old: nn.Module, new: nn.Module) -> None:
    """Let a stand-in treat its input as the linear does that it stands in for."""
    turns = any(isinstance(h, RotateInput | OrderInput) for h in new._forward_pre_hooks.values())
    for hook in old._forward_pre_hooks.values():
        if isinstance(hook, RoundInput):
            new.register_buffer(SCALE, getattr(old, SCALE))
        if isinstance(hook, OrderInput) and not turns:
            new.register_buffer(ORDER, getattr(old, ORDER))
        if isinstance(hook, RoundInput) or (isinstance(hook, RotateInput | OrderInput) and not turns):
            new.register_forward_pre_hook(hook)
