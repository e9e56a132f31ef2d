"""The small interfaces of the house (DESIGN section 4): grids, solvers, the block context, moves.

``round/`` implements solvers, ``numerics/`` grids, ``walk/`` the block context; moves live one file each in
``protect/``, ``reshape/`` and ``repair/``. Nobody here knows a file or a model.
Shapes: R = out_features, C = in_features, G = groups, T = tokens, L = window length, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from sordino.anatomy import Anatomy, Site
from sordino.errors import InputError
from sordino.numerics.affine import GridParams
from sordino.recipe import Format, MoveSpec

StreamName = Literal["fp", "q"]
Split = Literal["calib", "heldout"]


class Grid(Protocol):
    """Which numbers are allowed."""

    @property
    def bits(self) -> int:
        """Width of a code."""
        ...

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is fixed at ``2^(bits-1)`` and need not be stored."""
        ...

    def fit(self, w: Tensor, diag_h: Tensor | None = None) -> GridParams:
        """Fit one group: fp32 [R, g] (current, error-compensated weights) -> params [R, 1]."""
        ...

    def fit_groups(self, w: Tensor, group: int, diag_h: Tensor | None = None) -> GridParams:
        """Fit all groups at once: fp32 [R, C] -> params [R, C/group]."""
        ...

    def nearest(self, w: Tensor, params: GridParams) -> tuple[Tensor, Tensor]:
        """Nearest codes and their values, fp32 [R, C] each."""
        ...


@dataclass
class Stats:
    """Sums over calibration tokens at one site, unnormalized, so that processes can add them up.

    Attributes:
        tokens: how many tokens were summed.
        h: fp32 [C, C], sum of x x^T over the quantized stream's inputs x.
        d: fp32 [C, C], sum of (x_fp - x) x^T, where asked for.
    """

    tokens: int
    h: Tensor
    d: Tensor | None = None


@dataclass
class Rounded:
    """A rounded weight: codes plus grid.

    Attributes:
        codes: uint8 [R, C].
        scale: fp32 [R, G], numbers that bf16 and fp16 both hold.
        zero: fp32 [R, G], integers.
        bits: width of a code.
        group: columns in a group, C/G.
        symmetric: the zero point is 2^(bits-1) everywhere and not stored.
        notes: what the solver wants to have said (damping raised, dead columns).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group: int
    symmetric: bool
    notes: dict[str, float] = field(default_factory=dict)

    def values(self) -> Tensor:
        """Dequantized weight, fp32 [R, C]."""
        rows, groups = self.scale.shape
        x = self.codes.float().view(rows, groups, -1) - self.zero[..., None]
        return (x * self.scale[..., None]).view(rows, -1)

    def rows(self, span: slice) -> Rounded:
        """Some of the rows; notes go along."""
        return Rounded(self.codes[span], self.scale[span], self.zero[span], self.bits, self.group, self.symmetric, self.notes)


class Solver(Protocol):
    """Rounds weights onto a grid it knows nothing about, in two steps: what depends on the inputs, then the rows.

    Rows of a weight do not depend on each other, so the walk stacks the linears that share an input and cuts what is
    too big: ``prepare`` runs once a site, ``solve`` once a stack of rows.
    """

    needs: frozenset[str]  # of "H", "D"

    def prepare(self, stats: Stats | None, group: int) -> Any:
        """Turn the statistics (which are used up) into what :meth:`solve` wants."""
        ...

    def solve(self, w: Tensor, prepared: Any, grid: Grid, group: int) -> Rounded:
        """Round fp32 [R, C]."""
        ...


class BlockContext(Protocol):
    """What a move sees of the block that is being quantized."""

    index: int
    last: bool
    anatomy: Anatomy
    artifacts: dict[str, Any]  # what the surveys found, by move name
    fp: nn.Module  # the reshaped full-precision twin, read-only
    q: nn.Module  # the transformers layer being quantized

    def rng(self, move: str) -> torch.Generator:
        """Random numbers that depend on (seed, block, move) only."""
        ...

    def run(self, which: StreamName, stream: StreamName, split: Split = "calib") -> Iterator[tuple[slice, Tensor]]:
        """Run the fp or the q block on a stream; yields (windows, output [B, L, D]) batch by batch."""
        ...

    def inputs(self, which: StreamName, site: Site, split: Split = "calib") -> Iterator[tuple[slice, Tensor]]:
        """Inputs of a site on that block's own stream, as the block is now; [B, L, C] batch by batch."""
        ...

    def stats(self, site: Site, kinds: frozenset[str]) -> Stats:
        """Sums over the calibration tokens, of the block as it is now."""
        ...

    def commit(self, linear: str, rounded: Rounded) -> None:
        """Put a rounded weight into the q block."""
        ...

    def touch(self, site: Site) -> None:
        """Say that something at or before ``site`` changed by other means than :meth:`commit`."""
        ...

    def error(self, split: Split = "heldout") -> float:
        """Median over windows of the relative block error against the full-precision stream."""
        ...

    def snapshot(self) -> Any:
        """State of the q block, for :meth:`restore`."""
        ...

    def restore(self, state: Any) -> None:
        """Put back what :meth:`snapshot` took."""
        ...


