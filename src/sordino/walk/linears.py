"""How each linear is stored, and the solver and grid that make it so: the part of a plan that is about single linears."""

from __future__ import annotations

from dataclasses import dataclass

from sordino.anatomy import Anatomy, Linear, group_size
from sordino.errors import InputError
from sordino.numerics.additive import AdditiveGrid, DualScaleGrid
from sordino.numerics.affine import AffineGrid
from sordino.numerics.inputs import InputGrid
from sordino.numerics.packing import packed_words
from sordino.recipe import ActivationFormat, Gptaq, Gptq, Recipe, Rtn, WeightFormat
from sordino.round.gptq import GptqSolver
from sordino.round.rtn import RtnSolver
from sordino.rounding import Grid, Solver


@dataclass(frozen=True)
class LinearPlan:
    """How one linear is stored.

    Attributes:
        linear: its place in a block.
        name: in the whole model.
        format: of its weight, resolved.
        group: columns that share a scale; None: left in full precision.
        inputs: channels of its input that share a scale; None: all of a token.
        kept: its last input channels, at 8 bits.
        side: rank of a pair beside it.
        column: whether its column scale is stored with it, because no linear before it can take it over.
    """

    linear: Linear
    name: str
    format: WeightFormat
    group: int | None
    inputs: int | None = None
    kept: int = 0
    side: int = 0
    column: bool = False

    @property
    def bits_stored(self) -> int:
        """Stored bits of codes, scales, zeros, kept columns, their order, a pair, a column scale; not the own bias."""
        rows, cols = self.linear.out_features, self.linear.in_features
        if self.group is None:
            return rows * cols * 16
        groups, b = cols // self.group, self.format.bits
        codes = rows * packed_words(cols, b) * 32 + self.side * (rows + cols) * 16 + self.column * cols * 16
        if self.kept:
            codes += rows * (packed_words(self.kept, 8) * 32 + 16) + cols * 32
        if self.format.grid == "additive":
            return codes + rows * groups * b * 16
        zeros = 0 if self.format.symmetric else packed_words(rows, b) * 32 * groups
        return codes + rows * groups * 16 + zeros


def plan_block(
    index: int, anatomy: Anatomy, recipe: Recipe, span: tuple[int, int], kept: int = 0, side: int = 0
) -> tuple[LinearPlan, ...]:
    """Formats of a block's linears, in site order.

    Args:
        index: of the block.
        anatomy: where its linears are.
        recipe: what to do.
        span: first and last-plus-one block to quantize.
        kept: input channels of every linear that stay at 8 bits.
        side: rank of a pair beside every linear.

    Raises:
        InputError: if a linear cannot be stored as asked.
    """
    plans = []
    for linear in anatomy.linears:
        name = anatomy.full_name(index, linear.name)
        fmt = recipe.format.weights.resolve(name)
        chosen = span[0] <= index < span[1] and fmt.bits != 16
        column = chosen and fmt.column_scale and linear.name not in anatomy.absorbable()
        if chosen and fmt.column_scale and side:
            raise InputError(f"{name}: a column scale and a pair at the side (side) do not go together; leave one out")
        if column and recipe.format.activations.rounded:
            raise InputError(
                f"{name}: no linear before it can take over a column scale, only {', '.join(anatomy.absorbable())} have one; "
                "stored by itself it goes with plain inputs"
            )
        if chosen and _by_output(fmt) and (fmt.grid != "affine" or fmt.column_scale):
            raise InputError(f'{name}: solver search="output" is for affine grids without a column scale; use "weight"')
        if chosen and fmt.column_scale and recipe.format.activations.static:
            raise InputError(f"{name}: a column scale would change the input behind its static scale; set one of them off")
        group = group_size(fmt.group, linear, name) if chosen else None
        if group is not None and kept:
            _check_kept(fmt, linear, name, kept)
        inputs = _input_group(recipe.format.activations, linear, name)
        more = (kept, side) if group is not None else (0, 0)
        plans.append(LinearPlan(linear, name, fmt, group, inputs, *more, column))
    return tuple(plans)


def _check_kept(fmt: WeightFormat, linear: Linear, name: str, kept: int) -> None:
    if fmt.column_scale or isinstance(fmt.solver, Gptaq) or _by_output(fmt):
        raise InputError(f"{name}: kept channels go with the solvers rtn and gptq, without column scales")
    if 2 * kept >= linear.in_features:
        raise InputError(f"{name}: {kept} kept channels of {linear.in_features}; keep fewer than half")


def _input_group(fmt: ActivationFormat, linear: Linear, name: str) -> int | None:
    if fmt.group == "token" or not fmt.rounded:
        return None
    size = group_size(fmt.group, linear, f"{name} (format.activations)")
    return None if size == linear.in_features else size


def input_grid(fmt: ActivationFormat, group: int | None) -> InputGrid:
    """What inputs are rounded to, by groups of channels or None."""
    return InputGrid(fmt.bits, fmt.static, group, fmt.symmetric)


def make_solver(fmt: WeightFormat) -> Solver:
    """The solver of a weight format."""
    options = fmt.solver
    if isinstance(options, Gptq):
        alpha = options.alpha if isinstance(options, Gptaq) else 0.0
        whole = isinstance(options, Gptaq) and options.target == "whole"
        return GptqSolver(
            options.damp, options.order, options.static_groups, alpha, options.weighted, whole, options.refit, options.cap
        )
    return RtnSolver(options.search == "output")


def make_grid(fmt: WeightFormat) -> Grid:
    """The grid of a weight format."""
    if fmt.grid == "additive":
        return AdditiveGrid(fmt.bits, fmt.column_scale)
    base = AffineGrid(fmt.bits, fmt.symmetric, 0 if _by_output(fmt) else fmt.search)
    return DualScaleGrid(base) if fmt.column_scale else base


def _by_output(fmt: WeightFormat) -> bool:
    return isinstance(fmt.solver, Rtn) and fmt.solver.search == "output"


def baseline_grid(fmt: WeightFormat) -> Grid:
    """The grid that the guards' baseline rounds to: as stored, with the default search, without a column scale."""
    return AdditiveGrid(fmt.bits, column=False) if fmt.grid == "additive" else AffineGrid(fmt.bits, fmt.symmetric)
