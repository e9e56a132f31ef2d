"""The block context: what solvers and moves see of the block that is being quantized (contract.BlockContext)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from sordino.anatomy import Anatomy, Site
from sordino.contract import Split, StreamName
from sordino.errors import SordinoError
from sordino.numerics.affine import round_scale
from sordino.numerics.divergence import token_factors, token_weights
from sordino.numerics.gram import add_cross, add_gram, mirror
from sordino.rounding import Rounded, Stats
from sordino.runtime.attention import KEY_SCALE, VALUE_SCALE
from sordino.runtime.modules import SCALE, drop_bias, give_bias
from sordino.runtime.prefix import VALUE
from sordino.walk.runner import Runner
from sordino.walk.seeds import seeded

_SCALES = (SCALE, KEY_SCALE, VALUE_SCALE)


@dataclass
class Stream:
    """Hidden states between two blocks.

    Attributes:
        x: [N, L, D], calibration windows first.
        calib: how many of the windows are calibration windows (0 where only the held-out ones are computed).
    """

    x: Tensor
    calib: int

    def span(self, split: Split) -> tuple[int, int]:
        """First and last-plus-one window of a split."""
        return (0, self.calib) if split == "calib" else (self.calib, self.x.shape[0])


@dataclass
class Context:
    """See :class:`sordino.contract.BlockContext`."""

    index: int
    last: bool
    anatomy: Anatomy
    artifacts: dict[str, Any]
    fp: nn.Module
    q: nn.Module
    streams: dict[StreamName, Stream]
    call: dict[str, Any]
    batch: int
    budget: int
    seed: int
    stored: torch.dtype
    norm: nn.Module | None = None
    solved: dict[str, Rounded] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    following: Tensor | None = None
    _scales: dict[str, Tensor] = field(default_factory=dict)
    _runners: dict[tuple[str, str], Runner] = field(default_factory=dict)

    def rng(self, move: str) -> torch.Generator:
        """Generator seeded by (seed, block, move), whatever ran before."""
        return seeded(self.seed, self.index, move)

    def runner(self, which: StreamName, stream: StreamName) -> Runner:
        """The runner of one block on one stream."""
        if stream not in self.streams:
            raise SordinoError(f"block {self.index}: the {stream} stream is not computed; a move must ask for it")
        key = (which, stream)
        if key not in self._runners:
            layer = self.fp if which == "fp" else self.q
            x = self.streams[stream].x
            self._runners[key] = Runner(layer, x, self.call, self.anatomy, self.batch, self.budget)
        return self._runners[key]

    def run(self, which: StreamName, stream: StreamName, split: Split = "calib") -> Iterator[tuple[slice, Tensor]]:
        """Outputs of a block on a stream, batch by batch."""
        return self.runner(which, stream).outputs(*self.streams[stream].span(split))

    def inputs(
        self, which: StreamName, site: Site, split: Split = "calib", stream: StreamName | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Inputs of a site, the block running on its own stream or a given one, batch by batch."""
        source = stream or which
        return self.runner(which, source).inputs(site, *self.streams[source].span(split))

    def _absorb(self, linear: str, column: Tensor) -> None:
        """Move a column scale [C] to the rows of the linear before: into its stored scales, its codes stay."""
        before = self.anatomy.absorbable()[linear]
        module: Any = self.q.get_submodule(before)
        if before in self.solved:
            r = self.solved[before]
            rows = column.view(-1, *[1] * (r.scale.ndim - 1))
            latent = None if r.latent is None else r.latent * column[:, None]
            self.commit(before, replace(r, scale=round_scale(r.scale * rows), latent=latent))
        else:
            scaled = (module.weight.float() * column[:, None]).to(module.weight.dtype)
            module.weight = nn.Parameter(scaled, requires_grad=False)
            self.touch(next(x.site for x in self.anatomy.linears if x.name == before))
        if module.bias is not None:
            module.bias.data = (module.bias.float() * column).to(module.bias.dtype)

    def shift(self, module: str, bias: Tensor) -> None:
        """Add to the bias of a norm or linear of the q block."""
        self._add_bias(self.q.get_submodule(module), bias)
        self._touch_module(module)

    def shift_final(self, bias: Tensor) -> None:
        """Add to the bias of the final norm."""
        if self.norm is None:
            raise SordinoError(f"block {self.index}: the final norm stands beside the last block only")
        self._add_bias(self.norm, bias)

    def _add_bias(self, module: Any, bias: Tensor) -> None:
        give_bias(module)
        module.bias.data = (module.bias.float() + bias).to(self.stored).to(module.weight.dtype)

    def unshift(self, module: str) -> None:
        """Take the bias of a norm or linear away, or what was added to the one that the reshaped block has."""
        own = getattr(self.fp.get_submodule(module), "bias", None)
        if own is None:
            drop_bias(self.q.get_submodule(module))
        else:
            self.q.get_submodule(module).bias = nn.Parameter(own.detach().clone(), requires_grad=False)
        self._touch_module(module)

    def _touch_module(self, module: str) -> None:
        fed = [site for site, norm in self.anatomy.norms.items() if norm == module]
        self.touch(fed[0] if fed else next(x.site for x in self.anatomy.linears if x.name == module))

    def stats(self, site: Site, kinds: frozenset[str], cap: float | None = None) -> Stats:
        """Sums over the calibration tokens: "H" always, "D" where asked for."""
        n = self.anatomy.at(site)[0].in_features
        stats = Stats(0, torch.zeros(n, n), torch.zeros(n, n) if "D" in kinds else None)
        own = self.inputs("q", site)
        twin = self.inputs("fp", site) if stats.d is not None else repeat(None)
        # Both are run to their ends: only then does a runner keep what it saw.
        for (_, batch), target in zip(own, twin, strict=stats.d is not None):
            factors = None if cap is None else token_factors(batch, cap)
            x = _scaled(batch, factors)
            add_gram(stats.h, x)
            stats.tokens += x.shape[0]
            if target is not None and stats.d is not None:
                add_cross(stats.d, _scaled(target[1], factors), x)
        mirror(stats.h)
        if stats.d is not None:  # sum (x_fp - x) x^T; a difference of two bf16 numbers would not be one
            stats.d -= stats.h
        return stats

    def stream(self, name: StreamName, split: Split = "calib") -> Tensor:
        """What enters the block on a stream."""
        stream = self.streams[name]
        return stream.x[slice(*stream.span(split))]

    def target(self, split: Split = "calib") -> Tensor:
        """Output of the full-precision block on its own stream."""
        if self.following is None:
            raise SordinoError(f"block {self.index}: the target is known in close only, and if the fp stream is computed")
        return self.following[slice(*self.streams["fp"].span(split))]

    def commit(self, linear: str, rounded: Rounded) -> None:
        """Put a rounded weight into the q block and remember its stored form."""
        if rounded.column is not None and linear not in self.solved:  # later ones bring back what is stored
            latent = None if rounded.latent is None else rounded.latent / rounded.column
            absorbed = linear in self.anatomy.absorbable()
            if absorbed:
                self._absorb(linear, rounded.column)
            rounded = replace(rounded, column=None if absorbed else round_scale(rounded.column), latent=latent)
        module = self.q.get_submodule(linear)
        self.solved[linear] = rounded
        old: Any = module.weight
        module.weight = nn.Parameter(rounded.values().to(old.dtype), requires_grad=False)
        self.touch(next(x.site for x in self.anatomy.linears if x.name == linear))

    def touch(self, site: Site) -> None:
        """Forget kept inputs that depend on a linear of ``site``."""
        for (which, _), runner in self._runners.items():
            if which == "q":
                runner.touch(site)

    def error(self, split: Split = "heldout", exact: StreamName = "fp") -> float:
        """Median over windows of ``|q(x_q) - fp(x)|^2 / |fp(x)|^2``, x on the stream ``exact``; NaN if there are none."""
        if not len(self.stream("q", split)):
            return math.nan
        pairs = zip(self.run("q", "q", split), self.run("fp", exact, split), strict=True)
        return float(torch.cat([relative_error(y, target) for (_, y), (_, target) in pairs]).median())

    def reset(self) -> None:
        """Undo everything that moves did to the q block but the reshapes: what the twin has, and biases of zero."""
        exact = dict(self.fp.named_parameters())
        for name, parameter in self.q.named_parameters():
            parameter.data = exact[name].detach().clone() if name in exact else torch.zeros_like(parameter)
        for name, kept in [b for b in self.fp.named_buffers() if b[0].rpartition(".")[2] == VALUE]:  # smoothing divides it
            self.q.get_buffer(name).copy_(kept)
        self.solved = {}
        if self.norm is not None and getattr(self.norm, "bias", None) is not None:
            self.norm.bias.data.zero_()  # type: ignore[operator]
        self.put_scales(self.q)
        self.touch("qkv")

    def keep_scales(self) -> None:
        """Remember the scales of inputs, keys and values as they were searched, before a move trains them."""
        self._scales = {n: b.clone() for n, b in self.q.named_buffers() if n.rpartition(".")[2] in _SCALES}

    def put_scales(self, layer: nn.Module) -> None:
        """Give a block the scales that :meth:`keep_scales` remembered."""
        for name, scale in self._scales.items():
            parent, _, leaf = name.rpartition(".")
            layer.get_submodule(parent).register_buffer(leaf, scale.clone())

    def snapshot(self) -> Any:
        """State of the q block."""
        return {k: v.clone() for k, v in self.q.state_dict().items()}, dict(self.solved)

    def restore(self, state: Any) -> None:
        """Put a snapshot back."""
        weights, solved = state
        for name in [n for n, _ in self.q.named_parameters() if n not in weights]:
            drop_bias(self.q.get_submodule(name.rpartition(".")[0]))
        self.q.load_state_dict({k: v.clone() for k, v in weights.items()}, assign=True)
        self.solved = dict(solved)
        for key in [k for k in self._runners if k[0] == "q"]:
            del self._runners[key]


def _scaled(x: Tensor, factors: Tensor | None) -> Tensor:
    """[B, L, C] times [B, L] -> [T, C]."""
    return (x if factors is None else x * factors[..., None]).flatten(0, 1)


def relative_error(y: Tensor, target: Tensor) -> Tensor:
    """Weighted ``|y - t|^2 / |t|^2`` per window, see :func:`token_weights`: [B, L, D] twice -> fp32 [B]."""
    t = target.float()
    weights = token_weights(t)
    error = (y.float() - t).square().sum(2) * weights
    return error.sum(1) / (t.square().sum(2) * weights).sum(1).clamp(min=1e-30)
