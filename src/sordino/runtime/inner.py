"""Rotations (R3, R4), means and orders of channels that run inside a block, put on one whose weights fit them already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sordino.runtime.attention import KEY_MEAN, center_keys, rotate_keys
from sordino.runtime.inputs import order_input, rotate_input
from sordino.runtime.modules import ORDER, QuantLinear

ATTENTION, DOWN = "self_attn", "mlp.down_proj"


def dress(block: nn.Module, inner: Sequence[str]) -> None:
    """Add what runs online of ``inner`` to a decoder layer: "keys", "key-means", "down", "channels"; "values" is in weights.

    Means of keys and an order of channels that it does not hold yet are left for loading to fill in.
    """
    attention: Any = block.get_submodule(ATTENTION)
    if "key-means" in inner and not hasattr(attention, KEY_MEAN):
        shape = (attention.k_proj.out_features // attention.head_dim, attention.head_dim)
        center_keys(attention, torch.empty(shape, dtype=next(block.parameters()).dtype, device="meta"))
    if "keys" in inner:
        rotate_keys(attention)
    if "down" in inner:
        rotate_input(block.get_submodule(DOWN))
    if "channels" in inner:
        for linear in [m for m in block.modules() if isinstance(m, nn.Linear | QuantLinear)]:
            empty = torch.empty(linear.in_features, dtype=torch.int32, device="meta")
            held = linear._buffers.get(ORDER)
            order_input(linear, empty if held is None else held)
