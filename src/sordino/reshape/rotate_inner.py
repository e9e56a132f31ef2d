"""Rotations inside a block (PrefixQuant, spec section 3, after QuaRot and SpinQuant): R2, R3 and R4.

R2 turns the values of each head, in the weights of v_proj and o_proj. R3 turns queries and keys after the rotary embedding, so
that keys can be rounded; R4 turns the input of down_proj, whose weight is turned beforehand. R3 and R4 run online, by a fast
transform. All are Hadamard matrices where one of the size is constructed, else partly seeded (numerics/hadamard.py).
Shapes: R = out_features, C = in_features, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sordino.anatomy import Anatomy
from sordino.contract import Move
from sordino.errors import InputError
from sordino.numerics.hadamard import rotation
from sordino.recipe import Format
from sordino.reshape.replace import replace
from sordino.reshape.turning import turn_values
from sordino.runtime.inner import ATTENTION, DOWN, dress


class RotateInner(Move):
    """Rotate values, keys and the input of down_proj.

    Args:
        values: R2.
        keys: R3.
        down: R4.
    """

    name = "rotate-inner"

    def __init__(self, values: bool = True, keys: bool = True, down: bool = True) -> None:
        self.values, self.keys, self.down = values, keys, down

    def check(self, fmt: Format, anatomy: Anatomy, target: str | None) -> None:
        """A column scale of down_proj would act behind R4, and up_proj, which should take it over, stands before it."""
        names = [anatomy.full_name(i, DOWN) for i in range(anatomy.n_blocks)]
        if self.down and any(fmt.weights.resolve(name).column_scale for name in names):
            raise InputError("move 'rotate-inner': down_proj has a column scale, which R4 keeps from up_proj; set down=false")

    def inner(self) -> tuple[str, ...]:
        """Which of them, by name."""
        return tuple(n for n in ("values", "keys", "down") if getattr(self, n))

    @torch.no_grad()
    def reshape(self, block: nn.Module, index: int, anatomy: Anatomy, artifacts: dict[str, Any]) -> None:
        """Turn the weights."""
        if self.values:
            turn_values(block, rotation(block.get_submodule(ATTENTION).head_dim).apply)
        if self.down:
            down: Any = block.get_submodule(DOWN)
            replace(down, rotation(down.in_features).apply(down.weight.double()))
        dress(block, self.inner())
