"""What rounding to a few bits does to the end of a model, one kind of operand at a time.

Weights of one projection in all blocks by round-to-nearest with scale search; the inputs of one site, a symmetric scale a
token, plain and behind a Hadamard matrix; keys and values, a range a token and head. All is simulated, for a while, on the
model itself.
Shapes: N windows, L tokens, D hidden size, V vocabulary, R rows, K columns, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sordino.anatomy import SITES, Anatomy, Linear, group_size
from sordino.contract import Progress
from sordino.measure.activations import hooked
from sordino.measure.evaluate import final_states, in_turn
from sordino.measure.propagation import relative_errors
from sordino.numerics.affine import AffineGrid, GridParams
from sordino.numerics.divergence import token_kl
from sordino.numerics.hadamard import rotation
from sordino.numerics.inputs import InputGrid
from sordino.numerics.kv import KvGrid
from sordino.runtime.attention import round_kv

_ROWS = 256  # positions whose logits are looked at at once


@dataclass(frozen=True)
class Sensitivity:
    """What rounding one kind of operand costs.

    Attributes:
        what: "weights", "inputs", "rotated inputs" or "keys and values".
        where: a projection, a site or "all".
        error: squared distance of the final hidden state relative to it, median over tokens.
        kl: to full precision, nats a token.
    """

    what: str
    where: str
    error: float
    kl: float


@dataclass(frozen=True)
class RoundedWeights:
    """Weights on a grid, a byte each: a second copy of the model would be what limits its size.

    Attributes:
        grid: which numbers they are.
        parts: by full name of the linear, codes uint8 [R, K] and grid parameters [R, G].
    """

    grid: AffineGrid
    parts: dict[str, tuple[Tensor, GridParams]]

    def values(self, name: str) -> Tensor:
        """The rounded weight of a linear, fp32 [R, K]."""
        codes, params = self.parts[name]
        return self.grid.values(codes.float(), params)


@torch.no_grad()
def round_weights(model: Any, anatomy: Anatomy, bits: int, progress: Progress | None = None) -> RoundedWeights:
    """Round the linears of all blocks to nearest, asymmetric, in groups as ``group = "auto"`` takes them."""
    grid, parts = AffineGrid(bits), {}
    for i in in_turn(range(anatomy.n_blocks), progress, "round"):
        for linear in anatomy.linears:
            name = anatomy.full_name(i, linear.name)
            w = model.get_submodule(name).weight.float()
            params = grid.fit_groups(w, group_size("auto", linear, name))
            parts[name] = grid.codes(w, params).to(torch.uint8), params
    return RoundedWeights(grid, parts)


def names_of(anatomy: Anatomy, linears: Iterable[Linear]) -> list[str]:
    """Full names of linears in all blocks."""
    return [anatomy.full_name(i, linear.name) for linear in linears for i in range(anatomy.n_blocks)]


@contextmanager
def with_weights(model: Any, rounded: RoundedWeights, names: Iterable[str]) -> Iterator[Any]:
    """Let linears of a model, by their full names, multiply with rounded weights; gives the model."""
    modules = {name: model.get_submodule(name) for name in names}
    for name, module in modules.items():
        module.forward = partial(_multiply, module, partial(rounded.values, name))
    try:
        yield model
    finally:
        for module in modules.values():
            del module.forward


def _multiply(module: Any, weight: Callable[[], Tensor], x: Tensor) -> Tensor:
    return F.linear(x, weight().to(x.dtype), module.bias)


@contextmanager
def with_inputs(model: Any, change: Callable[[Tensor], Tensor], names: Iterable[str]) -> Iterator[None]:
    """Change what linears of a model, by their full names, get: [B, L, K] to the same."""
    with hooked([model.get_submodule(n).register_forward_pre_hook(lambda _, args: (change(args[0]),)) for n in names]):
        yield


@contextmanager
def with_kv(model: Any, grid: Any) -> Iterator[None]:
    """Let every attention module round keys and values by a grid, whose ``fake`` is all that is asked for."""
    modules = [m for m in model.modules() if hasattr(m, "k_proj")]
    shares = torch.ones(model.config.num_key_value_heads)
    for module in modules:
        round_kv(module, grid, shares, shares)
    try:
        yield
    finally:
        for module in modules:
            module.kv_grid = None


def kv_grid(bits: int) -> KvGrid:
    """A range a token and head."""
    return KvGrid(bits, symmetric=False, static=False)


def round_tokens(x: Tensor, bits: int, turned: bool = False) -> Tensor:
    """X [..., K] rounded by one symmetric scale a token; turned: behind a Hadamard matrix, and turned back."""
    turn = rotation(x.shape[-1])
    x = turn.apply(x) if turned else x
    x = InputGrid(bits).fake(x, 1.0)
    return turn.apply_transpose(x) if turned else x


@torch.no_grad()
def sensitivities(
    model: Any, rounded: RoundedWeights, anatomy: Anatomy, windows: Tensor, bits: int, progress: Progress | None = None
) -> list[Sensitivity]:
    """Round one kind of operand after another.

    Args:
        model: in full precision, with an attention function of ours; as before afterwards.
        rounded: its weights, by :func:`round_weights`.
        anatomy: of it.
        windows: token ids, int64 [N, L].
        bits: of inputs, keys and values.
        progress: told (what, done, total).
    """
    exact = [final_states(model, w) for w in windows]
    rows = []
    for what, where, case in in_turn(_cases(model, rounded, anatomy, bits), progress, "sensitivity"):
        with case():
            rows.append(Sensitivity(what, where, *_distance(model, windows, exact)))
    return rows


def _cases(
    model: Any, rounded: RoundedWeights, anatomy: Anatomy, bits: int
) -> list[tuple[str, str, Callable[[], AbstractContextManager[Any]]]]:
    """What is rounded, where, and a context in which it is."""
    kinds = {x.name.rpartition(".")[2]: [x] for x in anatomy.linears} | {"all": list(anatomy.linears)}
    sites = {str(site): list(anatomy.at(site)) for site in SITES} | {"all": list(anatomy.linears)}
    cases: list[tuple[str, str, Callable[[], AbstractContextManager[Any]]]] = [
        ("weights", where, partial(with_weights, model, rounded, names_of(anatomy, linears)))
        for where, linears in kinds.items()
    ]
    for turned, what in ((False, "inputs"), (True, "rotated inputs")):
        change = partial(round_tokens, bits=bits, turned=turned)
        cases += [(what, where, partial(with_inputs, model, change, names_of(anatomy, x))) for where, x in sites.items()]
    return [*cases, ("keys and values", "all", partial(with_kv, model, kv_grid(bits)))]


def _distance(model: Any, windows: Tensor, exact: list[Tensor]) -> tuple[float, float]:
    """Median relative error of the final hidden state, mean KL."""
    errors, kl = [], torch.zeros((), dtype=torch.float64)
    for window, target in zip(windows, exact, strict=True):
        hidden = final_states(model, window)
        errors.append(relative_errors(hidden, target))
        for ours, theirs in zip(hidden.split(_ROWS), target.split(_ROWS), strict=True):
            log_q, log_p = (torch.log_softmax(model.lm_head(h).float(), -1) for h in (ours, theirs))
            kl += token_kl(log_p, log_q).sum().double()
    return float(torch.cat(errors).median()), float(kl) / windows.numel()
