"""Evening out the channels that feed o_proj and down_proj, before they are rotated (ours; sites as in BiSup, spec section 4).

A rotation spreads a loud channel over all of them, and the whole token gets loud; a static scale then has to serve loud and
quiet tokens at once. Where the channel is made by a linear, its loudness can move into the weights instead, exactly: rows of
v_proj are divided by s and columns of o_proj multiplied, likewise up_proj and down_proj (whose input is linear in up_proj).

After a rotation, rounding noise is even over the channels, of inputs and of weights alike. Either noise reaches the output
with an energy proportional to A·B, A = sum_j s_j² |w_j|² and B = sum_j m_j / s_j², where w_j is a column of the weight and m_j
the mean square of its input. By Cauchy and Schwarz the product is least for s_j² = sqrt(m_j) / |w_j|, so that is taken.
Shapes: R = out_features, C = in_features, K key heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sordino.anatomy import Anatomy
from sordino.contract import Move, SiteInputs
from sordino.errors import InputError
from sordino.recipe import Format
from sordino.reshape.quiet import WINDOWS, channel_means
from sordino.reshape.replace import replace
from sordino.runtime.inner import ATTENTION, DOWN

_RANGE = 64.0  # of a scale, around the channels' mean: dead channels stay what they are


class Smooth(Move):
    """Move the loudness of channels into the weights; before `rotate-inner`.

    Args:
        values: channels between v_proj and o_proj.
        down: channels between up_proj and down_proj.
    """

    name = "smooth"
    before_inner = True
    survey_windows = WINDOWS

    def __init__(self, values: bool = True, down: bool = True) -> None:
        self.values, self.down = values, down

    def check(self, fmt: Format, anatomy: Anatomy, target: str | None) -> None:
        """Something must be left to do."""
        if not (self.values or self.down):
            raise InputError("move 'smooth': values and down are both off")

    def survey(self, index: int, block: nn.Module, inputs: SiteInputs, artifacts: dict[str, Any]) -> None:
        """Mean squares of one block's channels."""
        found = artifacts.setdefault(self.name, {})
        if self.values:
            found[index, "values"] = channel_means(inputs("o"), torch.square)
        if self.down:
            found[index, "down"] = channel_means(inputs("down"), torch.square)

    @torch.no_grad()
    def reshape(self, block: nn.Module, index: int, anatomy: Anatomy, artifacts: dict[str, Any]) -> None:
        """Scale the weights."""
        found = artifacts[self.name]
        if self.values:
            attention: Any = block.get_submodule(ATTENTION)
            scale = value_scales(found[index, "values"], attention.o_proj.weight, anatomy.key_heads, attention.head_dim)
            _divide_rows(attention.v_proj, scale.flatten())
            columns = scale[:, None].expand(-1, attention.o_proj.in_features // scale.numel(), -1)
            _multiply_columns(attention.o_proj, columns.flatten())
        if self.down:
            down: Any = block.get_submodule(DOWN)
            scale = even_scales(found[index, "down"], down.weight.double().square().sum(0))
            _divide_rows(block.get_submodule(anatomy.absorbable()[DOWN]), scale)
            _multiply_columns(down, scale)


def even_scales(inputs: Tensor, weights: Tensor) -> Tensor:
    """The scales that make A·B least, with geometric mean 1.

    Args:
        inputs: mean squares of the channels, fp64 [C] (any shape).
        weights: squared norms of the weight's columns, likewise.

    Returns:
        fp64, of the same shape; within 64 times either way.
    """
    ratio = inputs.clamp(min=1e-30) / weights.clamp(min=1e-30)
    logs = ratio.log() / 4
    live = (inputs > 0) & (weights > 0)
    logs = torch.where(live, logs - logs[live].mean(), 0.0) if live.any() else torch.zeros_like(logs)
    return logs.exp().clamp(1 / _RANGE, _RANGE)


def value_scales(inputs: Tensor, weight: Tensor, heads: int, size: int) -> Tensor:
    """Scales of the values, fp64 [K, d]: query heads that share a key head share them, so their sums are taken.

    Args:
        inputs: mean squares of o_proj's input, fp64 [C].
        weight: of o_proj, [R, C].
        heads: K.
        size: d.
    """
    m, w = (t.view(heads, -1, size).sum(1) for t in (inputs, weight.double().square().sum(0)))
    return even_scales(m, w)


def _divide_rows(linear: Any, scale: Tensor) -> None:
    replace(linear, linear.weight.double() / scale[:, None])
    if linear.bias is not None:
        replace(linear, linear.bias.double() / scale, "bias")


def _multiply_columns(linear: Any, scale: Tensor) -> None:
    replace(linear, linear.weight.double() * scale)
