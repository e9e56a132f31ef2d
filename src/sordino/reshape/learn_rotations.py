"""Rotations learned on the network's own loss (SpinQuant, arXiv 2405.16406, section 3.2): R1 and R2.

Rotations of the residual stream (R1) and of each block's values (R2) do not change the function, but some leave less to be lost
when inputs, keys and values are rounded. Both start from what the moves before this one have made (random Hadamard matrices,
as in the paper) and take Cayley steps down the cross-entropy of a few calibration windows, with inputs, keys and values
rounded (straight through) and the weights in full precision; rounding those is left to the solver, as in the paper.

The weights are not turned at every step. A norm's output y is replaced by ``y + (round(yR) - yR) R^T``: the model as it is,
with the error that rounding in the turned basis makes. Only R gets gradients; they cost two products with R a site.
Unlike the paper's code, a token's scale passes gradients on to its largest entry: rounding errors alone hardly say where less
of them is, and on stories260k the paper's rate then ends above the loss it began with.
Inputs are rounded by token while learning, whatever the format says: static scales are found later, for what was learned.
Kept only if the loss on held-out windows fell. Shapes: B windows, L tokens, D hidden size, d head size.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from sordino.anatomy import Anatomy, Site
from sordino.contract import LearnContext, Move
from sordino.errors import InputError, SordinoError
from sordino.numerics.cayley import cayley_step
from sordino.numerics.inputs import InputGrid
from sordino.numerics.kv import KvGrid
from sordino.recipe import Format, PositiveInt
from sordino.reshape.turning import turn_stream, turn_values
from sordino.runtime.attention import round_kv
from sordino.runtime.inner import ATTENTION, DOWN
from sordino.runtime.inputs import round_inputs

Length = Annotated[int, Field(gt=1, strict=True)]
StepSize = Annotated[float, Field(gt=0)]
_CLIP, _KV_CLIP = 0.9, 0.95  # shares of the extremes that codes reach where the format has them searched


class LearnRotations(Move):
    """Learn R1 and R2; after `rotate` and `rotate-inner`.

    Args:
        steps: of descent.
        windows: calibration windows to learn on, as many as there are.
        length: tokens of each, from its beginning; as many as it has.
        batch: windows of a step.
        rate: of the first step; it falls in a straight line to 0.
    """

    name = "learn-rotations"

    def __init__(
        self,
        steps: PositiveInt = 100,
        windows: PositiveInt = 8,
        length: Length = 256,
        batch: PositiveInt = 1,
        rate: StepSize = 1.5,
    ) -> None:
        self.steps, self.windows, self.length, self.batch, self.rate = steps, windows, length, batch, rate

    @property
    def learn_tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length

    def check(self, fmt: Format, anatomy: Anatomy, target: str | None) -> None:
        """Without rounded inputs, keys or values no rotation is better than another."""
        if not (fmt.activations.rounded or fmt.kv.rounded):
            raise InputError("move 'learn-rotations' learns from rounded inputs, keys and values, and the format has none")

    def learn(self, ctx: LearnContext) -> dict[str, Tensor]:
        """The matrices: "basis" float64 [D, D] and "values" float64 [blocks, d, d], on top of what moves before have turned.

        Nothing where they did not help.
        """
        first: Any = ctx.blocks[0].get_submodule(ATTENTION)
        basis = torch.eye(ctx.anatomy.hidden, dtype=torch.float64).requires_grad_()
        values = torch.eye(first.head_dim, dtype=torch.float64).repeat(len(ctx.blocks), 1, 1).requires_grad_()
        state = {"basis": basis, "values": values}
        hooks = [h for i in ctx.rounded for h in simulate(ctx, i, basis, values)]
        train = ctx.train[: self.windows, : self.length]
        heldout = ctx.heldout[:, : self.length]
        before = _mean_loss(ctx, heldout)
        losses = self._descend(ctx, train, [q for q in state.values() if _matters(q, ctx.format)])
        after = _mean_loss(ctx, heldout)
        for hook in hooks:
            hook.remove()
        kept = math.isnan(before) or after < before
        tail = max(1, min(len(losses) // 2, -(-len(train) // self.batch)))  # about one look at every window
        ctx.notes |= {
            "kept": kept, "windows": len(train), "tokens": train.shape[1], "steps": self.steps,
            "loss": [round(sum(part) / len(part), 4) for part in (losses[:tail], losses[-tail:])],
        } | ({} if math.isnan(before) else {"heldout_loss": [round(before, 4), round(after, 4)]})  # fmt: skip
        return {n: q.detach() for n, q in state.items()} if kept else {}

    def _descend(self, ctx: LearnContext, train: Tensor, matrices: list[Tensor]) -> list[float]:
        """Take the steps; returns every step's loss."""
        losses: list[float] = []
        order: list[Tensor] = []
        rng = ctx.rng(self.name)
        for i in range(self.steps):
            ctx.progress(self.name, i, self.steps)
            order = order or list(torch.randperm(len(train), generator=rng).split(self.batch))
            with torch.enable_grad():
                loss = ctx.loss(train[order.pop(0)])
                grads = torch.autograd.grad(loss, matrices)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise SordinoError(f"move 'learn-rotations': the loss is not finite at step {i}; lower its rate")
            with torch.no_grad():
                for q, grad in zip(matrices, grads, strict=True):
                    q.copy_(cayley_step(q, grad, self.rate * (1 - i / self.steps)))
        return losses

    @torch.no_grad()
    def reshape(self, block: nn.Module, index: int, anatomy: Anatomy, artifacts: dict[str, Any]) -> None:
        """Turn the weights by what was learned."""
        found: dict[str, Tensor] = artifacts[self.name]
        if not found:
            return
        turn_stream(block, anatomy, lambda x: x @ found["basis"])
        turn_values(block, lambda x: x @ found["values"][index])


