"""How rounding errors travel: vertically through the blocks (of a token), horizontally from token to token.

Our own definitions for what BiSup's abstract names (spec section 1, a reconstruction: the paper's own are not known to us).
Hidden states are compared in the full-precision model's basis. Shapes: N windows, L tokens, D hidden size, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sordino.anatomy import hidden_states
from sordino.contract import Progress
from sordino.measure.activations import hooked
from sordino.measure.evaluate import in_turn
from sordino.numerics.basis import Basis, Dense
from sordino.runtime.modules import stored_basis

MASSIVE = 100.0  # a token whose squared norm exceeds the median token's so many times counts as massive


@dataclass(frozen=True)
class Spread:
    """A relative squared error over tokens.

    Attributes:
        mean: over all tokens.
        ordinary: mean without the massive tokens.
        median: over all tokens.
    """

    mean: float
    ordinary: float
    median: float

    @staticmethod
    def of(errors: Tensor, massive: Tensor) -> Spread:
        """Of errors [T]; massive says which tokens are, bool [T]."""
        kept = errors[~massive]
        return Spread(float(errors.mean()), float(kept.mean()), float(errors.median()))


@dataclass(frozen=True)
class Vertical:
    """Errors along depth; lists are by block.

    Attributes:
        accumulated: behind each block, where all before it are rounded too.
        isolated: of each block alone, on the full-precision stream.
        ratio: accumulated over isolated, of the medians.
        mse: mean squared difference, all tokens.
        cosine: similarity of accumulated and exact hidden states, mean over tokens.
        massive: share of massive tokens.
        single: of some blocks k rounded alone, the median error behind blocks k, k + 1, …
    """

    accumulated: list[Spread]
    isolated: list[Spread]
    ratio: list[float]
    mse: list[float]
    cosine: list[float]
    massive: list[float]
    single: dict[int, list[float]]


def relative_errors(x: Tensor, exact: Tensor) -> Tensor:
    """``|x - exact|^2 / |exact|^2`` of each token, [..., D] -> fp32 [...]."""
    difference = (x.float() - exact.float()).square().sum(-1)
    return difference / exact.float().square().sum(-1).clamp(min=1e-30)


def massive_tokens(exact: Tensor) -> Tensor:
    """Tokens whose squared norm is far above their window's median, [B, L, D] -> bool [B, L]."""
    energy = exact.float().square().sum(-1)
    return energy > MASSIVE * energy.median(-1, keepdim=True).values


def run_blocks(
    model: Any, ids: Tensor, *, feed: Sequence[Tensor] | None = None, put: dict[int, Tensor] | None = None
) -> list[Tensor]:
    """The residual stream [B, L, D], before the first block and behind each, in the model's own basis.

    Args:
        model: a transformers causal language model.
        ids: int64 [B, L].
        feed: what each block gets instead of what the one before it made.
        put: what some blocks, by index, hand on instead of what they made.
    """
    seen: list[Tensor] = []
    put = put or {}

    def before(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        if i == 0:
            seen.append(x)
        if feed is None:
            return None
        return ((feed[i], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": feed[i]})

    def after(i: int, out: Any) -> Any:
        seen.append(put.get(i, hidden_states(out)))
        if i not in put:
            return None
        return (put[i], *out[1:]) if isinstance(out, tuple) else put[i]

    handles = []
    for i, layer in enumerate(model.get_decoder().layers):
        handles.append(layer.register_forward_pre_hook(lambda _, a, k, i=i: before(i, a, k), with_kwargs=True))
        handles.append(layer.register_forward_hook(lambda _, __, out, i=i: after(i, out)))
    with hooked(handles), torch.no_grad():
        model.get_decoder()(input_ids=ids, use_cache=False)
    return seen


def basis_of(model: Any) -> Basis | Dense | None:
    """The rotated basis that a checkpoint's blocks work in."""
    found = getattr(getattr(model.config, "quantization_config", None), "basis", None)
    if found is None:
        return None
    return Basis(**found) if found["signs"] is not None else stored_basis(model.get_decoder().norm)


def last_states(model: Any, ids: Tensor) -> Tensor:
    """Behind the last block, [B, L, D], of ids int64 [B, L]; nothing else is kept."""
    seen: list[Tensor] = []
    last = model.get_decoder().layers[-1]
    with hooked([last.register_forward_hook(lambda _, __, out: seen.append(hidden_states(out)))]), torch.no_grad():
        model.get_decoder()(input_ids=ids, use_cache=False)
    return seen[0]


def vertical(
    exact: Any,
    rounded: Callable[[], AbstractContextManager[Any]],
    windows: Tensor,
    singles: Sequence[int] = (),
    progress: Progress | None = None,
) -> Vertical:
    """Measure along depth.

    Args:
        exact: the full-precision model, with the same prefix as the quantized one.
        rounded: a context that gives the quantized model; it may be ``exact`` itself, changed while the context lasts.
        windows: token ids, int64 [N, L].
        singles: blocks to round alone.
        progress: told (what, done, total).
    """
    found: list[list[list[Tensor]]] = []  # window, block, (accumulated, isolated, massive, mse, cosine)
    alone: dict[int, list[list[Tensor]]] = {k: [] for k in singles}
    for window in in_turn(windows, progress, "depth"):
        target = run_blocks(exact, window[None])
        with rounded() as model:
            chained, apart = _chained_and_apart(model, window[None], target)
        found.append([_figures(*states) for states in zip(target[1:], chained[1:], apart[1:], strict=True)])
        for k in singles:
            behind = run_blocks(exact, window[None], put={k: apart[k + 1]})
            alone[k].append([relative_errors(q, h)[0] for q, h in zip(behind[k + 1 :], target[k + 1 :], strict=True)])
    blocks = [[torch.cat(parts) for parts in zip(*rows, strict=True)] for rows in zip(*found, strict=True)]
    accumulated = [Spread.of(a, m) for a, _, m, _, _ in blocks]
    isolated = [Spread.of(i, m) for _, i, m, _, _ in blocks]
    return Vertical(
        accumulated=accumulated,
        isolated=isolated,
        ratio=[a.median / max(i.median, 1e-30) for a, i in zip(accumulated, isolated, strict=True)],
        mse=[float(e.mean()) for _, _, _, e, _ in blocks],
        cosine=[float(c.mean()) for _, _, _, _, c in blocks],
        massive=[float(m.float().mean()) for _, _, m, _, _ in blocks],
        single={k: [float(torch.cat(parts).median()) for parts in zip(*rows, strict=True)] for k, rows in alone.items()},
    )


def _chained_and_apart(model: Any, ids: Tensor, target: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The quantized model's streams, in the exact one's basis: each block behind the one before, and on the exact stream."""
    basis = basis_of(model)
    if basis is None:
        return run_blocks(model, ids), run_blocks(model, ids, feed=target)
    fed = [basis.apply(h) for h in target]
    chained, apart = ([basis.undo(h) for h in run_blocks(model, ids, feed=f)] for f in (None, fed))
    return chained, apart


def _figures(exact: Tensor, chained: Tensor, apart: Tensor) -> list[Tensor]:
    """Of one window behind one block, [1, L, D] each -> five of [L]."""
    mse = (chained.float() - exact.float()).square().mean(-1)
    cosine = torch.cosine_similarity(chained.float(), exact.float(), dim=-1)
    return [x[0] for x in (relative_errors(chained, exact), relative_errors(apart, exact), massive_tokens(exact), mse, cosine)]
