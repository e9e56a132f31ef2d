"""Decoder layers over many tokens: linears and attention are the modules' own, what is between them is the kernels'.

Norms with the residual sum before them, rotary embedding and SiLU are one pass over memory each, where torch makes some
twenty. They round to the model's dtype where torch's operations do. Shapes: B batch, S tokens, D hidden size, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sordino.runtime.attention import placed_keys, turned_queries
from sordino.runtime.cache import enter
from sordino.runtime.kernels import library, rows
from sordino.runtime.kernels.linear import unwritten

Norms = tuple[library.Norm, library.Norm, library.Norm, library.Norm]  # before attention, before the MLP, of queries, of keys
# What an attention module makes of its queries [B, H, S, d], keys and values [B, K, S, d]: [B, S, H, d].
Seen = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def run(layers: list[Any], norms: list[Norms], x: Tensor, cos: Tensor, sin: Tensor, seen: Seen) -> Tensor:
    """What the layers make of x [B, S, D]: [B, S, D], before the final norm.

    Args:
        layers: decoder layers of a known family (block.py).
        norms: of each.
        x: embedded tokens.
        cos: [B or 1, S, d], of the tokens' places.
        sin: likewise.
        seen: attention: :func:`by_torch` or :func:`by_rows`.
    """
    added: Tensor | None = None
    for layer, (before, between, query, key) in zip(layers, norms, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        x, h = rows.norm(before, x, added)
        q, k, v = _project(attention, query, key, h, cos, sin)
        x, h = rows.norm(between, x, _linear(attention.o_proj, seen(attention, q, k, v).flatten(2)))
        with unwritten(h):
            gate, up = _linear(mlp.gate_proj, h), _linear(mlp.up_proj, h)
        added = _linear(mlp.down_proj, rows.glu(gate, up))
    return x if added is None else x + added


def _linear(module: Any, x: Tensor) -> Tensor:
    """A linear's output in the dtype of its input [..., C]: what others have put there may give another one."""
    out: Tensor = module(x)
    return out.to(x.dtype)


def _project(
    attention: Any, query: library.Norm, key: library.Norm, h: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values behind norms and the rotary embedding."""
    size = attention.head_dim
    with unwritten(h):
        q, k, v = (_linear(m, h) for m in (attention.q_proj, attention.k_proj, attention.v_proj))
    v = v.view(*h.shape[:2], -1, size).transpose(1, 2)
    return rows.place(query, q, cos, sin, size), rows.place(key, k, cos, sin, size), v


def by_torch(mask: Tensor | None, cache: Any) -> Seen:
    """Attention as the module's own function makes it; new keys and values go to the cache, if there is one.

    Args:
        mask: as transformers makes it, None for causal order.
        cache: transformers' cache, or None.
    """

    def seen(attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if getattr(attention, "kv_grid", None) is not None:
            enter(attention, (), {"past_key_values": cache})
        if cache is not None:
            k, v = cache.update(k, v, attention.layer_idx)
        # Calling the function where the module would: hooks of it are looked at by known.py.
        function = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
        found: Tensor = function(attention, q, k, v, mask, dropout=0.0, scaling=attention.scaling)[0]
        return found

    return seen


def by_rows(blocks: Any, first: Tensor | None, cache: Any) -> Seen:
    """Attention as the kernels make it over the rows of the cache, without unpacking them.

    Args:
        blocks: what the kernels know of attention in every layer (known.py).
        first: int64 [B], how many tokens of padding stand before each text; None: none.
        cache: transformers' cache; None where nothing is rounded on its way in.
    """

    def seen(attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = turned_queries(attention, q)
        if getattr(attention, "kv_grid", None) is not None:
            enter(attention, (), {"past_key_values": cache})
            length, k, v = cache.layers[attention.layer_idx].append(k, v)
        else:
            if cache is not None:
                k, v = cache.update(k, v, attention.layer_idx)
            length, k, v = k.shape[2], placed_keys(attention, k).contiguous(), v.contiguous()
        found = rows.attend(blocks[attention.layer_idx], q, k, v, length, first)
        assert found is not None  # known.py has looked
        return found

    return seen
