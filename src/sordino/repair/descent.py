"""The one tuner: AdamW with warm-up and cosine over any set of parameter spaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sordino.contract import ParameterSpace
from sordino.errors import InputError, SordinoError

_WARM = 0.05  # share of the steps in which the learning rates rise


def descend(
    spaces: Sequence[ParameterSpace],
    batches: Iterator[Tensor],
    steps: int,
    backward: Callable[[Tensor], float],
    tick: Callable[[int, int], None] = lambda done, total: None,
    limit: float | None = None,
) -> list[float]:
    """Train.

    Args:
        spaces: what is trained; attached already.
        batches: indices of the windows of each step.
        steps: how many steps; the cosine ends there.
        backward: computes the loss of some windows, its gradients, and returns its value.
        tick: told (steps done, steps) before each.
        limit: norm that the gradients of a step are cut to.

    Returns:
        Loss of every step.

    Raises:
        InputError: if there is nothing to train.
        SordinoError: if the loss stops being finite.
    """
    groups = [g for s in spaces for g in s.groups()]
    if not any(g["params"] for g in groups):
        raise InputError("nothing is left to train: every learning rate is 0, or the format has nothing of the kind")
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    warm = max(1, int(steps * _WARM))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, i - warm) / max(1, steps - warm)))
    )
    losses = []
    with torch.enable_grad():
        for i in range(steps):
            tick(i, steps)
            losses.append(backward(next(batches)))
            if not math.isfinite(losses[-1]):
                raise SordinoError(f"the training loss is not finite at step {len(losses)}; lower the learning rates")
            for s in spaces:
                s.collect()
            if limit is not None:
                torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], limit)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            for s in spaces:
                s.settle()
    tick(steps, steps)
    return losses


def first_and_last(losses: list[float]) -> list[float]:
    """Mean loss of the first and of the last tenth of the steps, for a report."""
    tail = max(1, len(losses) // 10)
    return [round(sum(part) / len(part), 6) for part in (losses[:tail], losses[-tail:])]


def shuffled(n: int, batch: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of window numbers: every window once an epoch, in a new order each time."""
    while True:
        yield from torch.randperm(n, generator=rng).split(batch)
