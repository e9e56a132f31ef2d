"""End-to-end distillation: scales and gains (and, if asked, roundings) of the whole rounded model at once.

The loss is the divergence of its next-token distribution from the full-precision model's on calibration text, whose
final hidden states the walk has at hand. It sees what no block-wise step can: how errors of different blocks add up.
EfficientQAT trains the scales end to end on the labels; the divergence as the loss is ours (and of distillation at large).
Shapes: B windows, L tokens, T = B*L, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from sordino.contract import FinishContext, Move
from sordino.recipe import Natural, PositiveInt, Rate
from sordino.repair.descent import descend, first_and_last, shuffled
from sordino.repair.input_spaces import InputSpace
from sordino.repair.spaces import GainSpace, WeightSpace

_ROWS = 64  # tokens whose logits exist at once


class Distill(Move):
    """Train the whole rounded model; kept only if the held-out divergence falls.

    Args:
        epochs: passes over the calibration windows.
        batch: windows of a step.
        weights: learning rate of latent weights in steps of the grid; 0 leaves the codes.
        scales: learning rate of the scales' logarithms.
        gains: learning rate of norm gains, as a share of their size.
        inputs: learning rate of the logarithms of the scales (or clips) of rounded inputs, keys and values.
        windows: calibration windows to train on, as many as the text has; 0 takes those of the walk, ``times`` over. The
            walk's sums need few, but scales trained end to end fit themselves to a small text.
        times: see there.
    """

    name = "distill"
    needs_fp_stream = True

    def __init__(
        self,
        epochs: PositiveInt = 2,
        batch: PositiveInt = 2,
        weights: Rate = 0.0,
        scales: Rate = 0.002,
        gains: Rate = 0.002,
        inputs: Rate = 0.002,
        windows: Natural = 0,
        times: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0,
    ) -> None:
        self.epochs, self.batch, self.weights, self.scales, self.gains = epochs, batch, weights, scales, gains
        self.inputs = inputs
        self.needs_latent = weights > 0
        self.windows, self.times = windows, times

    def finish_windows(self, calib: int) -> int:
        """As its options say."""
        return self.windows or round(self.times * calib)

    def bytes_per_weight(self, lean: bool) -> int:
        """Codes; values, those on the graph and some gradients; latent weights with gradient and two moments."""
        return (1 if lean else 6) + 16 * (self.weights > 0)

    def finish(self, ctx: FinishContext) -> None:
        """Train, compare, commit."""
        solved = [dict(own) for own in ctx.solved]
        inputs = [InputSpace(b, ctx.anatomy, self.inputs) for b in ctx.blocks]
        spaces = [WeightSpace(b, own, self.weights, self.scales) for b, own in zip(ctx.blocks, solved, strict=True)]
        trained = [b for b, own in zip(ctx.blocks, solved, strict=True) if own]
        norms = [b.get_submodule(n) for b in trained for n in ctx.anatomy.norms.values()]
        gains = GainSpace([ctx.norm, *norms], self.gains, ctx.stored)
        first_gains = [w.detach().clone() for w in gains.weights]
        before = held_out(ctx)  # of the spaces: they begin with what is stored, and the blocks may have nothing else

        def backward(windows: Tensor) -> float:
            loss = divergence(ctx, windows)
            loss.backward()
            return loss.item()

        train = ctx.train[: self.finish_windows(ctx.calib)]
        steps = self.epochs * -(-len(train) // self.batch)
        order = (train[i] for i in shuffled(len(train), self.batch, ctx.rng(self.name)))
        losses = descend([*inputs, *spaces, gains], order, steps, backward, lambda i, n: ctx.progress(self.name, i, n))
        after = held_out(ctx)
        unguarded = math.isnan(before)
        kept = unguarded or after < before
        for i, (space, own) in enumerate(zip(spaces, solved, strict=True)):
            for linear, rounded in space.fold().items():
                ctx.commit(i, linear, rounded if kept else own[linear])
        gains.fold()
        for scales in inputs:
            scales.fold()
        if not kept:
            for scales in inputs:
                scales.undo()
            for w, old in zip(gains.weights, first_gains, strict=True):
                w.copy_(old)
        divergences = {} if unguarded else {"kl_before": before, "kl_after": after}
        ctx.notes[self.title] = {**divergences, "kept": kept, "windows": len(train), "loss": first_and_last(losses)}


def divergence(ctx: FinishContext, windows: Tensor) -> Tensor:
    """Mean divergence from full precision on some windows [B], in nats per token, with gradients where they are on."""
    student, teacher = ctx.heads()
    with torch.no_grad():
        target = ctx.exact_norm(ctx.targets[windows]).flatten(0, 1)
    hidden = ctx.norm(ctx.hidden(windows)).flatten(0, 1)
    loss: Tensor = HeadDivergence.apply(hidden, student, target, teacher)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def held_out(ctx: FinishContext) -> float:
    """Mean divergence from full precision on the held-out windows, in nats per token; NaN if there are none."""
    if not len(ctx.heldout):
        return math.nan
    return sum(float(divergence(ctx, w)) for w in ctx.heldout.split(1)) / len(ctx.heldout)


class HeadDivergence(torch.autograd.Function):
    """Mean KL(teacher || student) of the next-token distributions, a few rows of logits at a time.

    Gradients are taken on the way, so that the [T, V] logits never exist whole. Arguments: student's normed hidden states
    [T, D] and table [V, D], teacher's likewise; only the first gets a gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, target: Tensor, exact: Tensor) -> Tensor:
        """The mean divergence, a scalar."""
        total = torch.zeros((), dtype=torch.float64)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for i in range(0, hidden.shape[0], _ROWS):
            rows = slice(i, i + _ROWS)
            q = torch.log_softmax(F.linear(hidden[rows], table).float(), -1)
            log_p = torch.log_softmax(F.linear(target[rows], exact).float(), -1)
            p = log_p.exp()
            total += torch.linalg.vecdot(p, log_p.sub_(q)).sum()
            if grad is not None:
                grad[rows] = q.exp_().sub_(p).to(hidden.dtype) @ table
        if grad is not None:
            ctx.save_for_backward(grad)
            ctx.count = hidden.shape[0]
        return (total / hidden.shape[0]).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient of the hidden states, found on the way forward."""
        (grad,) = ctx.saved_tensors
        return grad * (grads[0] / ctx.count), None, None, None
