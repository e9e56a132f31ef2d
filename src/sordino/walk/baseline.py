"""What the guards hold a block against: the same block rounded to nearest in the recipe's own format (DESIGN section 4)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sordino.round.keeping import Keeping
from sordino.round.rtn import RtnSolver
from sordino.rounding import Rounded
from sordino.runtime.attention import carry_attention
from sordino.runtime.inner import ATTENTION
from sordino.runtime.inputs import carry_inputs
from sordino.walk.blocks import BlockFactory
from sordino.walk.context import Context
from sordino.walk.linears import baseline_grid
from sordino.walk.plan import Plan


def rtn_layer(factory: BlockFactory, plan: Plan, ctx: Context) -> tuple[dict[str, Rounded], nn.Module]:
    """The block of a context rounded by RTN, with the scales of inputs, keys and values as they were searched.

    Returns:
        The rounded weights by linear, and the layer that has them.
    """
    layer = factory.assemble(ctx.index, dict(ctx.fp.state_dict()))
    rounded = {}
    for p in plan.linears[ctx.index]:
        if p.group is None:
            continue
        module: Any = layer.get_submodule(p.linear.name)
        solver = Keeping.around(RtnSolver(), p.kept, None)
        made = solver.solve(module.weight.float(), None, baseline_grid(p.format), p.group)
        column = torch.ones(made.codes.shape[1]) if p.column else None
        rounded[p.linear.name] = replace(made.beside(p.side), column=column)
        values = rounded[p.linear.name].values().to(module.weight.dtype)
        module.weight = nn.Parameter(values, requires_grad=False)
        carry_inputs(ctx.q.get_submodule(p.linear.name), module)
    carry_attention(ctx.q.get_submodule(ATTENTION), layer.get_submodule(ATTENTION))
    ctx.put_scales(layer)
    return rounded, layer
