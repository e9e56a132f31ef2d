"""End-to-end distillation: scales and gains (and, if asked, roundings) of the whole rounded model at once.

The loss is the divergence of its next-token distribution from the full-precision model's on calibration text, whose
final hidden states the walk has at hand. It sees what no block-wise step can: how errors of different blocks add up.
EfficientQAT trains the scales end to end on the labels; the divergence as the loss is ours (and of distillation at large).
Shapes: B windows, L tokens, T = B*L, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sordino.contract import FinishContext, Move
from sordino.recipe import PositiveInt, Rate
from sordino.repair.descent import descend, shuffled
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
    ) -> None:
        self.epochs, self.batch, self.weights, self.scales, self.gains = epochs, batch, weights, scales, gains

    @property
    def bytes_per_weight(self) -> int:
        """Values, codes, values on the graph and their gradient; latent weights with gradient and two moments."""
        return 7 + 16 * (self.weights > 0)

    def finish(self, ctx: FinishContext) -> None:
        """Train, commit, compare."""
        before = held_out(ctx)
        spaces: list[Any] = []
        norms = [ctx.norm]
        plain = list(ctx.solved)
        for block, solved in zip(ctx.blocks, plain, strict=True):
            spaces.append(WeightSpace(block, solved, self.weights, self.scales))
            norms += [block.get_submodule(n) for n in ctx.anatomy.norms.values()]
        gains = GainSpace(norms, self.gains)
        kept_gains = [w.detach().clone() for w in gains.weights]

        def backward(windows: Tensor) -> float:
            hidden = ctx.hidden(windows)
            exact = ctx.targets[windows]
            student, teacher = ctx.heads()
            with torch.no_grad():
                target = frozen_norm(exact)
            loss: Tensor = HeadDivergence.apply(ctx.norm(hidden).flatten(0, 1), student, target.flatten(0, 1), teacher)  # type: ignore[no-untyped-call]
            loss.backward()
            return loss.item()

        frozen_norm = _copy(ctx.norm)
        steps = self.epochs * -(-ctx.calib // self.batch)
        everything = [*spaces, *([gains] if self.gains > 0 else [])]
        losses = descend(everything, shuffled(ctx.calib, self.batch, ctx.rng(self.name)), steps, backward)
        self._fold(ctx, spaces)
        gains.fold()
        after = held_out(ctx, frozen_norm)
        kept = after < before
        if not kept:
            for i, solved in enumerate(plain):
                for linear, rounded in solved.items():
                    ctx.commit(i, linear, rounded)
            for w, old in zip(gains.weights, kept_gains, strict=True):
                w.copy_(old)
        tail = max(1, steps // 10)
        trained = [sum(part) / len(part) for part in (losses[:tail], losses[-tail:])]
        ctx.notes[self.name] = {"kl_before": before, "kl_after": after, "kept": kept, "loss": [round(v, 6) for v in trained]}

    def _fold(self, ctx: FinishContext, spaces: list[Any]) -> None:
        for i, space in enumerate(spaces):
            ctx.solved[i] = dict(ctx.solved[i])  # the old ones stay at hand
            for linear, rounded in space.fold().items():
                ctx.commit(i, linear, rounded)


def _copy(norm: Any) -> Any:
    import copy

    return copy.deepcopy(norm).requires_grad_(False)


@torch.no_grad()
def held_out(ctx: FinishContext, exact_norm: Any = None) -> float:
    """Mean divergence from full precision on the held-out windows, in nats per token."""
    student, teacher = ctx.heads()
    total = count = 0.0
    for i in range(ctx.calib, ctx.windows.shape[0]):
        window = torch.tensor([i])
        target = (exact_norm or ctx.norm)(ctx.targets[window]).flatten(0, 1)
        mine = ctx.norm(ctx.hidden(window)).flatten(0, 1)
        total += float(HeadDivergence.apply(mine, student, target, teacher))  # type: ignore[no-untyped-call]
        count += 1
    return total / count


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
