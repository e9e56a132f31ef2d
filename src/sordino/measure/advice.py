"""Which recipes suit a model, from what the inspection measured; thresholds are rules of thumb and are said with the figure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sordino.errors import InputError
from sordino.measure.activations import Activations
from sordino.measure.diffusion import Horizontal
from sordino.measure.propagation import Vertical
from sordino.measure.sensitivity import Sensitivity
from sordino.protect.prefix import THRESHOLD
from sordino.recipe import load_recipe
from sordino.walk.plan import make_plan
from sordino.walk.source import Source, open_source

SMALL = 0.02  # nats a token that hardly anybody notices
_INSTEAD = {"w4": "gptq-w4", "w4a4kv4": "quarot-w4a4kv4"}  # where a recipe's groups or moves do not fit a model


@dataclass(frozen=True)
class Advice:
    """A recipe and why.

    Attributes:
        recipe: a preset; empty for a remark without one.
        reason: in words, with the figures.
    """

    recipe: str
    reason: str


def advise(
    plain: Activations,
    prefixed: Activations | None,
    costs: list[Sensitivity],
    depth: Vertical,
    across: Horizontal,
    model: str,
) -> list[Advice]:
    """Recipes in the order of what they round; of one that this model cannot take is said why, and what may stand in for it."""
    kl = {(c.what, c.where): c.kl for c in costs}
    rows = [*_weights(kl), *_inputs(kl, plain, prefixed), *_cache(kl), *_depth(depth), *_tokens(across)]
    source = open_source(model)
    return [_possible(row, source) for row in rows]


def _possible(row: Advice, source: Source) -> Advice:
    refusal = _refusal(row.recipe, source) if row.recipe else ""
    if not refusal:
        return row
    other = _INSTEAD.get(row.recipe, "")
    if other and not _refusal(other, source):
        return Advice(other, f"{row.reason} (Not {row.recipe}, which this model cannot take: {refusal}.)")
    return Advice("", f"{row.reason} {row.recipe} would be the recipe, but this model cannot take it: {refusal}.")


def _refusal(recipe: str, source: Source) -> str:
    """Why a model cannot take a recipe; empty if it can."""
    try:
        make_plan(source, load_recipe(recipe), None, None)
    except InputError as error:
        return str(error)
    return ""


def _weights(kl: dict[tuple[str, str], float]) -> Iterator[Advice]:
    whole = kl["weights", "all"]
    parts = {where: value for (what, where), value in kl.items() if what == "weights" and where != "all"}
    worst = max(parts, key=lambda name: parts[name])
    costs = f"Plain rounding of all weights to 4 bits costs {whole:.4f} nats a token"
    most = f"of the projections {worst} costs most, {parts[worst]:.4f} alone"
    if whole < SMALL:
        yield Advice("gptq-w4", f"{costs}; {most}: little is left to repair.")
    else:
        yield Advice("w4", f"{costs}; {most}: there is something to repair.")
    if worst == "down_proj":
        yield Advice("d2quant-w3", f"{most[0].upper()}{most[1:]}: its column scale aims there.")


def _inputs(kl: dict[tuple[str, str], float], plain: Activations, prefixed: Activations | None) -> Iterator[Advice]:
    bare, turned, peak = kl["inputs", "all"], kl["rotated inputs", "all"], max(plain.ratios)
    block = plain.ratios.index(peak)
    costs = f"Inputs at 4 bits cost {bare:.3f} nats a token, behind a rotation {turned:.3f}"
    stands = f"{plain.loudest[block].token!r} stands out {peak:.1f}-fold at down_proj of block {block}"
    if prefixed is not None:
        left = f"{prefixed.ratios[block]:.1f}-fold there, {max(prefixed.ratios):.1f} in the worst block"
        yield Advice("w4a4kv4", f"{costs}; {stands}, behind the prefix a token does {left}.")
    elif peak >= THRESHOLD:
        yield Advice("w4a4kv4", f"{costs}; {stands}.")
    elif bare < SMALL:
        yield Advice("w8a8", f"{costs}: neither rotation nor prefix is needed, any recipe with rounded inputs will do.")
    else:
        yield Advice("quarot-w4a4kv4", f"{costs}; {stands}, no token more than that: a prefix has nothing to hold.")
    if turned > 25 * SMALL:
        worse = f"Even rotated, inputs at 4 bits cost {turned:.3f} nats a token"
        yield Advice("w4a8kv4", f"{worse}: 8 bits take most of that away.")


def _cache(kl: dict[tuple[str, str], float]) -> Iterator[Advice]:
    cost = kl["keys and values", "all"]
    verdict = "free for practical purposes" if cost < SMALL else "not free: judge recipes whose names hold kv4 by their KL"
    yield Advice("", f"Keys and values at 4 bits cost {cost:.4f} nats a token: {verdict}.")


def _depth(depth: Vertical) -> Iterator[Advice]:
    ratio = depth.ratio[-1]
    if ratio > 2:
        reason = f"Behind the last block the error is {ratio:.1f} times what that block makes alone: it accumulates along depth"
        yield Advice("w4a4kv4", f"{reason}, and tuning against the full-precision stream acts on just that.")
    else:
        yield Advice("", f"Behind the last block the error is {ratio:.1f} times that block's own: it hardly accumulates.")


def _tokens(across: Horizontal) -> Iterator[Advice]:
    share, places = across.kv_shares.get(4), 4 / across.tokens
    if share is None:
        return
    reason = f"Of the error that rounded keys and values carry to later tokens, the first 4 places make {share:.1%}"
    reason += f", where they are {places:.1%} of the tokens"
    if share > max(0.1, 4 * places):
        yield Advice("prefixquant-w4a4kv4-dynamic", f"{reason}: keep what stands there exact, by a prefix or --system-prompt.")
    else:
        yield Advice("", f"{reason}: no place to protect stands out.")
