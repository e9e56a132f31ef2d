"""Horizontal error: what rounding one token's activations does to the tokens behind it (spec bisup section 1.2).

Interventions, because attention and error may go together for other reasons: round the rows of one source token alone, weights
untouched, and see what reaches the last block's output. Ours, a reconstruction of what BiSup's abstract names.
Shapes: L tokens, B rows of a batch, H query heads, K key heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sordino.anatomy import Anatomy
from sordino.measure.activations import Progress, hooked
from sordino.measure.propagation import relative_errors, run_blocks
from sordino.measure.sensitivity import give_kv_grid, take_kv_grid
from sordino.numerics.inputs import fake_encode, token_scale
from sordino.numerics.kv import KvGrid
from sordino.numerics.ranks import rank_correlation

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
            rounded (median over tokens, mean over windows); dose 0 is common to all.
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

    def fake(self, x: Tensor, share: Tensor) -> Tensor:
        """X [B, K, L, d] with the chosen rows rounded."""
        return torch.where(self.rows[:, None, :, None], self.grid.fake(x, share), x)


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

    def before(_: Any, args: tuple[Any, ...]) -> tuple[Tensor]:
        x = args[0]
        return (torch.where(part[..., None], fake_encode(x, token_scale(x, bits), bits), x),)

    outs = []
    linears = [] if kv_only else [anatomy.full_name(i, x.name) for i in range(anatomy.n_blocks) for x in anatomy.linears]
    for part in rows.split(_BATCH):
        modules = give_kv_grid(model, RowGrid(KvGrid(bits, symmetric=False, static=False), part))
        try:
            with hooked([model.get_submodule(name).register_forward_pre_hook(before) for name in linears]):
                outs.append(run_blocks(model, ids.expand(len(part), -1))[-1])
        finally:
            take_kv_grid(modules)
    return torch.cat(outs)


@torch.no_grad()
def attention_received(model: Any, ids: Tensor) -> Tensor:
    """a(i), fp32 [L]: mean over blocks, heads and queries behind i of the attention weight of i; 0 for the last token."""
    length, total, count = len(ids), torch.zeros(len(ids)), 0
    modules = [m for m in model.modules() if hasattr(m, "k_proj")]
    later = torch.ones(length, length, dtype=torch.bool).tril(-1)
    for module in modules:

        def see(seen: Any, module: Any = module) -> None:
            nonlocal total, count
            query, key = (t[0].float() for t in seen[:2])
            repeats = query.shape[0] // key.shape[0]
            for head in range(query.shape[0]):
                scores = query[head] @ key[head // repeats].T * module.scaling
                weights = scores.masked_fill(~(later | torch.eye(length, dtype=torch.bool)), float("-inf")).softmax(-1)
                total += (weights * later).sum(0)
                count += 1

        module.watcher = see
    try:
        model.get_decoder()(input_ids=ids[None], use_cache=False)
    finally:
        for module in modules:
            del module.watcher
    return total / count / torch.arange(length - 1, -1, -1).clamp(min=1)


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
    for n, ids in enumerate(windows):
        if progress is not None:
            progress("tokens", n, len(windows))
        exact, attention = run_blocks(model, ids[None])[-1], attention_received(model, ids)
        found.append(_sources(model, anatomy, ids, exact, attention, bits, rng, n))
        doses.append(_doses(model, anatomy, ids, exact, attention, bits, rng))
    if progress is not None:
        progress("tokens", len(windows), len(windows))
    length = windows.shape[1]
    both = []
    for key in ("diffused", "kv_diffused"):
        values = [torch.tensor([getattr(s, key) for s in w], dtype=torch.float64) for w in found]
        known = [
            c
            for v, w in zip(values, found, strict=True)
            if (c := rank_correlation(v, torch.tensor([s.attention for s in w]))) is not None
        ]
        both.append(
            (
                sum(known) / len(known) if known else None,
                {p: sum(_share(v, length, p) for v in values) / len(values) for p in (1, 4, 16) if p <= min(FIRST, length)},
            )
        )
    mean = {
        kind: [(p, sum(d[kind][j][1] for d in doses) / len(doses)) for j, (p, _) in enumerate(doses[0][kind])]
        for kind in doses[0]
    }
    return Horizontal([s for w in found for s in w], both[0][0], both[1][0], both[0][1], both[1][1], mean, length)


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
    """Keep some tokens' keys and values, round all others'."""
    length = len(ids)
    orders = {
        "first": torch.arange(length),
        "random": torch.randperm(length, generator=rng),
        "most attended": attention.argsort(descending=True),
    }
    sizes = [p for p in DOSES if p < length]
    rows = torch.ones(1 + len(orders) * len(sizes), length, dtype=torch.bool)
    cases = [(kind, p) for kind in orders for p in sizes]
    for n, (kind, p) in enumerate(cases, 1):
        rows[n, orders[kind][:p]] = False
    errors = relative_errors(last_with_rows_rounded(model, anatomy, ids, rows, bits, kv_only=True), exact).median(-1).values
    found: dict[str, list[tuple[int, float]]] = {kind: [(0, float(errors[0]))] for kind in orders}
    for n, (kind, p) in enumerate(cases, 1):
        found[kind].append((p, float(errors[n])))
    return found
