"""The page of an inspection: what a model is like before it is quantized, how errors travel in it, which recipes suit it."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup
from torch import Tensor

from sordino.anatomy import SITES
from sordino.measure.activations import Activations
from sordino.measure.diffusion import Horizontal
from sordino.measure.inspect import Inspection
from sordino.measure.propagation import Spread, Vertical
from sordino.report.heat import heat
from sordino.report.page import render
from sordino.report.svg import Series, plot

_BINS = 96  # columns of a channel map: more cannot be seen


def inspect_page(found: Inspection) -> str:
    """One self-contained HTML page."""
    subject = found.checkpoint or found.model
    return render(
        "inspect.html",
        title=f"Inspection of {subject}",
        found=found,
        headline=_headline(found),
        ratios=_ratios(found),
        lower=_lower(found),
        maps=[{"site": site, "drawing": _map(found.plain.channels[site], site)} for site in SITES],
        ranges=_ranges(found.plain),
        sensitivity=_sensitivity(found),
        depth=_depth(found.vertical),
        ratio=_over_depth({"accumulated over isolated": found.vertical.ratio}, "ratio"),
        singles=_singles(found.vertical),
        blocks=_blocks(found.vertical),
        sources=_sources(found.horizontal),
        doses=_doses(found.horizontal),
        shares=_shares(found.horizontal),
    )


def _headline(found: Inspection) -> list[tuple[str, Any]]:
    costs = {(c.what, c.where): c.kl for c in found.sensitivities}
    lines: list[tuple[str, Any]] = [("full-precision model", found.model)]
    if found.checkpoint:
        lines.append(("checkpoint held against it", found.checkpoint))
    peak = max(found.plain.ratios)
    lines += [
        ("text", f"{found.text}, {found.windows} windows of {found.seqlen} tokens"),
        ("largest over median token", f"{peak:.1f} at the input of down_proj, block {found.plain.ratios.index(peak)}"),
        (
            "prefix that the move would choose",
            " ".join(map(repr, found.prefix_tokens)) or "none: no token stands out far enough",
        ),
    ]
    if found.prefixed is not None:
        lines.append(("the same ratio behind that prefix", f"{max(found.prefixed.ratios):.1f}"))
    lines += [
        (f"KL, weights rounded to {found.bits} bits", costs["weights", "all"]),
        (f"KL, inputs at {found.bits} bits", costs["inputs", "all"]),
        (f"KL, inputs at {found.bits} bits behind a rotation", costs["rotated inputs", "all"]),
        (f"KL, keys and values at {found.bits} bits", costs["keys and values", "all"]),
        ("error behind the last block over that block's own", found.vertical.ratio[-1]),
        ("time", f"{found.seconds:.0f} s"),
    ]
    return lines


def _over_depth(lines: dict[str, list[float]], label: str) -> Markup:
    return plot(
        [Series(name, [(i, v, f"block {i}, {name}: {v:.4g}") for i, v in enumerate(values)]) for name, values in lines.items()],
        "block",
        label,
        lines=True,
    )


def _ratios(found: Inspection) -> Markup:
    lines = {"as it is": found.plain.ratios, "rotated": found.plain.rotated}
    if found.prefixed is not None:
        lines |= {"behind the prefix": found.prefixed.ratios, "behind the prefix, rotated": found.prefixed.rotated}
    return _over_depth(lines, "largest over median token")


def _lower(found: Inspection) -> Markup:
    lines = dict(found.plain.lower)
    if found.prefixed is not None:
        lines |= {f"{name} behind the prefix": values for name, values in found.prefixed.lower.items()}
    return _over_depth(lines, "median over smallest token")


def _map(peaks: list[Tensor], site: str) -> Markup:
    """Blocks down, channels across; a cell shows its largest channel over the block's median one."""
    rows = [[float(c.max()) for c in (p / p.median().clamp(min=1e-30)).tensor_split(min(_BINS, len(p)))] for p in peaks]
    return heat(rows, "channel", "block", f"input of {site}")


def _ranges(found: Activations) -> Markup:
    lines = {name: [max(abs(low), abs(high)) for low, high in pairs] for name, pairs in found.ranges.items()}
    return _over_depth(lines, "largest magnitude")


def _sensitivity(found: Inspection) -> list[dict[str, Any]]:
    most = max((c.kl for c in found.sensitivities), default=0.0) or 1.0
    return [
        {"what": c.what, "where": c.where, "kl": c.kl, "error": c.error, "width": max(0.5, 100 * c.kl / most)}
        for c in found.sensitivities
    ]


def _depth(depth: Vertical) -> Markup:
    def median(rows: list[Spread]) -> list[float]:
        return [s.median for s in rows]

    lines = {"accumulated, median": median(depth.accumulated), "isolated, median": median(depth.isolated)}
    lines["accumulated, mean without massive tokens"] = [s.ordinary for s in depth.accumulated]
    lines["accumulated, mean of all"] = [s.mean for s in depth.accumulated]
    return _over_depth(lines, "relative squared error")


def _singles(depth: Vertical) -> Markup:
    series = [
        Series(
            f"block {k} alone", [(k + j, v, f"block {k} rounded, behind block {k + j}: {v:.4g}") for j, v in enumerate(values)]
        )
        for k, values in depth.single.items()
    ]
    return plot(series, "block", "relative squared error, median", lines=True)


def _blocks(depth: Vertical) -> list[list[Any]]:
    return [
        [i, a.mean, a.ordinary, a.median, s.mean, s.ordinary, s.median, ratio, mse, cosine, massive]
        for i, (a, s, ratio, mse, cosine, massive) in enumerate(
            zip(depth.accumulated, depth.isolated, depth.ratio, depth.mse, depth.cosine, depth.massive, strict=True)
        )
    ]


def _sources(across: Horizontal) -> Markup:
    lines = {"all activations": "diffused", "keys and values alone": "kv_diffused"}
    series = [
        Series(
            name,
            [
                (
                    s.place,
                    getattr(s, key),
                    f"place {s.place} of window {s.window}: {getattr(s, key):.4g}, attention {s.attention:.4g}",
                )
                for s in sorted(across.sources, key=lambda s: s.place)
            ],
        )
        for name, key in lines.items()
    ]
    return plot(series, "place of the rounded token", "error of all later tokens", lines=True)


def _doses(across: Horizontal) -> Markup:
    series = [
        Series(kind, [(p, e, f"{kind} {p} kept exact: {e:.4g}") for p, e in curve]) for kind, curve in across.doses.items()
    ]
    return plot(series, "tokens whose keys and values stay exact", "median relative error", lines=True)


def _shares(across: Horizontal) -> list[list[Any]]:
    return [[p, across.shares[p], across.kv_shares[p], p / across.tokens] for p in across.shares]
