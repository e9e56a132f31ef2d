"""The page of an inspection: what a model is like before it is quantized, how errors travel in it, which recipes suit it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sordino.anatomy import SITES
from sordino.measure.activations import Activations
from sordino.measure.diffusion import Horizontal
from sordino.measure.inspect import Inspection
from sordino.measure.propagation import Vertical
from sordino.report.heat import Heat
from sordino.report.page import render
from sordino.report.svg import Plot, Series

_BINS = 96  # columns of a channel map: more cannot be seen


def inspect_page(found: Inspection) -> str:
    """One self-contained HTML page."""
    subject = found.checkpoint or found.model
    drawn = plots(found)
    return render(
        "inspect.html",
        title=f"Inspection of {subject}",
        found=found,
        headline=found.lines(),
        ratios=drawn["outlier tokens"],
        loudest=_loudest(found),
        tokens=[[repr(t.token), t.id, t.times, t.first, t.ratio, t.block] for t in found.plain.most_frequent()],
        lower=drawn["quiet tokens"],
        maps=[{"site": site, "drawing": drawing} for site, drawing in zip(SITES, maps(found).values(), strict=True)],
        ranges=drawn["ranges"],
        sensitivity=[[c.what, c.where, c.kl, c.error] for c in found.sensitivities],
        depth=drawn["error along depth"],
        ratio=drawn["accumulated over isolated error"],
        singles=drawn["error of single blocks"],
        blocks=_blocks(found.vertical),
        sources=drawn["error of single tokens"],
        doses=drawn["tokens kept exact"],
        shares=_shares(found.horizontal),
    )


def plots(found: Inspection) -> dict[str, Plot]:
    """The page's plots of lines, by name."""
    return {
        "outlier tokens": _ratios(found),
        "quiet tokens": _lower(found),
        "ranges": _ranges(found.plain),
        "error along depth": _depth(found.vertical),
        "accumulated over isolated error": _over_depth({"accumulated over isolated": found.vertical.ratio}, "ratio"),
        "error of single blocks": _singles(found.vertical),
        "error of single tokens": _sources(found.horizontal),
        "tokens kept exact": _doses(found.horizontal),
    }


def maps(found: Inspection) -> dict[str, Heat]:
    """The page's maps of channels, by name, in the order of the sites."""
    return {f"channels of the input of {site}": _map(found.plain.channels[site], site) for site in SITES}


def drawings(found: Inspection) -> dict[str, Plot | Heat]:
    """All of them by name."""
    return {**plots(found), **maps(found)}


def _over_depth(lines: dict[str, list[float]], label: str) -> Plot:
    return Plot(
        [Series(name, [(i, v, f"block {i}, {name}: {v:.4g}") for i, v in enumerate(values)]) for name, values in lines.items()],
        "block",
        label,
    )


def _ratios(found: Inspection) -> Plot:
    lines = {"as it is": found.plain.ratios, "rotated": found.plain.rotated}
    if found.prefixed is not None:
        lines |= {"behind the prefix": found.prefixed.ratios, "behind the prefix, rotated": found.prefixed.rotated}
    return _over_depth(lines, "largest over median token")


def _loudest(found: Inspection) -> list[list[Any]]:
    """By block: the token that stands out most, as it is and behind the prefix."""
    sides = [side.loudest for side in (found.plain, found.prefixed) if side is not None]
    return [
        [block, *(cell for t in row for cell in (repr(t.token), t.place, t.ratio))]
        for block, row in enumerate(zip(*sides, strict=True))
    ]


def _lower(found: Inspection) -> Plot:
    lines = dict(found.plain.lower)
    if found.prefixed is not None:
        lines |= {f"{name} behind the prefix": values for name, values in found.prefixed.lower.items()}
    return _over_depth(lines, "median over smallest token")


def _map(peaks: list[Tensor], site: str) -> Heat:
    """Blocks down, channels across; a cell shows its largest channel over the block's median one."""
    rows = [[float(c.max()) for c in (p / p.median().clamp(min=1e-30)).tensor_split(min(_BINS, len(p)))] for p in peaks]
    return Heat(rows, "channel", "block", f"input of {site}")


def _ranges(found: Activations) -> Plot:
    lines = {name: [max(abs(low), abs(high)) for low, high in pairs] for name, pairs in found.ranges.items()}
    return _over_depth(lines, "largest magnitude")


def _depth(depth: Vertical) -> Plot:
    return _over_depth(
        {
            "accumulated, median": [s.median for s in depth.accumulated],
            "isolated, median": [s.median for s in depth.isolated],
            "accumulated, mean without massive tokens": [s.ordinary for s in depth.accumulated],
            "accumulated, mean of all": [s.mean for s in depth.accumulated],
        },
        "relative squared error",
    )


def _singles(depth: Vertical) -> Plot:
    series = [
        Series(
            f"block {k} alone", [(k + j, v, f"block {k} rounded, behind block {k + j}: {v:.4g}") for j, v in enumerate(values)]
        )
        for k, values in depth.single.items()
    ]
    return Plot(series, "block", "relative squared error, median")


def _blocks(depth: Vertical) -> list[list[Any]]:
    return [
        [i, a.mean, a.ordinary, a.median, s.mean, s.ordinary, s.median, ratio, mse, cosine, massive]
        for i, (a, s, ratio, mse, cosine, massive) in enumerate(
            zip(depth.accumulated, depth.isolated, depth.ratio, depth.mse, depth.cosine, depth.massive, strict=True)
        )
    ]


def _sources(across: Horizontal) -> Plot:
    """Over places; windows that tried the same place are averaged."""
    series = []
    for name, key in (("all activations", "diffused"), ("keys and values alone", "kv_diffused")):
        at: dict[int, list[float]] = {}
        for s in across.sources:
            at.setdefault(s.place, []).append(getattr(s, key))
        means = [(place, sum(values) / len(values)) for place, values in sorted(at.items())]
        series.append(Series(name, [(place, mean, f"place {place}: {mean:.4g}") for place, mean in means]))
    return Plot(series, "place of the rounded token", "error of all later tokens")


def _doses(across: Horizontal) -> Plot:
    series = [
        Series(kind, [(p, e, f"{kind} {p} kept exact: {e:.4g}") for p, e in curve]) for kind, curve in across.doses.items()
    ]
    return Plot(series, "tokens whose keys and values stay exact", "median relative error")


def _shares(across: Horizontal) -> list[list[Any]]:
    return [[p, across.shares[p], across.kv_shares[p], p / across.tokens] for p in across.shares]
