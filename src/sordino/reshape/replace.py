"""Editing the parameters of a freshly loaded block, which are still the source's own tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def replace(module: Any, value: Tensor, name: str = "weight") -> None:
    """Put a new parameter, in the old one's dtype, in the place of the old one, which must stay as it is."""
    dtype = getattr(module, name).dtype
    setattr(module, name, nn.Parameter(value.to(dtype).contiguous(), requires_grad=False))
