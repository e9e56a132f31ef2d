"""Decoder layers over many tokens: linears and attention are the modules' own, what is between them is the kernels'.

Norms with the residual sum before them, rotary embedding and SiLU are one pass over memory each, where torch makes some
twenty. They round to the model's dtype where torch's operations do. Shapes: B batch, S tokens, D hidden size, d head size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sordino.runtime.cache import enter
from sordino.runtime.kernels import library, rows
from sordino.runtime.kernels.linear import unwritten

Norms = tuple[library.Norm, library.Norm, library.Norm, library.Norm]  # before attention, before the MLP, of queries, of keys


def run(layers: list[Any], norms: list[Norms], x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
    """What the layers make of x [B, S, D]: [B, S, D], before the final norm.

    Args:
        layers: decoder layers of a known family (block.py).
        norms: of each.
        x: embedded tokens.
        cos: [B or 1, S, d], of the tokens' places.
        sin: likewise.
        mask: as transformers makes it for attention, None for causal order.
        cache: for new keys and values; None for none.
    """
    added: Tensor | None = None
    for layer, (before, between, query, key) in zip(layers, norms, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        x, h = rows.norm(before, x, added)
        seen = _attend(attention, query, key, h, cos, sin, mask, cache)
        x, h = rows.norm(between, x, _linear(attention.o_proj, seen))
        with unwritten(h):
            gate, up = _linear(mlp.gate_proj, h), _linear(mlp.up_proj, h)
        added = _linear(mlp.down_proj, rows.glu(gate, up))
    return x if added is None else x + added


def _linear(module: Any, x: Tensor) -> Tensor:
    """A linear's output in the dtype of its input [..., C]: what others have put there may give another one."""
    out: Tensor = module(x)
    return out.to(x.dtype)


def _attend(
    attention: Any, query: library.Norm, key: library.Norm, h: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Any
) -> Tensor:
    texts, tokens, size = h.shape[0], h.shape[1], attention.head_dim
    with unwritten(h):
        q, k, v = (_linear(m, h) for m in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k = rows.place(query, q, cos, sin, size), rows.place(key, k, cos, sin, size)
    v = v.view(texts, tokens, -1, size).transpose(1, 2)
    if getattr(attention, "kv_grid", None) is not None:
        enter(attention, (), {"past_key_values": cache})
    if cache is not None:
        k, v = cache.update(k, v, attention.layer_idx)
    # Calling the attention function where the module would: hooks of it are looked at by block.py.
    function = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    seen: Tensor = function(attention, q, k, v, mask, dropout=0.0, scaling=attention.scaling)[0]
    return seen.reshape(texts, tokens, -1)
