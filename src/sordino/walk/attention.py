"""Causal attention for whole windows of text, forward and backward.

Without gradients on a CPU with matrix tiles (AMX), torch's fused kernel takes a quarter of the time of what is here; on
others it takes 2.5 times as long, and its gradients cost the same and are less exact, so the rest is ours. Scores of a tile of
queries are formed only against the keys they may see, in fp32 (products of bf16 numbers are exact there). What it cannot
carry (masks, other dtypes) goes to transformers' own sdpa path. Shapes: B batch, H query heads, K key heads, L tokens, P
tokens of a prefix, d head size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sordino.numerics.gram import exact_bf16_products
from sordino.runtime.attention import attend, behind, knows_treatment, treat
from sordino.runtime.kernels import training

NAME = "sordino_windows"
_TILE = 128  # queries at once: the scores of one batch element stay in the second-level cache


def window_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    """Attention in transformers' signature: query [B, H, L, d], key and value [B, K, L, d] -> [B, L, H, d]."""
    if (watcher := getattr(module, "watcher", None)) is not None:
        watcher(treat(module, query, key, value, None)[:3])
    plain = attention_mask is None and query.dtype == torch.bfloat16 and query.shape[2] == key.shape[2]
    if not plain or not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        return attend(module, query, key, value, attention_mask, **options)
    query, key, value, _ = treat(module, query, key, value, None)
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    if has_tiles() and not (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))):
        return fused(query, key, value, scaling), None
    return CausalAttention.apply(query, key, value, scaling), None  # type: ignore[no-untyped-call]


@functools.cache
def has_tiles() -> bool:
    """Whether this CPU multiplies bf16 matrices in tiles, and torch uses them."""
    return torch.cpu._is_amx_tile_supported() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def fused(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """What :class:`CausalAttention` computes, by torch's kernel: [B, H, L, d], twice [B, K, P + L, d] -> [B, L, H, d]."""
    before = key.shape[2] - query.shape[2]
    gqa = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(behind(query, before), key, value, is_causal=True, scale=scaling, enable_gqa=gqa)
    return out[:, :, before:].transpose(1, 2)


@contextmanager
def watched(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Collect what an attention module multiplies: query [B, H, L, d], key and value [B, K, P + L, d] of every call."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    module.watcher = seen.append  # type: ignore[assignment]
    try:
        yield seen
    finally:
        del module.watcher


class CausalAttention(torch.autograd.Function):
    """``softmax(scaling * q k^T) v`` under a causal mask, bf16 in and out; see :func:`window_attention` for shapes.

    Of more keys than queries, the first ones are a prefix that every query sees.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """[B, H, L, d] and twice [B, K, P + L, d] -> [B, L, H, d]."""
        batch, heads, length, _ = query.shape
        before, shared = key.shape[2] - length, (key.shape[1], heads // key.shape[1])
        out = torch.empty(batch, length, heads, value.shape[-1], dtype=value.dtype)
        keep = any(ctx.needs_input_grad[:3])
        tiles = []
        with exact_bf16_products():
            for b in range(batch):
                q, k, v = query[b].float().unflatten(0, shared), key[b].float().transpose(1, 2), value[b]
                for i, j in _tiles(length):
                    scores = torch.bmm(q[:, :, i:j].flatten(1, 2), k[:, :, : before + j]).unflatten(1, (-1, j - i))
                    weights = _weigh(scores, before + i + 1, scaling)
                    seen = torch.bmm(weights.flatten(1, 2), v[:, : before + j])
                    out[b, i:j] = seen.view(heads, j - i, -1).transpose(0, 1)
                    if keep:
                        tiles.append(weights)
        if keep:
            ctx.save_for_backward(query, key, value, out, *tiles)
            ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of query, key and value from that of the output [B, L, H, d]."""
        query, key, value, out, *tiles = ctx.saved_tensors
        grad = grads[0]
        batch, heads, length, size = query.shape
        before, shared = key.shape[2] - length, (key.shape[1], heads // key.shape[1])
        dq = torch.empty_like(query)
        dk, dv = torch.zeros(key.shape), torch.zeros(value.shape)
        inner = (grad.float() * out.float()).sum(-1).transpose(1, 2).unflatten(1, shared)  # [B, K, H / K, L]
        tile = iter(tiles)
        for b in range(batch):
            q, g = query[b].unflatten(0, shared), grad[b].transpose(0, 1).unflatten(0, shared)
            for i, j in _tiles(length):
                seen, weights = before + j, next(tile)
                some_q, some_g, w = q[:, :, i:j].flatten(1, 2), g[:, :, i:j].flatten(1, 2), weights.flatten(1, 2)
                dp, all_share = torch.bmm(some_g, value[b, :, :seen].transpose(1, 2)), inner[b, :, :, i:j].contiguous()
                ds = _weigh_back(dp.view_as(weights), weights, all_share, before + i + 1, ctx.scaling).flatten(1, 2)
                dq[b, :, i:j] = torch.bmm(ds, key[b, :, :seen]).view(heads, j - i, size)
                dk[b, :, :seen] += torch.bmm(ds.transpose(1, 2), some_q)
                dv[b, :, :seen] += torch.bmm(w.transpose(1, 2), some_g)
        return dq, dk.to(key.dtype), dv.to(value.dtype), None


def _tiles(length: int) -> Iterator[tuple[int, int]]:
    """Where tiles of queries begin and end."""
    return ((i, min(i + _TILE, length)) for i in range(0, length, _TILE))


def _weigh(scores: Tensor, first: int, scaling: float) -> Tensor:
    """See :func:`sordino.runtime.kernels.training.weigh`; by torch where the kernels cannot."""
    found = training.weigh(scores, first, scaling)
    if found is not None:
        return found
    later = torch.full(scores.shape[-2:], float("-inf")).triu(first)
    return torch.softmax(scores.mul_(scaling).add_(later), -1).bfloat16()


def _weigh_back(grad: Tensor, weights: Tensor, inner: Tensor, first: int, scaling: float) -> Tensor:
    """Likewise its gradient."""
    found = training.weigh_back(grad, weights, inner, first, scaling)
    return grad.float().sub_(inner[..., None]).mul_(weights).mul_(scaling).to(grad.dtype) if found is None else found


ALL_ATTENTION_FUNCTIONS.register(NAME, window_attention)
# Without an entry here transformers would make no masks at all for this name.
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
knows_treatment(NAME)
