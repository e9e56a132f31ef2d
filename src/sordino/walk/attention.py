"""Causal attention for calibration windows: torch's fused CPU kernel takes 2.5 times as long.

Scores of a tile of queries are formed only against the keys they may see, in fp32 (products of bf16 numbers are exact
there), so nothing is lost against the fused kernel. What it cannot carry (masks, gradients, other dtypes) goes to
transformers' own sdpa path. Shapes: B batch, H query heads, K key heads, L tokens, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sordino.numerics.gram import exact_bf16_products

NAME = "sordino_windows"
_TILE = 128  # queries at once: the scores of one batch element stay in the second-level cache


def window_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    """Attention in transformers' signature: query [B, H, L, d], key and value [B, K, L, d] -> [B, L, H, d]."""
    plain = attention_mask is None and query.dtype == torch.bfloat16 and query.shape[2] == key.shape[2]
    if not plain or torch.is_grad_enabled() or not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    return causal_attention(query, key, value, scaling), None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """``softmax(scaling * q k^T) v`` under a causal mask, bf16 in and out, fp32 scores; see :func:`window_attention`."""
    batch, heads, length, _ = query.shape
    repeats = heads // key.shape[1]
    out = torch.empty(batch, length, heads, value.shape[-1], dtype=value.dtype)
    later = torch.full((_TILE, _TILE), float("-inf")).triu(1)
    with exact_bf16_products():
        for b in range(batch):
            q = query[b].float()
            k = key[b].repeat_interleave(repeats, 0).float().transpose(1, 2)
            v = value[b].repeat_interleave(repeats, 0)
            for i in range(0, length, _TILE):
                j = min(i + _TILE, length)
                scores = torch.bmm(q[:, i:j], k[:, :, :j]).mul_(scaling)
                scores[:, :, i:] += later[: j - i, : j - i]
                out[b, i:j] = torch.bmm(torch.softmax(scores, -1).to(v.dtype), v[:, :j]).transpose(0, 1)
    return out


ALL_ATTENTION_FUNCTIONS.register(NAME, window_attention)
# Without an entry here transformers would make no masks at all for this name.
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
