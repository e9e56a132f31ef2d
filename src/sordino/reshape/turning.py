"""Orthogonal turns of a block's weights that keep its function, which several moves make.

Weights are multiplied in float64 and given back as new parameters: the source's own must stay as they are.
Shapes: R = out_features, C = in_features, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sordino.anatomy import Anatomy
from sordino.reshape.replace import replace
from sordino.runtime.inner import ATTENTION

Turn = Callable[[Tensor], Tensor]  # [..., n] -> [..., n], the product with an orthogonal matrix from the right


def turn_stream(block: nn.Module, anatomy: Anatomy, turn: Turn) -> None:
    """Fuse the norms' gains into the linears they feed, and turn the residual stream."""
    for linear in anatomy.linears:
        module: Any = block.get_submodule(linear.name)
        weight = module.weight.double()
        if linear.site in anatomy.norms:
            gain: Any = block.get_submodule(anatomy.norms[linear.site]).weight
            replace(module, turn(weight * gain.double()))
        else:
            replace(module, turn(weight.T).T)
            if module.bias is not None:
                replace(module, turn(module.bias.double()), "bias")
    for name in anatomy.norms.values():
        norm: Any = block.get_submodule(name)
        if getattr(norm, "bias", None) is not None:
            # Where the gain is zero the linears' columns are now, too: nothing there can be added any more.
            exact = norm.weight.double()
            replace(norm, turn(torch.where(exact == 0, 0.0, norm.bias.double() / exact)), "bias")
        replace(norm, torch.ones_like(norm.weight))


def turn_values(block: nn.Module, turn: Turn) -> None:
    """Turn the values of every head: rows of v_proj, columns of o_proj."""
    attention: Any = block.get_submodule(ATTENTION)
    v, o, size = attention.v_proj, attention.o_proj, attention.head_dim
    heads = v.weight.double().unflatten(0, (-1, size))  # [K, d, C]
    replace(v, turn(heads.transpose(1, 2)).transpose(1, 2).flatten(0, 1))
    if v.bias is not None:
        replace(v, turn(v.bias.double().view(-1, size)).flatten(), "bias")
    replace(o, turn(o.weight.double().unflatten(1, (-1, size))).flatten(1))
