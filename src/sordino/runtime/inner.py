"""Rotations that run inside a block (R3, R4), put on one whose weights are turned already."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sordino.runtime.attention import rotate_keys
from sordino.runtime.inputs import rotate_input

ATTENTION, DOWN = "self_attn", "mlp.down_proj"


def dress(block: nn.Module, inner: Sequence[str]) -> None:
    """Add the online rotations among ``inner`` ("values" is in the weights alone, "keys", "down") to a decoder layer."""
    if "keys" in inner:
        rotate_keys(block.get_submodule(ATTENTION))
    if "down" in inner:
        rotate_input(block.get_submodule(DOWN))
