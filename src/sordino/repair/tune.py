"""Block-wise tuning: roundings, scales and gains of one block, against the full-precision stream.

After a block is rounded, its latent weights (straight through the rounding), scales (of weights, rounded inputs, keys and
values) and norm gains are trained so that
its output on the quantized stream comes near to what the full-precision model has there. The idea is common to AdaRound,
BRECQ, AutoRound, EfficientQAT and PrefixQuant (spec section on block-wise fine-tuning); what is ours: latent weights
start where GPTQ's error compensation left them, so that step 0 equals the solved block, and tokens are weighted such
that a massive one counts for no more than a median one.

Instead of roundings and scales, the parameter-efficient spaces of the BiSup-style reconstruction can be trained: clips
(repair/clip.py), smoothing (repair/smoothing.py) and a low-rank update (repair/low_rank.py).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from sordino.anatomy import SITES, Anatomy, Site, hidden_states
from sordino.contract import BlockContext, Move, ParameterSpace, StreamName
from sordino.errors import InputError
from sordino.numerics.divergence import token_weights
from sordino.numerics.side import best_pair
from sordino.recipe import Format, Natural, PositiveInt, Rate
from sordino.repair.clip import ClipSpace, rounded_from
from sordino.repair.descent import descend, first_and_last, shuffled
from sordino.repair.input_spaces import InputSpace
from sordino.repair.low_rank import LowRank, SideBranch, error_directions, random_directions
from sordino.repair.smoothing import Mode, SmoothSpace
from sordino.repair.spaces import GainSpace, WeightSpace
from sordino.runtime.modules import ORDER

_FIRST = 4  # windows by which first values are chosen
_LIMIT = 0.3  # of the gradients' norm, for the parameter-efficient spaces: IntactKV's and PrefixQuant's value


class Tune(Move):
    """Train a rounded block; kept only if the held-out error falls.

    Args:
        epochs: passes over the calibration windows.
        batch: windows of a step.
        weights: learning rate of latent weights in steps of the grid; 0 leaves the codes.
        scales: learning rate of the scales' logarithms.
        gains: learning rate of norm gains (and norm biases, where there are some), as a share of the gains' size.
        inputs: learning rate of the logarithms of the scales (or clips) of rounded inputs, keys and values.
        biases: give every norm a bias to train.
        clips: learning rate of the clips of weight groups, input groups, keys and values; takes the place of weights, scales
            and inputs, which must be 0.
        rank: of the update that is merged into every linear, likewise; 0 for none.
        side: put the update beside the rounded weight instead: it costs bits, and starts where it takes most off the error.
        start: directions that the merged update begins with: where the rounding error weighs most ("error"), or "random" ones.
        updates: learning rate of that update, in steps of the grid; of one at the side, in shares of its size.
        smooth: learning rate of factors by which inputs are divided and the weights that read them multiplied, likewise; gains
            must be 0. 0 for none.
        smooth_start: what factors begin with: 1 ("one": step 0 is the host), or ("search") what has the lowest loss on the
            first windows, site by site, of 1, Outlier Suppression+'s and SmoothQuant's.
        smooth_mode: whether the two may drift apart, "soft": at a price, "hard": not, "free": at none.
        target: the full-precision block's output on the full-precision stream, or ("quantized") on the quantized one, which
            leaves the error of earlier blocks alone.
    """

    name = "tune"
    needs_fp_stream = True
    needs_latent = True

    def __init__(
        self,
        epochs: PositiveInt = 2,
        batch: PositiveInt = 4,
        weights: Rate = 0.01,
        scales: Rate = 0.003,
        gains: Rate = 0.003,
        inputs: Rate = 0.003,
        biases: bool = False,
        clips: Rate = 0.0,
        rank: Natural = 0,
        side: bool = False,
        start: Literal["error", "random"] = "error",
        updates: Rate = 0.01,
        smooth: Rate = 0.0,
        smooth_mode: Mode = "soft",
        smooth_start: Literal["one", "search"] = "one",
        target: Literal["full", "quantized"] = "full",
    ) -> None:
        self.epochs, self.batch, self.rates = epochs, batch, (weights, scales)
        self.gains, self.inputs, self.with_biases = gains, inputs, biases
        self.clips, self.rank, self.start, self.updates, self.target = clips, rank, start, updates, target
        self.smooth, self.smooth_mode, self.smooth_start = smooth, smooth_mode, smooth_start
        self.wants_side, self.side, self.smooths = side, rank if side else 0, smooth > 0

    @property
    def efficient(self) -> bool:
        """Whether the parameter-efficient spaces are trained instead of roundings and scales."""
        return self.clips > 0 or self.rank > 0 or self.smooth > 0

    def check(self, fmt: Format, anatomy: Anatomy, target: str | None) -> None:
        """Clips and updates decide the codes that weights and scales would train."""
        if self.efficient and any(self.rates):
            raise InputError("move 'tune': clips, rank, smooth replace weights and scales; set weights=0 and scales=0")
        if self.wants_side and not self.rank:
            raise InputError("move 'tune': side says where the low-rank update goes; set its rank")
        if self.smooth > 0 and self.gains > 0:
            raise InputError("move 'tune': smooth works through the norms' gains; set gains=0")
        if self.clips > 0 and self.inputs > 0:
            raise InputError("move 'tune': clips takes the place of inputs; set inputs=0")
        if self.with_biases and not anatomy.norms:
            raise InputError(f"move 'tune': {anatomy.model_type} has no norms in front of its linears to give biases to")

    def biases(self, anatomy: Anatomy) -> tuple[str, ...]:
        """The norms of a block, if they get one."""
        return tuple(anatomy.norms.values()) if self.with_biases else ()

    def close(self, ctx: BlockContext) -> None:
        """Train, commit, compare."""
        if not ctx.solved:
            return
        for norm in self.biases(ctx.anatomy):
            ctx.shift(norm, torch.zeros(()))
        exact: StreamName = "fp" if self.target == "full" else "q"
        before, state = ctx.error(exact=exact), ctx.snapshot()
        x, target = ctx.stream("q"), self._target(ctx)
        loudest = _loudest(ctx) if self.smooth > 0 and self.smooth_start == "search" else None
        spaces = self._spaces(ctx)
        priced = [space for space in spaces if isinstance(space, SmoothSpace)]
        start: list[float] = []

        def loss_of(windows: Tensor) -> Tensor:
            t = target[windows].float()
            weight = token_weights(t)
            y = hidden_states(ctx.q(x[windows], **ctx.call)).float()
            return ((y - t).square().sum(-1) * weight).sum() / (t.square().sum(-1) * weight).sum()

        if loudest is not None:
            for smoothed in priced:
                smoothed.begin(loudest, lambda: float(loss_of(torch.arange(min(_FIRST, len(x))))))

        def backward(windows: Tensor) -> float:
            loss = loss_of(windows)
            start.append(loss.item())
            # Relative to the first one, so that the bound on the gradients means the same in every block.
            (loss / max(start[0], 1e-12) + sum(s.penalty() for s in priced) if self.efficient else loss).backward()
            return start[-1]

        limit = _LIMIT if self.efficient else None
        steps = self.epochs * -(-x.shape[0] // self.batch)
        losses = descend(spaces, shuffled(x.shape[0], self.batch, ctx.rng(self.name)), steps, backward, limit=limit)
        for space in spaces:
            for linear, rounded in space.fold().items():
                ctx.commit(linear, rounded)
        ctx.touch("qkv")
        after = ctx.error(exact=exact)
        kept = better(before, after)
        if not kept:
            ctx.restore(state)
        errors = {} if math.isnan(before) else {"before": before, "after": after}
        ctx.notes[self.title] = {**errors, "kept": kept, "loss": first_and_last(losses)}

    def _target(self, ctx: BlockContext) -> Tensor:
        """What the block should put out, [N, L, D]."""
        if self.target == "full":
            return ctx.target()
        return torch.cat([y for _, y in ctx.run("fp", "q")])

    def _spaces(self, ctx: BlockContext) -> list[ParameterSpace]:
        """What is trained."""
        norms = [ctx.q.get_submodule(n) for n in ctx.anatomy.norms.values()]
        updates = self._updates(ctx)  # before any stand-in is there
        # Inputs first: a stand-in takes over the hooks of its linear.
        inputs = InputSpace(ctx.q, ctx.anatomy, self.clips or self.inputs, clips=self.clips > 0)
        gains = GainSpace(norms, self.gains, ctx.stored)
        if not self.efficient:
            return [inputs, WeightSpace(ctx.q, ctx.solved, *self.rates), gains]
        clips = ClipSpace(ctx.q, ctx.solved, self.clips, updates, self.updates)
        if self.smooth == 0:
            return [inputs, clips, gains]
        smooth = SmoothSpace(ctx.q, ctx.anatomy, clips.trained, self.smooth, self.smooth_mode, ctx.stored)
        return [inputs, clips, smooth]

    def _updates(self, ctx: BlockContext) -> dict[str, LowRank | SideBranch]:
        """Each linear's update, at its start."""
        found: dict[str, LowRank | SideBranch] = {}
        rng = ctx.rng(f"{self.name} start")
        for site in SITES if self.rank else ():
            stats = ctx.stats(site, frozenset({"H"}))
            for linear in ctx.anatomy.at(site):
                rounded = ctx.solved.get(linear.name)
                if rounded is not None and rounded.grid == "affine":
                    if self.side:
                        error = _exact(ctx, site, linear.name) - replace(rounded, side=None).values()
                        found[linear.name] = SideBranch(*best_pair(error, stats.h, self.rank))
                        continue
                    # The update is in the codes' own units, in front of a column scale.
                    column = rounded.column
                    h = stats.h if column is None else stats.h * torch.outer(column, column).to(stats.h.dtype)
                    if self.start == "random":
                        directions = random_directions(h, stats.tokens, self.rank, rng)
                    else:
                        error = rounded_from(rounded) - rounded.grid_values()
                        directions = error_directions(error, h, stats.tokens, self.rank)
                    found[linear.name] = LowRank(directions, len(rounded.codes))
        return found


