"""Scales of rounded keys and values, one a head: static ones, or the clip of dynamic ones (PrefixQuant, spec section 4.5).

Values are judged by their own squared error, keys by that of attention's probabilities, under the causal mask and with the
prefix there. Grids are clean: every candidate starts from the same extremes.
Shapes: B windows, H query heads, K key heads, L tokens, P prefix tokens, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sordino.numerics.affine import SHARES, round_scale
from sordino.numerics.kv import KvGrid
from sordino.recipe import KvFormat
from sordino.runtime.attention import round_kv
from sordino.runtime.inner import ATTENTION
from sordino.walk.attention import watched
from sordino.walk.context import Context

_TOKENS = 2048  # on which the candidates are compared
_QUERIES = 512  # of a window, the last ones, whose probabilities judge its keys


def round_block_kv(ctx: Context, fmt: KvFormat) -> dict[str, Any]:
    """Let the block's attention round its keys and values from now on; returns what is worth reporting."""
    attention: Any = ctx.q.get_submodule(ATTENTION)
    grid = KvGrid(fmt.bits, fmt.symmetric, fmt.static)
    heads = ctx.anatomy.key_heads
    if not fmt.searched:
        assert not isinstance(fmt.clip, str)
        share = round_scale(torch.full((heads,), fmt.clip))
        round_kv(attention, grid, share, share.clone())
        ctx.touch("qkv")
        return {}
    windows = max(1, min(ctx.streams["q"].calib, _TOKENS // ctx.stream("q").shape[1]))
    with watched(attention) as seen:
        for _ in ctx.runner("q", "q").inputs("o", 0, windows):
            pass
    key, value = _search_keys(grid, seen), _search_values(grid, seen)
    round_kv(attention, grid, key, value)
    ctx.touch("qkv")
    return {"key_scales": _listed(key), "value_scales": _listed(value)}


Seen = list[tuple[Tensor, Tensor, Tensor]]  # query [B, H, L, d], key and value [B, K, P + L, d]


def _search_values(grid: KvGrid, seen: Seen) -> Tensor:
    """Scales or shares of the values, fp32 [K]."""
    texts = [v[:, :, v.shape[2] - q.shape[2] :].float() for q, _, v in seen]

    def error(share: Tensor) -> Tensor:
        return torch.stack([(grid.fake(v, share) - v).square().sum((0, 2, 3)) for v in texts]).sum(0)

    return _best(grid, texts, error)


def _search_keys(grid: KvGrid, seen: Seen) -> Tensor:
    """Scales or shares of the keys, fp32 [K]."""
    length = seen[0][0].shape[2]
    texts = [k[:, :, k.shape[2] - length :].float() for _, k, _ in seen]
    seen = [(q[:, :, -_QUERIES:], k, v) for q, k, v in seen]
    exact = [_probabilities(q, k.float()) for q, k, _ in seen]

    def error(share: Tensor) -> Tensor:
        total = torch.zeros_like(share)
        for (q, k, _), text, target in zip(seen, texts, exact, strict=True):
            before = k[:, :, : k.shape[2] - length].float()
            p = _probabilities(q, torch.cat([before, grid.fake(text, share)], 2))
            total += (p - target).square().sum((0, 2, 3)).view(len(share), -1).sum(1)
        return total

    return _best(grid, texts, error)


def _probabilities(query: Tensor, key: Tensor) -> Tensor:
    """Attention of [B, H, L, d] to [B, K, P + L, d] under the causal mask, fp32 [B, H, L, P + L]."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.float() @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    length, keys = scores.shape[-2:]
    later = torch.ones(length, keys, dtype=torch.bool).triu(keys - length + 1)
    return torch.softmax(scores.masked_fill(later, float("-inf")), -1)


def _best(grid: KvGrid, texts: list[Tensor], error: Any) -> Tensor:
    """The best of the shares, by head; of equal ones the first."""
    peak = torch.stack([t.abs().amax((0, 2, 3)) for t in texts]).amax(0)
    unit = peak.clamp(min=1e-6) / ((1 << (grid.bits - 1)) - 1) if grid.static else torch.ones_like(peak)
    candidates = [round_scale(unit * share) for share in SHARES]
    errors = torch.stack([error(c) for c in candidates])
    return torch.stack(candidates).gather(0, errors.argmin(0)[None])[0]


def _listed(scales: Tensor) -> list[float]:
    return [round(float(s), 6) for s in scales]
