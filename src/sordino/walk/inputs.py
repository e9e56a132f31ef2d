"""Static scales of rounded inputs, one a site, by the error of the block's output (PrefixQuant, spec section 4.5).

Coarse, then fine shares of the largest entry that calibration saw; the share 1 is among them. Compared is the block with and
without rounding at this site, everything before it rounded already. Shapes: B windows, L tokens, D hidden size.
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

_COARSE = [0.25 + 0.1 * i for i in range(8)] + [1.0]
_FINE = [0.01 * i for i in range(-5, 6)]
_TOKENS = 2048  # on which the candidates are compared


def round_site(ctx: Context, site: Site, names: list[str], fmt: ActivationFormat) -> dict[str, float]:
    """Let the linears of a site round their common input; returns what is worth reporting."""
    linears: list[Any] = [ctx.q.get_submodule(name) for name in names]
    if fmt.mode == "dynamic":
        for linear in linears:
            round_inputs(linear, fmt.bits, fmt.clip)
        ctx.touch(site)
        return {}
    peak = max(float(x.abs().max()) for _, x in ctx.inputs("q", site))
    step = peak / ((1 << (fmt.bits - 1)) - 1)
    windows = max(1, min(ctx.streams["q"].calib, _TOKENS // ctx.stream("q").shape[1]))
    exact = _outputs(ctx, windows)
    errors: dict[float, float] = {}

    def error(share: float) -> float:
        if share not in errors:
            for linear in linears:
                round_inputs(linear, fmt.bits, 1.0, _stored(share * step))
            ctx.touch(site)
            pairs = zip(_outputs(ctx, windows), exact, strict=True)
            errors[share] = sum(float((y.float() - t.float()).square().sum()) for y, t in pairs)
        return errors[share]

    best = min(_COARSE, key=error)
    best = min((round(best + d, 2) for d in _FINE if best + d <= 1.0), key=error)
    for linear in linears:
        round_inputs(linear, fmt.bits, 1.0, _stored(best * step))
    ctx.touch(site)
    return {"scale": _stored(best * step), "share": best, "peak": peak}


def _stored(scale: float) -> float:
    """The nearest number that survives every dtype a checkpoint may be loaded in."""
    return float(round_scale(torch.tensor(scale)))


def _outputs(ctx: Context, windows: int) -> list[Tensor]:
    return [y for _, y in ctx.runner("q", "q").outputs(0, windows)]
