"""One pass of the full-precision model over the calibration windows, for moves that must know it before the walk.

It runs the model as it is stored, before any reshape. Shapes: N windows, L tokens, D hidden size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sordino.contract import Progress, having
from sordino.runtime.inner import ATTENTION
from sordino.walk.attention import watched
from sordino.walk.blocks import BlockFactory
from sordino.walk.ends import Ends
from sordino.walk.plan import Plan
from sordino.walk.prefix import first_token
from sordino.walk.runner import Runner
from sordino.walk.source import Source

_KEY_WINDOWS = 16  # whose keys are looked at; a mean needs no more


def survey(
    source: Source,
    plan: Plan,
    factory: BlockFactory,
    ends: Ends,
    windows: Tensor,
    calls: list[dict[str, Any]],
    artifacts: dict[str, Any],
    progress: Progress,
) -> tuple[int, ...]:
    """Let the moves see every block.

    Args:
        source: the full-precision model.
        plan: of the run.
        factory: makes its blocks.
        ends: has its embeddings.
        windows: token ids of the calibration windows, int64 [N, L].
        calls: keyword arguments of each block.
        artifacts: where the moves leave what they find.
        progress: told (what, done, total).

    Returns:
        The tokens that moves want before every text.
    """
    curious = having(plan.moves, "survey")
    wanted = [m.survey_windows or len(windows) for m in curious]
    windows = windows[: max(wanted, default=0)]
    artifacts["ids"] = windows
    if curious:
        x = torch.cat([ends.embed(w[None], exact=True, rotated=False) for w in windows])
        for index in range(plan.anatomy.n_blocks):
            progress("survey", index, plan.anatomy.n_blocks)
            runner = Runner(factory.load(index), x, calls[index], plan.anatomy, plan.batch, plan.budget)
            if any(m.survey_keys for m in curious):
                artifacts["keys"] = _key_means(runner)
            runner.hold("o")  # so that attention is not computed again, for what moves look at and for the outputs
            for move in curious:
                move.survey(index, runner.layer, partial(runner.inputs, start=0, stop=len(x)), artifacts)
            x = torch.cat([y for _, y in runner.outputs(0, len(x))])
            source.close()
    return tuple(t for m in plan.moves for t in m.prefix(artifacts, first_token(source.config)))


def _key_means(runner: Runner) -> Tensor:
    """Means of a block's keys behind the rotary embedding, fp64 [K, d]."""
    total, tokens = torch.zeros(()), 0
    with watched(runner.layer.get_submodule(ATTENTION)) as seen:
        for _ in runner.inputs("o", 0, min(_KEY_WINDOWS, len(runner.x))):
            while seen:
                key = seen.pop()[1]
                total, tokens = total + key.double().sum((0, 2)), tokens + key.shape[0] * key.shape[2]
    return total / max(tokens, 1)
