"""Rotations (R3, R4) and orders of channels that run inside a block, put on one whose weights are turned already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sordino.runtime.attention import rotate_keys
from sordino.runtime.inputs import order_input, rotate_input
from sordino.runtime.modules import ORDER, QuantLinear

ATTENTION, DOWN = "self_attn", "mlp.down_proj"


def dress(block: nn.Module, inner: Sequence[str]) -> None:
    """Add what runs online of ``inner`` ("values" is in the weights alone; "keys", "down", "channels") to a decoder layer.

    An order of channels that a linear does not hold yet is left for loading to fill in.
    """
    if "keys" in inner:
        rotate_keys(block.get_submodule(ATTENTION))
    if "down" in inner:
        rotate_input(block.get_submodule(DOWN))
    if "channels" in inner:
        for linear in [m for m in block.modules() if isinstance(m, nn.Linear | QuantLinear)]:
            empty = torch.empty(linear.in_features, dtype=torch.int32, device="meta")
            held = linear._buffers.get(ORDER)
            order_input(linear, empty if held is None else held)
