"""Horizontal error: what rounding one token's activations does to the tokens behind it (spec bisup section 1.2).

Interventions, because attention and error may go together for other reasons: round the rows of one source token alone, weights
untouched, and see what reaches the last block's output. Ours, a reconstruction of what BiSup's abstract names.
Shapes: L tokens, B rows of a batch, H query heads, K key heads, d head size.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sordino.anatomy import Anatomy
from sordino.contract import Progress
from sordino.measure.evaluate import in_turn
from sordino.measure.propagation import last_states, relative_errors
from sordino.measure.sensitivity import kv_grid, names_of, round_tokens, with_inputs, with_kv
from sordino.numerics.kv import KvGrid
from sordino.numerics.ranks import rank_correlation
from sordino.walk.attention import watched

FIRST, DRAWN = 16, 16  # sources: the first places, all of them, and random later ones
DOSES = (1, 2, 4, 8, 16, 32, 64)
_BATCH = 8


@dataclass(frozen=True)
class Source:
    """One source token.

    Attributes:
        place: in its window, from 0.
        window: which.
        diffused: D(i), sum over later tokens of the relative error at the last block.
        own: O(i), the same of the token itself.
        kv_diffused: D(i) where only its keys and values are rounded.
        attention: a(i), what later queries give it, mean over blocks, heads and queries.
    """

    place: int
    window: int
    diffused: float
    own: float
    kv_diffused: float
    attention: float


@dataclass(frozen=True)
class Horizontal:
    """Figures over windows of L tokens.

    Attributes:
        sources: every intervention.
        correlation: rank correlation of D(i) with a(i), mean over windows; None where undefined.
        kv_correlation: the same for keys and values alone.
        shares: part of all D that the first 1, 4, 16 places carry; later places by their random sample.
        kv_shares: the same for keys and values alone.
        doses: for "first", "random" and "most attended": error with so many tokens' keys and values kept exact, all others
            rounded (median over the tokens behind the largest dose, mean over windows); dose 0 is common to all.
        tokens: L.
    """

    sources: list[Source]
    correlation: float | None
    kv_correlation: float | None
    shares: dict[int, float]
    kv_shares: dict[int, float]
    doses: dict[str, list[tuple[int, float]]]
    tokens: int


@dataclass(frozen=True)
class RowGrid:
    """Keys and values of some tokens rounded, for :func:`sordino.runtime.attention.round_kv`; rows is bool [B, L]."""

    grid: KvGrid
    rows: Tensor

    def fake(self, x: Tensor, share: Tensor, moving: bool = False) -> Tensor:
        """X [B, K, L, d] with the chosen rows rounded."""
        return torch.where(self.rows[:, None, :, None], self.grid.fake(x, share, moving), x)


@torch.no_grad()
def last_with_rows_rounded(model: Any, anatomy: Anatomy, ids: Tensor, rows: Tensor, bits: int, kv_only: bool) -> Tensor:
    """Output of the last block, [B, L, D], where only some tokens are rounded.

    Args:
        model: in full precision, with an attention function of ours.
        anatomy: of it.
        ids: one window, int64 [L].
        rows: which tokens' inputs of linears, keys and values are rounded, bool [B, L].
        bits: their width.
        kv_only: leave the inputs of linears.
    """
    outs = []
    names = [] if kv_only else names_of(anatomy, anatomy.linears)
    for part in rows.split(_BATCH):
        change = partial(_round_rows, rows=part, bits=bits)
        with with_kv(model, RowGrid(kv_grid(bits), part)), with_inputs(model, change, names):
            outs.append(last_states(model, ids.expand(len(part), -1)))
    return torch.cat(outs)


def _round_rows(x: Tensor, rows: Tensor, bits: int) -> Tensor:
    return torch.where(rows[..., None], round_tokens(x, bits), x)


@torch.no_grad()
def attention_received(model: Any, ids: Tensor) -> Tensor:
    """a(i), fp32 [L]: mean over blocks, heads and queries behind i of the attention weight of i; 0 for the last token."""
    length = len(ids)
    modules = [m for m in model.modules() if hasattr(m, "k_proj")]
    with ExitStack() as stack:
        seen = [stack.enter_context(watched(m)) for m in modules]
        model.get_decoder()(input_ids=ids[None], use_cache=False)
    ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
    total = torch.zeros(length)
    for module, [(query, key, _)] in zip(modules, seen, strict=True):
        keys = key[0].float().repeat_interleave(query.shape[1] // key.shape[1], 0)
        for q, k in zip(query[0].float(), keys, strict=True):
            weights = (q @ k.T * module.scaling).masked_fill_(ahead, float("-inf")).softmax(-1)
            total += weights.tril(-1).sum(0) / (len(modules) * len(keys))
    return total / torch.arange(length - 1, -1, -1).clamp(min=1)


def attended(attention: Tensor) -> Tensor:
    """Places by all the attention that tokens behind them pay, most first, int64 [L].

    Args:
        attention: a(i), fp32 [L]. A mean: of the last tokens, whom few can attend to, it is large whatever they are.
    """
    return (attention * torch.arange(len(attention) - 1, -1, -1)).argsort(descending=True, stable=True)


def horizontal(
    model: Any, anatomy: Anatomy, windows: Tensor, bits: int, seed: int = 0, progress: Progress | None = None
) -> Horizontal:
    """Measure from token to token.

    Args:
        model: in full precision, with an attention function of ours; as before afterwards.
        anatomy: of it.
        windows: token ids, int64 [N, L], L at least 4.
        bits: what rows are rounded to.
        seed: of the random sources.
        progress: told (what, done, total).
    """
    rng = torch.Generator().manual_seed(seed)
    found: list[list[Source]] = []
    doses: list[dict[str, list[tuple[int, float]]]] = []
    for ids in in_turn(windows, progress, "tokens"):
        exact, attention = last_states(model, ids[None]), attention_received(model, ids)
        found.append(_sources(model, anatomy, ids, exact, attention, bits, rng, len(found)))
        doses.append(_doses(model, anatomy, ids, exact, attention, bits, rng))
    length = windows.shape[1]
    return Horizontal(
        sources=[s for window in found for s in window],
        correlation=_correlation(found, "diffused"),
        kv_correlation=_correlation(found, "kv_diffused"),
        shares=_shares(found, "diffused", length),
        kv_shares=_shares(found, "kv_diffused", length),
        doses={
            kind: [(curve[0][0], _mean([e for _, e in curve])) for curve in zip(*(d[kind] for d in doses), strict=True)]
            for kind in doses[0]
        },
        tokens=length,
    )


def _correlation(found: list[list[Source]], key: str) -> float | None:
    """Rank correlation of a figure with the attention received, mean over the windows that have one."""
    pairs = [[torch.tensor([getattr(s, name) for s in window]).double() for name in (key, "attention")] for window in found]
    known = [c for diffused, attention in pairs if (c := rank_correlation(diffused, attention)) is not None]
    return _mean(known) if known else None


def _shares(found: list[list[Source]], key: str, length: int) -> dict[int, float]:
    values = [torch.tensor([getattr(s, key) for s in window], dtype=torch.float64) for window in found]
    return {p: _mean([_share(v, length, p) for v in values]) for p in (1, 4, 16) if p <= min(FIRST, length)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _sources(
    model: Any, anatomy: Anatomy, ids: Tensor, exact: Tensor, attention: Tensor, bits: int, rng: torch.Generator, window: int
) -> list[Source]:
    length = len(ids)
    first = min(FIRST, length - 1)
    drawn = torch.randperm(length - 1 - first, generator=rng)[:DRAWN].sort().values + first
    places = [*range(first), *drawn.tolist()]
    rows = torch.zeros(len(places), length, dtype=torch.bool)
    rows[torch.arange(len(places)), places] = True
    whole, kv = (
        relative_errors(last_with_rows_rounded(model, anatomy, ids, rows, bits, kv_only), exact) for kv_only in (False, True)
    )
    return [
        Source(p, window, float(whole[n, p + 1 :].sum()), float(whole[n, p]), float(kv[n, p + 1 :].sum()), float(attention[p]))
        for n, p in enumerate(places)
    ]


def _share(diffused: Tensor, length: int, p: int) -> float:
    """Part of the whole D that the first p places carry; places that were not tried count as the mean of the drawn ones."""
    first = min(FIRST, length - 1)
    rest = float(diffused[first:].mean()) * (length - 1 - first) if len(diffused) > first else 0.0
    total = float(diffused[:first].sum()) + rest
    return float(diffused[:p].sum()) / total if total > 0 else 0.0


def _doses(
    model: Any, anatomy: Anatomy, ids: Tensor, exact: Tensor, attention: Tensor, bits: int, rng: torch.Generator
) -> dict[str, list[tuple[int, float]]]:
    """Keep some tokens' keys and values, round all others'; seen at the same tokens for every dose, behind the largest one."""
    length = len(ids)
    orders = {
        "first": torch.arange(length),
        "random": torch.randperm(length, generator=rng),
        "most attended": attended(attention),
    }
    sizes = [p for p in DOSES if 4 * p <= length]
    rows = torch.ones(1 + len(orders) * len(sizes), length, dtype=torch.bool)
    cases = [(kind, p) for kind in orders for p in sizes]
    for n, (kind, p) in enumerate(cases, 1):
        rows[n, orders[kind][:p]] = False
    states = last_with_rows_rounded(model, anatomy, ids, rows, bits, kv_only=True)
    errors = relative_errors(states, exact)[:, sizes[-1] :].median(-1).values
    found: dict[str, list[tuple[int, float]]] = {kind: [(0, float(errors[0]))] for kind in orders}
    for n, (kind, p) in enumerate(cases, 1):
        found[kind].append((p, float(errors[n])))
    return found
