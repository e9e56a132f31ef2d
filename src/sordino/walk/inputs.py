"""Scales of rounded inputs, one a site, by the error of the block's output (PrefixQuant, spec section 4.5).

Static: coarse, then fine shares of the largest entry that calibration saw; the share 1 is among them. Dynamic: the share of
each token's largest entry, where the recipe leaves it open. Compared is the block with and without rounding at this site,
everything before it rounded already. Shapes: B windows, L tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sordino.anatomy import Site
from sordino.numerics.affine import round_scale
from sordino.recipe import ActivationFormat
from sordino.runtime.inputs import round_inputs
from sordino.walk.context import Context
from sordino.walk.linears import input_grid

_COARSE = [0.25 + 0.1 * i for i in range(8)] + [1.0]
_FINE = [0.01 * i for i in range(-5, 6)]
_CLIPS = [0.6 + 0.05 * i for i in range(9)]
_TOKENS = 1024  # on which the candidates are compared; more would cost more than the rest of the walk


def round_site(
    ctx: Context, site: Site, names: list[str], fmt: ActivationFormat, group: int | None, kept: int = 0
) -> dict[str, float]:
    """Let the linears of a site round their common input, by groups of channels or None; returns what is worth reporting.

    Its last ``kept`` channels have 8 bits.
    """
    linears: list[Any] = [ctx.q.get_submodule(name) for name in names]

    def give(scale: float) -> None:
        for linear in linears:
            round_inputs(linear, input_grid(fmt, group), _stored(scale), kept)
        ctx.touch(site)

    if not fmt.searched:
        assert not isinstance(fmt.clip, str)
        give(fmt.clip)
        return {}
    windows = max(1, min(ctx.streams["q"].calib, _TOKENS // ctx.stream("q").shape[1]))
    exact = _outputs(ctx, windows)
    errors: dict[float, float] = {}

    def error(scale: float) -> float:
        if scale not in errors:
            give(scale)
            pairs = zip(_outputs(ctx, windows), exact, strict=True)
            errors[scale] = sum(float((y.float() - t.float()).square().sum()) for y, t in pairs)
        return errors[scale]

    if not fmt.static:
        best = min(_CLIPS, key=error)
        give(best)
        return {"clip": round(best, 2)}
    peak = max(float(x.abs().max()) for _, x in ctx.inputs("q", site))
    step = peak / ((1 << (fmt.bits - 1)) - 1)
    share = min(_COARSE, key=lambda s: error(s * step))
    share = min((round(share + d, 2) for d in _FINE if share + d <= 1.0), key=lambda s: error(s * step))
    give(share * step)
    return {"scale": _stored(share * step), "share": share, "peak": peak}


def _stored(scale: float) -> float:
    """The nearest number that survives every dtype a checkpoint may be loaded in."""
    return float(round_scale(torch.tensor(scale)))


def _outputs(ctx: Context, windows: int) -> list[Tensor]:
    return [y for _, y in ctx.runner("q", "q").outputs(0, windows)]