class Move:
    """A move: every hook is optional, so the base class does nothing.

    Hooks run in the order of the methods below; inside one hook, moves run in recipe order.
    """

    name = "move"
    needs_fp_stream = False  # ask for the full-precision stream on the calibration windows
    needs_survey = False  # ask for one full-precision pass before the walk

    def check(self, fmt: Format, anatomy: Anatomy, target: str | None) -> None:
        """Preflight: raise InputError where the format or the export target cannot carry this move."""

    def survey(self, index: int, block: nn.Module, windows: Iterator[Tensor], artifacts: dict[str, Any]) -> None:
        """See one full-precision block and its inputs [B, L, D] before the walk; leave findings in ``artifacts``."""

    def reshape(self, block: nn.Module, index: int, anatomy: Anatomy, artifacts: dict[str, Any]) -> None:
        """Edit a freshly loaded block without changing its function; twin and block alike."""

    def open(self, ctx: BlockContext) -> None:
        """Before the first site."""

    def before(self, ctx: BlockContext, site: Site) -> None:
        """Before the linears of a site are rounded."""

    def after(self, ctx: BlockContext, site: Site) -> None:
        """After the linears of a site were rounded."""

    def close(self, ctx: BlockContext) -> None:
        """After the last site, before the guard."""

    def finish(self, tensors: dict[str, Tensor], artifacts: dict[str, Any]) -> None:
        """After the walk: may edit what surrounds the blocks (embeddings, final norm, head), by full name."""


MoveFactory = Callable[..., Move]
MOVES: dict[str, MoveFactory] = {}

# Moves of the plan that no code stands behind yet; a recipe that names one is refused by name.
PLANNED = frozenset(
    {"prefix", "system-prompt", "channels", "fuse-norms", "rotate", "smooth", "permute"}
    | {"mean-shift", "low-rank", "clip", "tune", "distill", "scale-search"}
)


def build_moves(specs: tuple[MoveSpec, ...]) -> list[Move]:
    """Instantiate the moves of a recipe.

    Raises:
        InputError: if a move is unknown, not built yet, or refuses its options.
    """
    moves = []
    for spec in specs:
        factory = MOVES.get(spec.move)
        if factory is None:
            known = ", ".join(sorted(MOVES)) or "none yet"
            state = "is planned but not built yet" if spec.move in PLANNED else "is unknown"
            raise InputError(f"move '{spec.move}' {state}; available: {known}")
        try:
            moves.append(factory(**spec.options))
        except TypeError as error:
            raise InputError(f"move '{spec.move}': {error}") from None
    return moves
