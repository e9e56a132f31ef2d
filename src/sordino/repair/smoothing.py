"""Soft-constrained smoothing (BiSup-style, our reading; spec section 4): inputs divided by s_a, weights multiplied by s_w.

Where the two are equal, nothing changes in full precision (SmoothQuant, OmniQuant); here they may drift apart, at a price. The
sites are those whose input comes from a norm, which takes 1 / s_a into its gain, so that it costs nothing at run time. The
inputs of o_proj and down_proj are left out: in the rotated hosts a rotation stands between them and what could take the
factor (in the others v_proj and up_proj could). Shapes: C channels, G groups, g = C/G.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sordino.anatomy import Anatomy
from sordino.repair.clip import ClippedLinear
from sordino.rounding import Rounded
from sordino.runtime.inputs import RoundInput, rounding
from sordino.runtime.modules import ORDER

Mode = Literal["soft", "hard", "free"]
_WIDEST = math.log(100)  # of u; OmniQuant cuts its scales likewise
_PRICES = {"soft": (0.01, 0.1), "hard": (0.0, 0.0), "free": (0.0, 0.0)}  # of u^2 and v^2, in units of the loss at first


class Smoothing:
    """Factors of one site: ``s_a = exp(u)``, ``s_w = exp(u + v)``.

    Attributes:
        u, v: fp32 [C], zero at first, in the order of the norm's channels.
        order: column -> channel, int64 [C]; None where they are the same.
    """

    def __init__(self, norm: Any, linears: list[ClippedLinear], order: Tensor | None, mode: Mode):
        self.norm, self.order, self.prices = norm, order, _PRICES[mode]
        self.u = nn.Parameter(torch.zeros_like(norm.weight, dtype=torch.float32))
        self.v = nn.Parameter(torch.zeros_like(self.u), requires_grad=mode != "hard")
        self.free = torch.ones_like(self.u)  # channels that are kept at 8 bits have no factor
        start = linears[0].start
        if start.kept is not None:
            last = start.codes.shape[1] - start.kept.codes.shape[1]
            self.free[torch.arange(len(self.free))[last:] if order is None else order[last:]] = 0
        bias = [] if getattr(norm, "bias", None) is None else [norm.bias]
        self.held = [norm.weight, *bias]
        self.first = [p.detach().float().clone() for p in self.held]
        for p in self.held:
            p.requires_grad_(True)
        for linear in linears:
            linear.columns = self.columns

    def columns(self) -> Tensor:
        """s_w by column, fp32 [C]."""
        factors = ((self.u + self.v) * self.free).exp()
        return factors if self.order is None else factors[self.order]

    def penalty(self) -> Tensor:
        """What it costs that s_w leaves s_a, and s_a its first value."""
        of_u, of_v = self.prices
        return of_u * self.u.square().mean() + of_v * self.v.square().mean()

    def collect(self) -> None:
        """Hand the norm's gradients to u: the gain is ``g exp(-u)``, and so is a bias."""
        for p in self.held:
            if p.grad is not None and self.u.grad is not None:
                self.u.grad -= p.grad.float() * p.detach().float() * self.free
            p.grad = None

    @torch.no_grad()
    def settle(self, stored: torch.dtype) -> None:
        """Keep u in bounds and put it into the norm, as it will be stored."""
        self.u.clamp_(-_WIDEST, _WIDEST)
        for p, first in zip(self.held, self.first, strict=True):
            p.copy_((first * (-self.u * self.free).exp()).to(stored))


class SmoothSpace:
    """Smoothing of the sites of a block that a norm feeds.

    Args:
        block: the decoder layer.
        anatomy: of its family.
        trained: the stand-ins of its rounded linears (ClipSpace); a site is smoothed where it has all of them.
        rate: learning rate of u and v.
        mode: "soft", "hard" (s_w = s_a) or "free" (no price).
        stored: dtype of the checkpoint.
    """

    def __init__(
        self,
        block: nn.Module,
        anatomy: Anatomy,
        trained: Mapping[str, ClippedLinear],
        rate: float,
        mode: Mode,
        stored: torch.dtype,
    ):
        self.rate, self.stored = rate, stored
        self.sites: list[Smoothing] = []
        self.hooks: list[RoundInput] = []  # a loud channel sets the scale of its token: u has to feel that
        for site, norm in anatomy.norms.items():
            names = [x.name for x in anatomy.at(site)]
            if all(name in trained for name in names):
                order = trained[names[0]]._buffers.get(ORDER)
                linears = [trained[name] for name in names]
                self.hooks += [hook for linear in linears if (hook := rounding(linear)) is not None]
                self.sites.append(Smoothing(block.get_submodule(norm), linears, None if order is None else order.long(), mode))
        for hook in self.hooks:
            hook.moving = True

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer."""
        members = [p for s in self.sites for p in (s.u, s.v) if p.requires_grad]
        return [{"params": members, "lr": self.rate}] if members else []

    def penalty(self) -> Tensor | float:
        """Of all sites."""
        return sum((s.penalty() for s in self.sites), 0.0)

    def collect(self) -> None:
        """After the backward pass."""
        for s in self.sites:
            s.collect()

    def settle(self) -> None:
        """After an optimizer step."""
        for s in self.sites:
            s.settle(self.stored)

    def fold(self) -> dict[str, Rounded]:
        """The norms hold s_a already; s_w is in what ClipSpace folds."""
        for s in self.sites:
            for p in s.held:
                p.requires_grad_(False)
        for hook in self.hooks:
            hook.moving = False
        return {}
