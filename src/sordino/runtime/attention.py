"""What Sordino does inside attention, registered with transformers under one name.

In this order: keys lose their mean (reshape/center.py), queries and keys are rotated (R3, after the rotary embedding), keys
and values rounded as the cache stores them, the prefix put in front. With a packed cache (runtime/cache.py) keys and values
come out of it centered, rotated and rounded.
Shapes: B batch, H query heads, K key heads, L queries, S keys, P prefix tokens, d head size.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sordino.errors import InputError
from sordino.numerics.hadamard import Rotation, rotation
from sordino.numerics.kv import KvGrid
from sordino.runtime.cache import enter
from sordino.runtime.kernels.rows import placed, rotate
from sordino.runtime.prefix import KEY, check_rotary, give_prefix, join

NAME = "sordino"
KEY_SCALE, VALUE_SCALE = "key_scale", "value_scale"
KEY_MEAN = "key_mean"


def rotate_keys(attention: Any) -> None:
    """Let an attention module rotate queries and keys of each head by a Hadamard matrix (R3): their products stay."""
    attention.key_rotation = rotation(attention.head_dim)


def center_keys(attention: nn.Module, mean: Tensor) -> None:
    """Let an attention module take a mean [K, d], a buffer from now on, off its keys: softmax does not see what they share."""
    attention.register_buffer(KEY_MEAN, mean)


def turned_queries(module: nn.Module, query: Tensor) -> Tensor:
    """Queries [B, H, L, d] rotated as the keys are (R3)."""
    turn: Rotation | None = getattr(module, "key_rotation", None)
    return query if turn is None else rotate(turn, query)


def placed_keys(module: nn.Module, key: Tensor) -> Tensor:
    """Keys [B, K, S, d] as they are rounded: behind the rotary embedding, without their mean, rotated (R3)."""
    return placed(getattr(module, KEY_MEAN, None), getattr(module, "key_rotation", None), key)


def round_kv(attention: Any, grid: KvGrid, key: Tensor, value: Tensor) -> None:
    """Let an attention module round its keys and values.

    Args:
        attention: the module.
        grid: bits and kind.
        key: fp32 [K], scales or shares of the keys, see :meth:`KvGrid.fit`; a buffer from now on.
        value: of the values.
    """
    attention.kv_grid = grid
    attention.register_buffer(KEY_SCALE, key)
    attention.register_buffer(VALUE_SCALE, value)


def carry_attention(old: Any, new: Any) -> None:
    """Let an attention module treat keys and values as another one does."""
    if getattr(old, "kv_grid", None) is not None:
        round_kv(new, old.kv_grid, getattr(old, KEY_SCALE), getattr(old, VALUE_SCALE))


def treat(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Center, rotate, round, put the prefix in front: query [B, H, L, d], key and value [B, K, S, d], mask [B, 1, L, S]."""
    grid: KvGrid | None = getattr(module, "kv_grid", None)
    packed = grid is not None and getattr(module, "packed_cache", False)
    query = turned_queries(module, query)
    key = key if packed else placed_keys(module, key)
    if grid is not None and not packed:
        trained = getattr(module, "trained_scales", {})
        shares = [trained[n]() if n in trained else module.get_buffer(n) for n in (KEY_SCALE, VALUE_SCALE)]
        key, value = grid.fake(key, shares[0]), grid.fake(value, shares[1], getattr(module, "moving_values", False))
    return query, *join(module, key, value, mask)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    """Attention in transformers' signature, [B, H, L, d] and twice [B, K, S, d] -> [B, L, H, d]."""
    before = key.shape[2]
    query, key, value, mask = treat(module, query, key, value, attention_mask)
    length, keys = query.shape[2], key.shape[2]
    if mask is None and keys > before and length > 1:
        # transformers leaves out the mask where plain causal order says it all; torch would align that to the first key.
        earlier = keys - length
        if earlier <= length:
            out, weights = sdpa_attention_forward(module, behind(query, earlier), key, value, None, **options)
            return out[:, earlier:], weights
        make = _causal if length * keys <= _SMALL else _causal.__wrapped__
        mask = make(length, keys, query.dtype, query.device)
    return sdpa_attention_forward(module, query, key, value, mask, **options)


