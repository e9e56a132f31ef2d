"""What rounding to a few bits does to the end of a model, one kind of operand at a time.

Weights of one projection in all blocks by round-to-nearest with scale search; the inputs of one site, a symmetric scale a
token, plain and behind a Hadamard matrix; keys and values, a range a token and head. All simulated.
Shapes: N windows, L tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sordino.anatomy import SITES, Anatomy, group_size
from sordino.measure.activations import Progress, hooked
from sordino.numerics.affine import AffineGrid
from sordino.numerics.divergence import token_kl
from sordino.numerics.hadamard import rotation
from sordino.numerics.inputs import fake_encode, token_scale
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


@torch.no_grad()
def rounded_copy(model: Any, anatomy: Anatomy, bits: int, progress: Progress | None = None) -> Any:
    """A copy of a model whose block linears are rounded to nearest, asymmetric, in groups as ``group = "auto"`` takes them."""
    grid, rounded = AffineGrid(bits), copy.deepcopy(model)
    for i in range(anatomy.n_blocks):
        if progress is not None:
            progress("round", i, anatomy.n_blocks)
        for linear in anatomy.linears:
            module = rounded.get_submodule(anatomy.full_name(i, linear.name))
            w = module.weight.float()
            values = grid.nearest(w, grid.fit_groups(w, group_size("auto", linear, linear.name)))[1]
            module.weight = torch.nn.Parameter(values.to(module.weight.dtype), requires_grad=False)
    if progress is not None:
        progress("round", anatomy.n_blocks, anatomy.n_blocks)
    return rounded


@torch.no_grad()
def sensitivities(
    model: Any, rounded: Any, anatomy: Anatomy, windows: Tensor, bits: int, progress: Progress | None = None
) -> list[Sensitivity]:
    """Round one kind of operand after another.

    Args:
        model: in full precision, with the attention function of windows; as before afterwards.
        rounded: by :func:`rounded_copy`.
        anatomy: of both.
        windows: token ids, int64 [N, L].
        bits: of inputs, keys and values.
        progress: told (what, done, total).
    """
    exact = [_hidden(model, w) for w in windows]
    kinds = [linear.name for linear in anatomy.linears]
    cases: list[tuple[str, str, Callable[[], Callable[[], None]]]] = [
        ("weights", name.rpartition(".")[2], lambda name=name: _weights(model, rounded, anatomy, [name]))  # type: ignore[misc]
        for name in kinds
    ]
    cases.append(("weights", "all", lambda: _weights(model, rounded, anatomy, kinds)))
    for turned, what in ((False, "inputs"), (True, "rotated inputs")):
        for site in (*SITES, "all"):
            sites = SITES if site == "all" else (site,)
            cases.append((what, site, lambda s=sites, t=turned: _inputs(model, anatomy, s, bits, t)))  # type: ignore[misc]
    cases.append(("keys and values", "all", lambda: _keys_values(model, bits)))
    rows = []
    for n, (what, where, begin) in enumerate(cases):
        if progress is not None:
            progress("sensitivity", n, len(cases))
        undo = begin()
        try:
            rows.append(Sensitivity(what, where, *_distance(model, windows, exact)))
        finally:
            undo()
    if progress is not None:
        progress("sensitivity", len(cases), len(cases))
    return rows


def _weights(model: Any, rounded: Any, anatomy: Anatomy, names: list[str]) -> Callable[[], None]:
    """Exchange the weights of some projections; doing it again puts them back."""

    def swap() -> None:
        for i in range(anatomy.n_blocks):
            for name in names:
                a, b = (m.get_submodule(anatomy.full_name(i, name)) for m in (model, rounded))
                a.weight, b.weight = b.weight, a.weight

    swap()
    return swap


def _inputs(model: Any, anatomy: Anatomy, sites: tuple[Any, ...], bits: int, turned: bool) -> Callable[[], None]:
    def before(_: Any, args: tuple[Any, ...]) -> tuple[Tensor]:
        x, turn = args[0], rotation(args[0].shape[-1])
        x = turn.apply(x) if turned else x
        x = fake_encode(x, token_scale(x, bits), bits)
        return (turn.apply_transpose(x) if turned else x,)

    handles = [
        model.get_submodule(anatomy.full_name(i, linear.name)).register_forward_pre_hook(before)
        for i in range(anatomy.n_blocks)
        for site in sites
        for linear in anatomy.at(site)
    ]

    def undo() -> None:
        with hooked(handles):
            pass

    return undo


def _keys_values(model: Any, bits: int) -> Callable[[], None]:
    modules = give_kv_grid(model, KvGrid(bits, symmetric=False, static=False))
    return lambda: take_kv_grid(modules)


def give_kv_grid(model: Any, grid: Any) -> list[Any]:
    """Let every attention module round keys and values by a grid; returns the modules."""
    modules = [m for m in model.modules() if hasattr(m, "k_proj")]
    shares = torch.ones(model.config.num_key_value_heads)
    for module in modules:
        round_kv(module, grid, shares, shares)
    return modules


def take_kv_grid(modules: list[Any]) -> None:
    """Undo :func:`give_kv_grid`."""
    for module in modules:
        module.kv_grid = None


def _hidden(model: Any, window: Tensor) -> Tensor:
    """Final hidden states of one window behind the last norm, [L, D]."""
    out: Tensor = model.get_decoder()(input_ids=window[None], use_cache=False).last_hidden_state[0]
    return out


def _distance(model: Any, windows: Tensor, exact: list[Tensor]) -> tuple[float, float]:
    """Median relative error of the final hidden state, mean KL."""
    errors, kl = [], torch.zeros((), dtype=torch.float64)
    for window, target in zip(windows, exact, strict=True):
        hidden = _hidden(model, window)
        errors.append((hidden - target).float().square().sum(-1) / target.float().square().sum(-1).clamp(min=1e-30))
        for ours, theirs in zip(hidden.split(_ROWS), target.split(_ROWS), strict=True):
            log_q, log_p = (torch.log_softmax(model.lm_head(h).float(), -1) for h in (ours, theirs))
            kl += token_kl(log_p, log_q).sum().double()
    return float(torch.cat(errors).median()), float(kl) / windows.numel()
