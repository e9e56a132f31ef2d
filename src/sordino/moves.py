"""The moves that recipes can name."""

from __future__ import annotations

from collections.abc import Callable

from sordino.contract import Move
from sordino.errors import InputError
from sordino.recipe import MoveSpec
from sordino.repair.distill import Distill
from sordino.repair.mean_shift import MeanShift
from sordino.repair.tune import Tune
from sordino.reshape.rotate import Rotate

MoveFactory = Callable[..., Move]
MOVES: dict[str, MoveFactory] = {m.name: m for m in (Distill, MeanShift, Rotate, Tune)}

# Moves of the plan that no code stands behind yet; a recipe that names one is refused by name.
PLANNED = frozenset({"prefix", "system-prompt", "channels", "smooth", "permute"} | {"low-rank", "clip", "scale-search"})


def build_moves(specs: tuple[MoveSpec, ...]) -> list[Move]:
    """Instantiate the moves of a recipe.

    Raises:
        InputError: if a move is unknown, not built yet, or refuses its options.
    """
    moves = []
    for spec in specs:
        factory = MOVES.get(spec.move)
        if factory is None:
            known = ", ".join(sorted(MOVES))
            state = "is planned but not built yet" if spec.move in PLANNED else "is unknown"
            raise InputError(f"move '{spec.move}' {state}; available: {known}")
        try:
            moves.append(factory(**spec.options))
        except TypeError as error:
            raise InputError(f"move '{spec.move}': {error}") from None
    return moves
