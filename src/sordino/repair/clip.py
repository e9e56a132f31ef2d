"""Fine-grained clipping (BiSup-style, our reading; spec section 3): how far each group's codes reach, and what they round.

One factor for every weight group, for every group of input channels of a site, for keys and for values of every head. It is a
sigmoid, as in OmniQuant, of a parameter that starts at the host's own share, so that step 0 is the host. In contrast to the
tuner's roundings (repair/spaces.py) a weight's code follows from its value and the scale; a low-rank update, where there
is one, is added to the value first. Shapes: R = out_features, C = in_features, G = groups, g = C/G.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sordino.numerics.kept import Kept
from sordino.numerics.straight import fake_round
from sordino.repair.low_rank import LowRank, SideBranch
from sordino.repair.spaces import near, stored_scale
from sordino.rounding import Rounded
from sordino.runtime.inputs import carry_inputs

_MOST = 0.982  # share that a parameter starts with where the host clips nothing: sigmoid(4), OmniQuant's
_LEAST = 0.05


class Clip:
    """Scales of some groups, by a bounded factor.

    Attributes:
        first: their values before training, of any shape.
        parameter: logit of the share of the full range that the codes reach.
    """

    def __init__(self, first: Tensor, share: Tensor):
        """Start at ``first``, which reaches ``share`` of the full range; it can grow by 1/share at most."""
        self.first = first.detach().float().clone()
        self.parameter = nn.Parameter(torch.logit(share.detach().float().clamp(_LEAST, _MOST)))
        self.whole = self.first / torch.sigmoid(self.parameter.detach())

    def __call__(self, grown: Tensor | float = 1.0) -> Tensor:
        """The scales as they will be stored, with gradients as if they were not rounded; the full range may have ``grown``."""
        return stored_scale(self.whole * torch.sigmoid(self.parameter) * grown)


class ClippedLinear(nn.Module):
    """A rounded linear whose clips, and low-rank update, can be trained.

    Attributes:
        exact: fp32 [R, G, g], what is rounded, but for the update.
        clip: scales [R, G].
        update: the low-rank update, or the pair beside the weight, or None.
        columns: says by what the columns of ``exact`` are multiplied (repair/smoothing.py), [C]; None for nothing.
        rows: says by what the whole of its rows, the bias included, is multiplied, [R]; likewise.
        bias: the linear's own, frozen, or None.
    """

    exact: Tensor
    zero: Tensor

    def __init__(self, rounded: Rounded, bias: Tensor | None, update: LowRank | SideBranch | None):
        super().__init__()
        side = None if isinstance(update, SideBranch) else rounded.side  # a trained pair takes the place of the old one
        self.start, self.bias, self.update = replace(rounded, latent=None, side=side), bias, update
        self.columns: Callable[[], Tensor] | None = None
        self.rows: Callable[[], Tensor] | None = None
        shape = (*rounded.scale.shape, rounded.group)
        self.register_buffer("exact", rounded_from(rounded).view(shape))
        self.register_buffer("zero", rounded.zero[..., None])
        self.clip = Clip(rounded.scale, rounded.scale / _full(self.exact, self.zero, self.top))

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.start.bits) - 1

    def grid(self) -> tuple[Tensor, Tensor]:
        """What is rounded, fp32 [R, G, g], and the scales [R, G], which follow columns that grow."""
        value, grown = self.exact, torch.ones(())
        if self.columns is not None:
            value = self.exact * self.columns().view(self.exact.shape[1:])
            grown = _full(value, self.zero, self.top) / _full(self.exact, self.zero, self.top)
        if isinstance(self.update, LowRank):
            value = value + self.update().view_as(value)
        if self.rows is not None:
            rows = self.rows()[:, None]
            value, grown = value * rows[..., None], grown * rows
        return value, self.clip(grown)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight as it will be stored, [R, C]."""
        value, scale = self.grid()
        rounded = fake_round(value, scale[..., None], -self.zero, self.top - self.zero)
        low = self.start.columned(rounded.view_as(self.start.codes).to(dtype))
        kept = self._kept()
        weight = self.start.around(low, None if kept is None else kept[0])
        return weight + self.update().to(dtype) if isinstance(self.update, SideBranch) else weight

    def _kept(self) -> tuple[Tensor, Tensor] | None:
        """The kept columns with their part of the update, [R, k], and their scales, as stored; None where there are none."""
        kept = self.start.kept
        if kept is None:
            return None
        value, scale = kept.values(), kept.scale
        if isinstance(self.update, LowRank):
            value = value + self.update()[:, -kept.codes.shape[1] :]
        if self.rows is not None:
            rows = self.rows()[:, None]
            value, scale = value * rows, stored_scale(scale * rows)
        return fake_round(value, scale, *kept.bounds), scale

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + bias``."""
        bias = self.bias if self.bias is None or self.rows is None else (self.bias.float() * self.rows()).to(x.dtype)
        return F.linear(x, self.weight(x.dtype), bias)

    @torch.no_grad()
    def rounded(self) -> Rounded:
        """What it has become."""
        value, scale = self.grid()
        codes = ((value / scale[..., None]).round_() + self.zero).clamp_(0, self.top)
        shape = self.start.codes.shape
        side = self.update.pair() if isinstance(self.update, SideBranch) else self.start.side
        new = self._kept()
        kept = None if new is None else Kept((new[0] / new[1]).round_().to(torch.int8), new[1])
        codes = codes.view(shape).to(torch.uint8)
        return replace(self.start, codes=codes, scale=scale, latent=value.reshape(shape), side=side, kept=kept)


def rounded_from(rounded: Rounded) -> Tensor:
    """What a weight was rounded from, fp32 [R, C]; where its nearest code is another one, what is next to the stored code."""
    rows, groups = rounded.scale.shape
    if rounded.latent is None:
        return rounded.grid_values()
    scale, zero, top = rounded.scale[..., None], rounded.zero[..., None], (1 << rounded.bits) - 1
    codes = rounded.codes.view(rows, groups, -1).float() - zero
    steps = rounded.latent.view_as(codes) / scale
    nearest = torch.minimum(torch.maximum(steps.round(), -zero), top - zero)
    return torch.where(nearest == codes, rounded.latent.view_as(codes), near(steps, codes) * scale).view(rows, -1)


def _full(value: Tensor, zero: Tensor, top: int) -> Tensor:
    """Scales that clip nothing, fp32 [R, G]."""
    up, down = (value / (top - zero).clamp(min=1)).amax(-1), (-value / zero.clamp(min=1)).amax(-1)
    return torch.maximum(up, down).clamp(min=1e-30)


class ClipSpace:
    """Clips and low-rank updates of the rounded linears of a block; additive grids are left as they are.

    Args:
        block: the decoder layer, edited in place until :meth:`fold`.
        solved: the rounded linears, by name inside the block.
        rate: learning rate of the clips' parameters; 0 leaves them.
        updates: of each linear, by name; none where there is no update.
        update_rate: of the updates, in steps of the grid.
    """

    def __init__(
        self,
        block: nn.Module,
        solved: dict[str, Rounded],
        rate: float,
        updates: Mapping[str, LowRank | SideBranch],
        update_rate: float,
    ):
        self.block, self.rate, self.update_rate = block, rate, update_rate
        affine = {name: r for name, r in solved.items() if r.grid == "affine"}
        self.plain: dict[str, nn.Module] = {name: block.get_submodule(name) for name in affine}
        self.trained: dict[str, ClippedLinear] = {}
        for name, rounded in affine.items():
            bias: Any = self.plain[name].bias
            made = self.trained[name] = ClippedLinear(rounded, bias, updates.get(name))
            made.clip.parameter.requires_grad_(rate > 0)
            carry_inputs(self.plain[name], made)
            block.set_submodule(name, made)

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer."""
        groups: list[dict[str, Any]] = []
        if self.rate > 0:
            groups.append({"params": [t.clip.parameter for t in self.trained.values()], "lr": self.rate})
        for t in self.trained.values():
            if t.update is not None:
                a, b = t.update.rates(self.update_rate, float(t.clip.first.mean()))
                groups += [{"params": [t.update.a], "lr": a}, {"params": [t.update.b], "lr": b}]
        return groups

    def collect(self) -> None:
        """After the backward pass: nothing to do."""

    def settle(self) -> None:
        """After an optimizer step: nothing to do."""

    def fold(self) -> dict[str, Rounded]:
        """Put the plain linears back; returns what the rounded ones have become, for the context to commit."""
        for name, module in self.plain.items():
            self.block.set_submodule(name, module)
        return {name: t.rounded() for name, t in self.trained.items()}
