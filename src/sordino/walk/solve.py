"""Rounding of one site: the one solver on each of its linears, those of one format stacked.

Shapes: R = out_features, C = in_features.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from sordino.anatomy import Site
from sordino.errors import SordinoError
from sordino.numerics.threads import one_thread
from sordino.round.keeping import Keeping
from sordino.rounding import Rounded, Stats
from sordino.walk.context import Context
from sordino.walk.linears import LinearPlan, make_grid, make_solver
from sordino.walk.plan import Plan

# Weights of one call to a solver: rows beyond that are solved in a further call.
_STACK = 1 << 25
_SMALL = 1 << 22  # below this a solver's steps are too short to share between threads


def solve_site(ctx: Context, plan: Plan, site: Site, report: dict[str, Any]) -> None:
    """Run the one solver on each linear of a site; linears of one format are solved together.

    Args:
        ctx: the block.
        plan: of the run.
        site: which of its linears.
        report: what is worth saying of each linear is added, by name.
    """
    plans = [p for p in plan.linears[ctx.index] if p.linear.site == site and p.group is not None]
    stats: Stats | None = None
    # Linears that differ in format cannot be stacked; the statistics are shared all the same.
    batches: dict[tuple[Any, ...], list[LinearPlan]] = {}
    for p in plans:
        batches.setdefault((p.format.model_dump_json(), p.group), []).append(p)
    for number, members in enumerate(batches.values()):
        solver = make_solver(members[0].format)
        solver.keep_latent = any(m.needs_latent for m in plan.moves)
        if solver.needs:
            # A solver uses its statistics up; only a further format at this site needs them again.
            stats = ctx.stats(site, solver.needs, solver.cap) if stats is None or number else stats
        _solve(ctx, members, solver, stats, report)


def commit(ctx: Context, linear: str, rounded: Rounded) -> dict[str, float]:
    """Put a rounded weight into the block; returns its squared error relative to the full-precision weight."""
    ctx.commit(linear, rounded)
    ours, exact = (cast(Tensor, b.get_submodule(linear).weight).float() for b in (ctx.q, ctx.fp))
    error = (ours - exact).square().sum() / exact.square().sum().clamp(min=1e-30)
    return {"weight_error": round(float(error), 8)} | rounded.notes


def _solve(ctx: Context, members: list[LinearPlan], solver: Any, stats: Stats | None, report: dict[str, Any]) -> None:
    group, grid = members[0].group, make_grid(members[0].format)
    assert group is not None
    solver = Keeping.around(solver, members[0].kept, stats)
    try:
        prepared = solver.prepare(stats, group)
    except ValueError as error:
        raise SordinoError(f"block {ctx.index}, {members[0].linear.site}: {error}") from None
    modules: list[Any] = [ctx.q.get_submodule(p.linear.name) for p in members]
    parts: list[list[Rounded]] = [[] for _ in members]
    shapes = [tuple(m.weight.shape) for m in modules]
    # All rows share a column scale, so they must be fitted together.
    whole = [[(i, slice(0, rows))] for i, (rows, _) in enumerate(shapes)]
    for stack in whole if members[0].format.column_scale else _stacks(shapes):
        stacked = torch.cat([modules[i].weight[rows].float() for i, rows in stack])
        with one_thread(stacked.numel() <= _SMALL):
            done = solver.solve(stacked, prepared, grid, group)
        at = 0
        for i, rows in stack:
            parts[i].append(done.rows(slice(at, at + rows.stop - rows.start)))
            at += rows.stop - rows.start
    for p, solved in zip(members, parts, strict=True):
        report[p.linear.name] = commit(ctx, p.linear.name, Rounded.join(solved).beside(p.side))


def _stacks(shapes: list[tuple[int, ...]]) -> list[list[tuple[int, slice]]]:
    """Cut the rows of several matrices of equal width into stacks of at most ``_STACK`` weights.

    Returns:
        Stacks of (matrix, rows) in order; the rows of a matrix come in order too.
    """
    room = rows_left = max(1, _STACK // shapes[0][1])
    stacks: list[list[tuple[int, slice]]] = [[]]
    for i, (rows, *_) in enumerate(shapes):
        at = 0
        while at < rows:
            if rows_left == 0:
                stacks.append([])
                rows_left = room
            n = min(rows - at, rows_left)
            stacks[-1].append((i, slice(at, at + n)))
            at, rows_left = at + n, rows_left - n
    return stacks
