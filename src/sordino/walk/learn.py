"""The stage before the walk in which moves may train what they reshape by (contract.LearnContext).

It holds the whole model in full precision, reshaped by the moves that stand before; a prefix is not in front of it yet.
What moves find lies in the work folder, so that a resumed run goes on with the same numbers.
Shapes: N windows, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sordino.anatomy import Anatomy, Site, hidden_states
from sordino.contract import Progress, having
from sordino.numerics.basis import Dense
from sordino.recipe import Format
from sordino.walk.blocks import BlockFactory
from sordino.walk.ends import Ends
from sordino.walk.plan import Plan
from sordino.walk.seeds import seeded
from sordino.walk.source import Source
from sordino.walk.store import Work

_ROWS = 128  # tokens whose logits exist at once


@dataclass
class Learning:
    """See :class:`sordino.contract.LearnContext`."""

    anatomy: Anatomy
    format: Format
    blocks: list[nn.Module]
    rounded: range
    groups: dict[Site, int | None]
    factory: BlockFactory
    around: Ends
    norm: nn.Module
    train: Tensor
    heldout: Tensor
    seed: int
    tell: Progress
    notes: dict[str, Any] = field(default_factory=dict)
    _calls: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    def progress(self, what: str, done: int, total: int) -> None:
        """Pass it on."""
        self.tell(what, done, total)

    def rng(self, move: str) -> torch.Generator:
        """Generator seeded by (seed, move)."""
        return seeded(self.seed, "learn", move)

    def loss(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy of token ids [B, L], in nats a token, with gradients where they are on."""
        length = windows.shape[1]
        if length not in self._calls:
            self._calls[length] = self.factory.calls(length)
        x = self.around.embed(windows, exact=True)
        for block, call in zip(self.blocks, self._calls[length], strict=True):
            x = hidden_states(block(x, **call))
        hidden, labels = self.norm(x)[:, :-1].flatten(0, 1), windows[:, 1:].flatten()
        table = self.around.heads()[1]
        parts = [
            checkpoint(_negative_log, hidden[i : i + _ROWS], table, labels[i : i + _ROWS], use_reentrant=False)
            for i in range(0, len(labels), _ROWS)
        ]
        total: Tensor = torch.stack(parts).sum() / len(labels)
        return total


def learn(
    source: Source,
    plan: Plan,
    factory: BlockFactory,
    work: Work,
    windows: Tensor,
    artifacts: dict[str, Any],
    seed: int,
    progress: Progress,
) -> Plan:
    """Let moves learn, unless an interrupted run has them done.

    Args:
        source: the full-precision model.
        plan: of the run.
        factory: makes its blocks.
        work: where findings are kept.
        windows: token ids of the calibration windows, then the held-out ones, int64 [N, L].
        artifacts: of the surveys; gets every move's matrices by its name.
        seed: of the moves' random numbers.
        progress: told (what, done, total).

    Returns:
        The plan, in the basis that was learned.
    """
    for move in having(plan.moves, "learn"):
        if move.name not in work.state.get("learned", {}):
            n = plan.recipe.calibration.windows
            blocks = [factory.load(i) for i in range(plan.anatomy.n_blocks)]
            for i, block in enumerate(blocks):
                for earlier in plan.moves[: plan.moves.index(move)]:
                    earlier.reshape(block, i, plan.anatomy, artifacts)
            ctx = Learning(
                anatomy=plan.anatomy, format=plan.recipe.format, blocks=blocks, rounded=range(*plan.blocks),
                groups={p.linear.site: p.inputs for p in plan.linears[plan.blocks[0]]},
                factory=factory, around=Ends(source, plan), norm=factory.norm(plan.basis),
                train=windows[:n], heldout=windows[n : n + plan.heldout], seed=seed, tell=progress,
            )  # fmt: skip
            work.save_learned(move.name, move.learn(ctx))
            work.save(learned=work.state.get("learned", {}) | {move.name: ctx.notes})
            del ctx, blocks
            source.close()
        artifacts[move.name] = found = work.load_learned(move.name)
        if "basis" in found:
            assert plan.basis is not None  # the plan was checked
            before = plan.basis.apply(torch.eye(len(found["basis"]), dtype=torch.float64))
            plan = replace(plan, basis=Dense((before @ found["basis"]).float()))
    return plan


def _negative_log(hidden: Tensor, table: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, table).float(), labels, reduction="sum")
