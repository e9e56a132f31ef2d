"""Mean shift in the post-attention norm: D²Quant's deviation-aware correction (spec section 2).

Rounding q, k, v and o moves the mean of what the norm before the MLP puts out. The difference of the two means over the
calibration tokens, full-precision block against rounded block *on the same quantized stream*, is added to the norm as a
bias; everything after sees the corrected norm. It is the constant that minimizes the squared deviation there.
As the released code does, differences are limited to ±10; unlike it, two running means are kept instead of all
activations, and the effect is measured on held-out windows, where a constant that only fits the calibration text shows.
The released code does the same once more at the final norm: what it puts out behind the last block with rounded attention
and a plain MLP, against the last block all rounded. Shapes: B windows, L tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sordino.anatomy import Anatomy, Site
from sordino.contract import BlockContext, Move, StreamName
from sordino.errors import InputError
from sordino.recipe import Format


class MeanShift(Move):
    """Correct the mean of the post-attention norm's output.

    Args:
        form: ``norm`` stores a bias of the norm; ``linear`` stores what it becomes in gate and up, for engines whose
            norms have no bias (the rounded weights times the shift).
        always: keep the shift even where it does not help on held-out windows, as the paper does.
        final: shift the final norm as well, as the released code does; by the last block as the moves before this one
            have closed it. In the form ``norm`` only: heads have no bias.
    """

    name = "mean-shift"

    def __init__(self, form: Literal["norm", "linear"] = "norm", always: bool = False, final: bool = False) -> None:
        self.form, self.always, self.final_bias = form, always, final
        self._pending: Tensor | None = None
        self._semi: Tensor | None = None

    def check(self, fmt: Format, anatomy: Anatomy, target: str | None) -> None:
        """Needs a norm between attention and MLP."""
        if "gate_up" not in anatomy.norms:
            raise InputError(f"move 'mean-shift': {anatomy.model_type} has no norm in front of its MLP")
        if self.final_bias and self.form == "linear":
            raise InputError(
                "move 'mean-shift': the final norm's shift has no linear form; set final = false or form = \"norm\""
            )

    def biases(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Where it is stored."""
        linears = tuple(x.name for x in anatomy.at("gate_up") if not x.bias)
        return (anatomy.norms["gate_up"],) if self.form == "norm" else linears

    def after(self, ctx: BlockContext, site: Site) -> None:
        """Measure and add the shift after o_proj; in linear form, hand it on once gate and up are rounded."""
        norm = ctx.anatomy.norms["gate_up"]
        if site == "o":
            shift = (mean_input(ctx, "fp") - mean_input(ctx, "q")).clamp_(-10.0, 10.0)
            before = deviation(ctx)
            ctx.shift(norm, shift)
            after = deviation(ctx)
            kept = self.always or after < before or not ctx.stream("q", "heldout").shape[0]
            if not kept:
                ctx.shift(norm, -shift)
            self._pending = shift if kept else torch.zeros_like(shift)
            ctx.notes[self.title] = {"mse_before": before, "mse_after": after, "kept": kept}
            if ctx.norm is not None:
                self._semi = mean_final(ctx, ctx.norm)
        elif site == "gate_up" and self.form == "linear" and self._pending is not None:
            for linear in ctx.anatomy.at("gate_up"):
                weight: Any = ctx.q.get_submodule(linear.name).weight
                ctx.shift(linear.name, weight.float() @ self._pending)
            ctx.unshift(norm)

    def close(self, ctx: BlockContext) -> None:
        """Behind the last block, measure and add the shift of the final norm."""
        if ctx.norm is None or self._semi is None:
            return
        shift = (self._semi - mean_final(ctx, ctx.norm)).clamp_(-10.0, 10.0)
        before, after = final_deviation(ctx, ctx.norm, shift)
        kept = self.always or not after >= before
        ctx.shift_final(shift if kept else torch.zeros_like(shift))
        errors = {} if math.isnan(before) else {"final_mse_before": before, "final_mse_after": after}
        ctx.notes[self.title] |= {**errors, "final_kept": kept}


def mean_input(ctx: BlockContext, which: StreamName) -> Tensor:
    """Mean over tokens of what gate and up see, [D]; both blocks run on the quantized stream."""
    return _mean(x for _, x in ctx.inputs(which, "gate_up", stream="q"))


def deviation(ctx: BlockContext) -> float:
    """Mean squared deviation of the rounded block's input of gate and up from the full-precision block's, held out."""
    total, count = 0.0, 0
    pairs = zip(ctx.inputs("q", "gate_up", "heldout"), ctx.inputs("fp", "gate_up", "heldout", stream="q"), strict=True)
    for (_, mine), (_, exact) in pairs:
        total += float((mine.float() - exact.float()).square().mean(-1).sum())
        count += mine.shape[0] * mine.shape[1]
    return total / max(count, 1)


def mean_final(ctx: BlockContext, norm: nn.Module) -> Tensor:
    """Mean over tokens of what the final norm makes of the rounded block's output, [D]."""
    return _mean(norm(y) for _, y in ctx.run("q", "q"))


def _mean(batches: Iterable[Tensor]) -> Tensor:
    """Mean over windows and tokens of [B, L, D], summed in fp64."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        total, count = total + batch.sum((0, 1), dtype=torch.float64), count + batch.shape[0] * batch.shape[1]
    return (total / max(count, 1)).float()


def final_deviation(ctx: BlockContext, norm: nn.Module, shift: Tensor) -> tuple[float, float]:
    """Mean squared deviation of the final norm's output from the full-precision model's, without and with a shift [D].

    On held-out windows; NaN if there are none.
    """
    exact = ctx.target("heldout") if len(ctx.stream("q", "heldout")) else None
    if exact is None:
        return math.nan, math.nan
    totals, done = [0.0, 0.0], 0
    for _, y in ctx.run("q", "q", "heldout"):
        off = norm(y).float() - norm(exact[done : done + len(y)]).float()
        done += len(y)
        for i, deviation in enumerate((off, off + shift)):
            totals[i] += float(deviation.square().mean((1, 2)).sum())
    return totals[0] / done, totals[1] / done
