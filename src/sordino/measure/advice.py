"""Which recipes suit a model, from what the inspection measured; thresholds are rules of thumb and are said with the figure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sordino.errors import InputError
from sordino.measure.activations import Activations
from sordino.measure.diffusion import Horizontal
from sordino.measure.propagation import Vertical
from sordino.measure.sensitivity import Sensitivity
from sordino.recipe import load_recipe
from sordino.walk.plan import make_plan
from sordino.walk.source import open_source

SMALL = 0.02  # nats a token that hardly anybody notices
OUTLIER = 64.0


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
    """Recipes in the order of what they round; one that this model cannot take is said to be refused, and why."""
    kl = {(c.what, c.where): c.kl for c in costs}
    rows = [*_weights(kl), *_inputs(kl, plain, prefixed), *_cache(kl), *_depth(depth), *_tokens(across)]
    return [_possible(row, model) for row in rows]


def _possible(row: Advice, model: str) -> Advice:
    if not row.recipe:
        return row
    try:
        make_plan(open_source(model), load_recipe(row.recipe), None, None)
    except InputError as error:
        return Advice("", f"{row.recipe} would be the recipe, but this model cannot take it: {error}. {row.reason}")
    return row


def _weights(kl: dict[tuple[str, str], float]) -> Iterator[Advice]:
    whole = kl["weights", "all"]
    parts = {where: value for (what, where), value in kl.items() if what == "weights" and where != "all"}
    worst = max(parts, key=lambda name: parts[name])
    costs = f"Plain rounding of all weights to 4 bits costs {whole:.4f} nats a token"
    most = f"of the projections {worst} costs most, {parts[worst]:.4f} alone"
    if whole < SMALL:
        yield Advice("gptq-w4", f"{costs}: little is left to repair.")
    else:
        yield Advice("w4", f"{costs}; {most}: GPTQ and tuning pay.")
    if worst == "down_proj":
        yield Advice("d2quant-w3", f"{most[0].upper()}{most[1:]}: its column scale aims there.")


def _inputs(kl: dict[tuple[str, str], float], plain: Activations, prefixed: Activations | None) -> Iterator[Advice]:
    bare, turned, peak = kl["inputs", "all"], kl["rotated inputs", "all"], max(plain.ratios)
    costs = f"Inputs at 4 bits cost {bare:.3f} nats a token, behind a rotation {turned:.3f}"
    if prefixed is not None:
        stands = f"a token stands out {peak:.0f}-fold at down_proj, behind the prefix {max(prefixed.ratios):.1f}-fold"
        yield Advice("w4a4kv4", f"{costs}; {stands}, so one scale can serve all tokens.")
    elif peak >= OUTLIER:
        yield Advice("w4a4kv4", f"{costs}; a token stands out {peak:.0f}-fold at down_proj.")
    elif bare < SMALL:
        yield Advice("w8a8", f"{costs}: neither rotation nor prefix is needed, any recipe with rounded inputs will do.")
    else:
        yield Advice("quarot-w4a4kv4", f"{costs}; no token stands out ({peak:.1f}-fold at most): a prefix has nothing to hold.")
    if turned > 25 * SMALL:
        yield Advice("w4a8kv4", "Even rotated, inputs at 4 bits cost much: with 8 bits for them that loss goes away.")


def _cache(kl: dict[tuple[str, str], float]) -> Iterator[Advice]:
    cost = kl["keys and values", "all"]
    verdict = "free for practical purposes" if cost < SMALL else "not free: judge recipes whose names hold kv4 by their KL"
    yield Advice("", f"Keys and values at 4 bits cost {cost:.4f} nats a token: {verdict}.")


def _depth(depth: Vertical) -> Iterator[Advice]:
    ratio = depth.ratio[-1]
    if ratio > 2:
        reason = f"Behind the last block the error is {ratio:.1f} times what that block makes alone: it accumulates along depth"
        yield Advice("bisup-quarot-w4a4", f"{reason}, and tuning against the full-precision stream acts on just that.")
    else:
        yield Advice("", f"Behind the last block the error is {ratio:.1f} times that block's own: it hardly accumulates.")


def _tokens(across: Horizontal) -> Iterator[Advice]:
    share, places = across.kv_shares.get(4), 4 / across.tokens
    if share is None:
        return
    reason = f"Of the error that rounded keys and values carry to later tokens, the first 4 places make {share:.0%}"
    if share > max(0.25, 4 * places):
        yield Advice("prefixquant-w4a4kv4-dynamic", f"{reason}: keep what stands there exact, by a prefix or --system-prompt.")
    else:
        yield Advice("", f"{reason}: no place to protect stands out.")