def _matters(matrices: Tensor, fmt: Format) -> bool:
    """Whether a rotation meets any rounding: of the stream where inputs are rounded, of the values either way."""
    return fmt.activations.rounded or matrices.ndim == 3


@torch.no_grad()
def _mean_loss(ctx: LearnContext, windows: Tensor) -> float:
    return sum(float(ctx.loss(w[None])) for w in windows) / len(windows) if len(windows) else math.nan


def simulate(ctx: LearnContext, index: int, basis: Tensor, values: Tensor) -> list[torch.utils.hooks.RemovableHandle]:
    """Let a full-precision block round its inputs, keys and values in turned bases.

    Args:
        ctx: its block has gains of one (after `rotate`).
        index: the block's.
        basis: of the stream, float64 [D, D].
        values: of the values, float64 [blocks, d, d].

    Returns:
        The hooks, to take them off again (rounding of down_proj's input, keys and values stays on).
    """
    block, anatomy = ctx.blocks[index], ctx.anatomy
    attention: Any = block.get_submodule(ATTENTION)
    inputs, kv, hooks = ctx.format.activations, ctx.format.kv, []
    clip = _CLIP if inputs.static or inputs.clip == "search" else float(inputs.clip)

    def grid(site: Site) -> InputGrid:
        return InputGrid(inputs.bits, group=ctx.groups[site], symmetric=inputs.symmetric)

    def fake(x: Tensor, site: Site) -> Tensor:
        return grid(site).fake(x, clip, moving=True) if inputs.rounded else x

    def around(site: Site, y: Tensor) -> Tensor:
        turn = basis.to(y.dtype)
        turned = y @ turn
        return y + (fake(turned, site) - turned) @ turn.T

    def heads(x: Tensor, turn: Tensor) -> Tensor:
        split: Tensor = x.unflatten(-1, (-1, attention.head_dim)) @ turn.to(x.dtype)
        return split.flatten(-2)

    if inputs.rounded:
        for site, norm in anatomy.norms.items():
            hooks.append(block.get_submodule(norm).register_forward_hook(lambda _, __, y, site=site: around(site, y)))
        round_inputs(block.get_submodule(DOWN), grid("down"), clip)
    # Values stay turned, so that the cache's own rounding sees them so, until o_proj's input is rounded.
    hooks.append(attention.v_proj.register_forward_hook(lambda _, __, v: heads(v, values[index])))
    hooks.append(
        attention.o_proj.register_forward_pre_hook(lambda _, args: (heads(fake(args[0], "o"), values[index].T), *args[1:]))
    )
    if kv.rounded:
        share = _KV_CLIP if kv.static or kv.clip == "search" else float(kv.clip)
        shares = torch.full((anatomy.key_heads,), share)
        round_kv(attention, KvGrid(kv.bits, kv.symmetric, False), shares, shares.clone())
    return hooks
