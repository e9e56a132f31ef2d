"""Block-wise tuning: roundings, scales and gains of one block, against the full-precision stream.

After a block is rounded, its latent weights (straight through the rounding), scales (of weights, rounded inputs, keys and
values) and norm gains are trained so that
its output on the quantized stream comes near to what the full-precision model has there. The idea is common to AdaRound,
BRECQ, AutoRound, EfficientQAT and PrefixQuant (spec section on block-wise fine-tuning); what is ours: latent weights
start where GPTQ's error compensation left them, so that step 0 equals the solved block, and tokens are weighted such
that a massive one counts for no more than a median one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sordino.anatomy import Anatomy, hidden_states
from sordino.contract import BlockContext, Move, ParameterSpace
from sordino.numerics.divergence import token_weights
from sordino.recipe import PositiveInt, Rate
from sordino.repair.descent import descend, first_and_last, shuffled
from sordino.repair.input_spaces import InputSpace
from sordino.repair.spaces import GainSpace, WeightSpace


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
    ) -> None:
        self.epochs, self.batch, self.rates = epochs, batch, (weights, scales)
        self.gains, self.inputs, self.with_biases = gains, inputs, biases

    def biases(self, anatomy: Anatomy) -> tuple[str, ...]:
        """The norms of a block, if they get one."""
        return tuple(anatomy.norms.values()) if self.with_biases else ()

    def close(self, ctx: BlockContext) -> None:
        """Train, commit, compare."""
        if not ctx.solved:
            return
        for norm in self.biases(ctx.anatomy):
            ctx.shift(norm, torch.zeros(()))
        before, state = ctx.error(), ctx.snapshot()
        x, target = ctx.stream("q"), ctx.target()
        norms = [ctx.q.get_submodule(n) for n in ctx.anatomy.norms.values()]
        spaces: list[ParameterSpace] = [
            InputSpace(ctx.q, ctx.anatomy, self.inputs),  # first: a stand-in takes over the hooks of its linear
            WeightSpace(ctx.q, ctx.solved, *self.rates),
            GainSpace(norms, self.gains, ctx.stored),
        ]

        def backward(windows: Tensor) -> float:
            t = target[windows].float()
            weight = token_weights(t)
            y = hidden_states(ctx.q(x[windows], **ctx.call)).float()
            loss: Tensor = ((y - t).square().sum(-1) * weight).sum() / (t.square().sum(-1) * weight).sum()
            loss.backward()
            return loss.item()

        steps = self.epochs * -(-x.shape[0] // self.batch)
        losses = descend(spaces, shuffled(x.shape[0], self.batch, ctx.rng(self.name)), steps, backward)
        for space in spaces:
            for linear, rounded in space.fold().items():
                ctx.commit(linear, rounded)
        ctx.touch("qkv")
        after = ctx.error()
        unguarded = math.isnan(before)
        kept = unguarded or after < before
        if not kept:
            ctx.restore(state)
        errors = {} if unguarded else {"before": before, "after": after}
        ctx.notes[self.name] = {**errors, "kept": kept, "loss": first_and_last(losses)}