def behind(query: Tensor, earlier: int) -> Tensor:
    """Queries [B, H, L, d] behind rows for the keys before them, [B, H, earlier + L, d]: causal order without a mask.

    What those rows see is to be dropped. Torch leaves out what causal order hides; a mask makes it look at everything.
    """
    return F.pad(query, (0, 0, earlier, 0)) if earlier else query


_SMALL = 1 << 22  # entries of a mask that is worth keeping for the next layer


@lru_cache(maxsize=1)
def _causal(length: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to scores of the last ``length`` of so many tokens, [1, 1, length, keys]: zero, or minus infinity."""
    with torch.inference_mode(False):
        return torch.full((length, keys), -torch.inf, dtype=dtype, device=device).triu(keys - length + 1)[None, None]


def install(model: Any) -> None:
    """Make a transformers model, whose attention modules have something of ours, use it whatever way it is called.

    Raises:
        InputError: if there is a prefix and the rotary angles depend on the length of the text; in a forward, if the attention
            function was changed to another one.
    """
    model.config._attn_implementation = NAME
    for module in [m for m in model.modules() if hasattr(m, "k_proj")]:
        if _check not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_check)
        if getattr(module, "kv_grid", None) is not None and enter not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(enter, with_kwargs=True)
    decoder = model.get_decoder()
    if any(hasattr(m, KEY) for m in model.modules()):
        check_rotary(model.config)
        if _positions not in decoder._forward_pre_hooks.values():
            decoder.register_forward_pre_hook(_positions, with_kwargs=True)


@torch.no_grad()
def attach(model: Any, ids: list[int]) -> None:
    """Put tokens before every text of a model that has no prefix and rounds no keys; it makes their keys and values itself.

    Raises:
        InputError: if it has one, or rounds or rotates keys, or lacks a token.
    """
    layers = [m for m in model.modules() if hasattr(m, "k_proj")]
    if any(map(_treated, layers)):
        raise InputError("the model treats its keys and values already; a prefix is put before plain models only")
    if max(ids) >= model.config.vocab_size:
        raise InputError(f"the prefix has the token {max(ids)}, this model's vocabulary ends at {model.config.vocab_size - 1}")
    check_rotary(model.config)
    cache = DynamicCache()
    places = torch.arange(-len(ids), 0, device=model.device)[None]
    tokens = torch.tensor([ids], device=model.device)
    model.get_decoder()(input_ids=tokens, position_ids=places, past_key_values=cache, use_cache=True)
    for module in layers:
        made = cache.layers[module.layer_idx]
        give_prefix(module, made.keys, made.values)
    install(model)


_KNOWING = {NAME}  # attention functions that call `treat`


def knows_treatment(name: str) -> None:
    """Say that an attention function calls :func:`treat`."""
    _KNOWING.add(name)


def does_all_of(name: str, modules: list[Any]) -> bool:
    """Whether an attention function is torch's or the one here, and leaves out nothing that is ours of these modules."""
    return name == NAME or (name == "sdpa" and not any(map(_treated, modules)))


def _treated(module: Any) -> bool:
    """Whether :func:`treat` has something to do."""
    return any(getattr(module, name, None) is not None for name in (KEY, "key_rotation", KEY_MEAN, "kv_grid"))


def _check(module: Any, *_: Any) -> None:
    if module.config._attn_implementation not in _KNOWING:
        raise InputError(
            f"attention '{module.config._attn_implementation}' leaves out this checkpoint's prefix, rotation or KV rounding; "
            f"keep attn_implementation='{NAME}'"
        )


def _positions(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Count the positions of a padded batch from its first real token: the prefix stands right before that one."""
    given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments if args else kwargs
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or given.get("position_ids") is not None or bool(mask.all()):
        return None
    ids = given.get("input_ids")
    new = (given["inputs_embeds"] if ids is None else ids).shape[1]
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
    return args, kwargs | {"position_ids": positions}


OWN_HOOKS = (_check, enter)

ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
# Without an entry here transformers would make no masks at all for this name.
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
