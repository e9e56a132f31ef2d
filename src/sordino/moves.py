"""The moves that recipes can name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from sordino.contract import Move
from sordino.errors import InputError, nearest
from sordino.protect.channels import Channels
from sordino.protect.prefix import Prefix
from sordino.recipe import MoveSpec
from sordino.repair.distill import Distill
from sordino.repair.mean_shift import MeanShift
from sordino.repair.tune import Tune
from sordino.reshape.center import Center
from sordino.reshape.learn_rotations import LearnRotations
from sordino.reshape.rotate import Rotate
from sordino.reshape.rotate_inner import RotateInner
from sordino.reshape.smooth import Smooth

MoveFactory = Callable[..., Move]
MOVES: dict[str, MoveFactory] = {
    m.name: m for m in (Center, Channels, Distill, LearnRotations, MeanShift, Prefix, Rotate, RotateInner, Smooth, Tune)
}

# What the field calls a move of its own, and is something else here.
_ELSEWHERE = {
    "low-rank": "is an option of 'tune': rank",
    "clip": "is an option of 'tune': clips",
    "permute": "is called 'channels'",
    "scale-search": "is part of every grid: format.weights.search",
}


def build_moves(specs: tuple[MoveSpec, ...]) -> list[Move]:
    """Instantiate the moves of a recipe.

    Raises:
        InputError: if a move is unknown, or refuses its options.
    """
    moves: list[Move] = []
    for place, spec in enumerate(specs):
        factory = MOVES.get(spec.move)
        if factory is None:
            known = ", ".join(sorted(MOVES))
            raise InputError(f"move '{spec.move}' {_ELSEWHERE.get(spec.move, 'is unknown')}; available: {known}")
        move = factory(**_options(spec, factory))
        move.turn = sum(earlier.move == spec.move for earlier in specs[: place + 1])
        moves.append(move)
    return moves


def _options(spec: MoveSpec, factory: MoveFactory) -> dict[str, Any]:
    """The options of a move, checked against the annotations of its ``__init__``."""
    init: Any = factory.__init__
    hints = get_type_hints(init, include_extras=True) if init is not object.__init__ else {}
    defaults = {n: p.default for n, p in inspect.signature(init).parameters.items()}
    fields: dict[str, Any] = {n: (hints[n], defaults[n]) for n in hints if n != "return"}
    try:
        checked = create_model(spec.move, __config__=ConfigDict(extra="forbid"), **fields)(**spec.options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            hint = nearest(key, fields, f"it has {', '.join(fields) or 'none'}")
            raise InputError(f"move '{spec.move}' has no option '{key}'{hint}") from None
        what = first["msg"][0].lower() + first["msg"][1:]
        raise InputError(f"move '{spec.move}': {key}: {what} (got {first['input']!r})") from None
    return {n: getattr(checked, n) for n in fields}