def better(before: float, after: float) -> bool:
    """Whether a block keeps its training, by its held-out errors; without any (guards off) it does."""
    return math.isnan(before) or after < before


def _loudest(ctx: BlockContext) -> dict[Site, Tensor]:
    """Largest magnitude of every channel of the inputs of a site, in the order of the weights' columns, fp32 [C]."""
    found: dict[Site, Tensor] = {}
    for site in SITES:
        for _, batch in ctx.inputs("q", site):
            own = batch.abs().amax((0, 1)).float()
            found[site] = torch.maximum(found.get(site, own), own)
    return found


def _exact(ctx: BlockContext, site: Site, linear: str) -> Tensor:
    """A linear's full-precision weight, fp32 [R, C], for the inputs of the q block, whose norm may have been trained."""
    module: Any = ctx.fp.get_submodule(linear)
    weight: Tensor = module.weight.float()
    if site not in ctx.anatomy.norms:
        return weight
    norms: list[Any] = [block.get_submodule(ctx.anatomy.norms[site]) for block in (ctx.fp, ctx.q)]
    before, now = (norm.weight.float() for norm in norms)
    ratio = torch.where(now == 0, 1.0, before / now)
    order = module._buffers.get(ORDER)
    return weight * (ratio if order is None else ratio[order.long()])
