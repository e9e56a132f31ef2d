"""Soft-constrained smoothing (BiSup-style, our reading; spec section 4): inputs divided by s_a, weights multiplied by s_w.

Where the two are equal, nothing changes in full precision (SmoothQuant, OmniQuant); here they may drift apart, at a price.
What makes the input takes 1 / s_a, so that it costs nothing at run time: the gain of a norm for q, k, v and for gate, up;
the rows of v_proj for o_proj (query heads that share a value head share its factors; values of a protected prefix are
divided too) and those of up_proj for down_proj, unless an online rotation stands between. Shapes: R rows, C columns, F
factors, K key heads, P tokens of the prefix, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sordino.anatomy import Anatomy, Site
from sordino.repair.clip import ClippedLinear
from sordino.rounding import Rounded
from sordino.runtime.inner import ATTENTION
from sordino.runtime.inputs import RotateInput, RoundInput, rounding
from sordino.runtime.modules import ORDER
from sordino.runtime.prefix import VALUE

Mode = Literal["soft", "hard", "free"]
_WIDEST = math.log(100)  # of u; OmniQuant cuts its scales likewise
_MAKERS: dict[Site, str] = {"o": "self_attn.v_proj", "down": "mlp.up_proj"}
_QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.99)
_SHARES = (0.3, 0.5)
_PRICES = {"soft": (0.01, 0.1), "hard": (0.0, 0.0), "free": (0.0, 0.0)}  # of u^2 and v^2, in units of the loss at first


class Smoothing:
    """Factors of one site: ``s_a = exp(u)``, ``s_w = exp(u + v)``.

    What makes the input is divided by s_a: tensors, in place, or the rows of a linear that is trained as well.

    Attributes:
        u, v: fp32 [F], zero at first, in the order of what makes the input.
        spread: column -> factor, int64 [C].
        begun: what u began with, fp32 [F].
    """

    def __init__(
        self,
        site: Site,
        size: int,
        linears: list[ClippedLinear],
        spread: Tensor,
        mode: Mode,
        held: Sequence[Tensor],
        maker: ClippedLinear | None = None,
    ):
        """Attach factors.

        Args:
            site: whose input is divided.
            size: F.
            linears: of the site.
            spread: column -> factor.
            mode: what ties s_w to s_a.
            held: what is divided in place, [F] or [1, K, P, F/K].
            maker: the linear whose rows are divided, or None.
        """
        self.site, self.linears, self.maker = site, linears, maker
        self.spread, self.prices, self.held = spread, _PRICES[mode], held
        self.u = nn.Parameter(torch.zeros(size))
        self.v = nn.Parameter(torch.zeros(size), requires_grad=mode != "hard")
        self.begun = torch.zeros(size)
        self.free = torch.ones(size)  # channels that are kept at 8 bits have no factor
        start = linears[0].start
        if start.kept is not None:
            self.free[spread[-start.kept.codes.shape[1] :]] = 0
        self.first = [p.detach().float().clone() for p in held]
        for p in held:
            p.requires_grad_(True)
        for linear in linears:
            linear.columns = self.columns
        if maker is not None:
            maker.rows = self.rows

    def columns(self) -> Tensor:
        """s_w by column, fp32 [C]."""
        return ((self.u + self.v) * self.free).exp()[self.spread]

    def rows(self) -> Tensor:
        """1 / s_a, fp32 [F]."""
        return (-self.u * self.free).exp()

    def penalty(self) -> Tensor:
        """What it costs that s_w leaves s_a, and s_a its first value."""
        of_u, of_v = self.prices
        return of_u * (self.u - self.begun).square().mean() + of_v * self.v.square().mean()

    def collect(self) -> None:
        """Hand the gradients of what is held to u: it is ``first exp(-u)``."""
        for p in self.held:
            if p.grad is not None and self.u.grad is not None:
                self.u.grad -= by_factor(p.grad.float() * p.detach().float()) * self.free
            p.grad = None

    @torch.no_grad()
    def settle(self, stored: torch.dtype) -> None:
        """Keep u in bounds and put it into what is held, as it will be stored."""
        self.u.clamp_(-_WIDEST, _WIDEST)
        for p, first in zip(self.held, self.first, strict=True):
            rows = self.rows() if p.ndim == 1 else self.rows().view(1, p.shape[1], 1, p.shape[3])
            p.copy_((first * rows).to(stored))


def candidates(inputs: Tensor, weights: Tensor) -> Iterator[Tensor]:
    """First values of u, fp32 [F], by the largest magnitudes of inputs and of the weights that read them, [F] each.

    None; Outlier Suppression+'s, which divides what is louder than a threshold (five quantiles); SmoothQuant's (two
    exponents), less its mean, which dynamic scales take out again.
    """
    yield torch.zeros_like(inputs)
    inputs, weights = inputs.clamp(min=1e-5), weights.clamp(min=1e-5)
    for threshold in inputs.quantile(torch.tensor(_QUANTILES)):
        yield (inputs / threshold).clamp(min=1).log()
    for share in _SHARES:
        u = share * inputs.log() - (1 - share) * weights.log()
        yield u - u.mean()


def by_factor(x: Tensor) -> Tensor:
    """Sum over what shares a factor: [F] as it is, [1, K, P, d] -> [K * d]."""
    return x if x.ndim == 1 else x.sum((0, 2)).flatten()


class SmoothSpace:
    """Smoothing of the sites of a block.

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
        self.rate, self.stored, self.block = rate, stored, block
        self.sites: list[Smoothing] = []
        self.hooks: list[RoundInput] = []  # a loud channel sets the scale of its token: u has to feel that
        self.attention: Any = block.get_submodule(ATTENTION)
        for site, norm in anatomy.norms.items():
            names = [x.name for x in anatomy.at(site)]
            if all(name in trained for name in names):
                module: Any = block.get_submodule(norm)
                bias = [] if getattr(module, "bias", None) is None else [module.bias]
                self._add(site, names, len(module.weight), trained, mode, [module.weight, *bias])
        for site, name in self._makers(anatomy, trained).items():
            held = [self.attention.get_buffer(VALUE)] if site == "o" and hasattr(self.attention, VALUE) else []
            rows = len(trained[name].start.codes)
            self._add(site, [x.name for x in anatomy.at(site)], rows, trained, mode, held, trained[name])
        self._move(True)

    def _makers(self, anatomy: Anatomy, trained: Mapping[str, ClippedLinear]) -> dict[Site, str]:
        """The linears whose outputs reach an input with nothing but a mixture of tokens, or a product, in between."""
        found: dict[Site, str] = {}
        for site, maker in _MAKERS.items():
            names = [x.name for x in anatomy.at(site)]
            if all(name in trained for name in [maker, *names]):
                turned = any(isinstance(h, RotateInput) for n in names for h in trained[n]._forward_pre_hooks.values())
                found |= {} if turned else {site: maker}
        return found

    def _add(self, site: Site, names: list[str], size: int, trained: Mapping[str, ClippedLinear], *rest: Any) -> None:
        """Smooth one site."""
        linears = [trained[name] for name in names]
        spread = torch.arange(size)
        if site == "o":  # query heads that share a value head share its factors
            head = self.attention.head_dim
            queries = linears[0].start.codes.shape[1] // size
            spread = spread.view(-1, 1, head).expand(-1, queries, -1).flatten()
        order = linears[0]._buffers.get(ORDER)
        self.sites.append(Smoothing(site, size, linears, spread if order is None else spread[order.long()], *rest))
        self.hooks += [hook for linear in linears if (hook := rounding(linear)) is not None]

    def _move(self, on: bool) -> None:
        """Let dynamic scales of what is smoothed have gradients."""
        for hook in self.hooks:
            hook.moving = on
        self.attention.moving_values = on

    @torch.no_grad()
    def begin(self, loudest: Mapping[Site, Tensor], loss: Callable[[], float]) -> None:
        """Begin each site with the candidate that has the lowest loss of the block, the sites before it having theirs.

        Args:
            loudest: largest magnitude of each channel of a site's input, as the weights' columns read it, [C].
            loss: of the block as it is now.
        """
        for s in self.sites:
            weights = torch.stack([_column_sizes(linear) for linear in s.linears]).amax(0)
            free, least = s.free > 0, math.inf
            for u in candidates(*(_loudest(x, s)[free] for x in (loudest[s.site], weights))):
                s.u.zero_()
                s.u[free] = u.clamp_(-_WIDEST, _WIDEST)
                s.settle(self.stored)
                if (at := loss()) < least:
                    least, s.begun = at, s.u.clone()
            s.u.copy_(s.begun)
            s.settle(self.stored)

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
        """What is held has s_a already, and s_w is in what ClipSpace folds, as are rows; their biases are not."""
        for s in self.sites:
            for p in s.held:
                p.requires_grad_(False)
            if s.maker is not None and s.maker.bias is not None:
                module: Any = self.block.get_submodule(_MAKERS[s.site])
                bias = s.maker.bias.float() * s.rows().detach()
                module.bias = nn.Parameter(bias.to(self.stored).to(s.maker.bias.dtype), requires_grad=False)
        self._move(False)
        return {}


def _column_sizes(linear: ClippedLinear) -> Tensor:
    """Largest magnitude of every column of a weight, [C]."""
    sizes, column = linear.exact.abs().amax(0).flatten(), linear.start.column
    return sizes if column is None else sizes * column.abs()


def _loudest(columns: Tensor, smoothing: Smoothing) -> Tensor:
    """Largest of the columns that share a factor, [C] -> [F]."""
    return torch.zeros_like(smoothing.u).scatter_reduce(0, smoothing.spread, columns.float(), "amax")
