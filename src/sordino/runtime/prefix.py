"""Keys and values that stand before every text, in full precision: outlier tokens, later a system prompt.

They belong to the attention modules, not to transformers' cache: the user's ids, masks, positions and cache lengths stay
their own. The keys are rotated to the positions -P … -1, and rotary embedding is relative, so this equals a text that
begins with the prefix. Shapes: B batch, K key heads, P prefix tokens, L queries, S keys, d head size.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sordino.errors import InputError

NAME = "sordino"
KEY, VALUE = "prefix_key", "prefix_value"


def give_prefix(attention: nn.Module, key: Tensor, value: Tensor) -> None:
    """Let an attention module begin with keys and values, [1, K, P, d] each; they become its buffers."""
    attention.register_buffer(KEY, key)
    attention.register_buffer(VALUE, value)


def join(module: nn.Module, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Put a module's prefix, if it has one, before keys and values [B, K, S, d], and let a mask [B, 1, L, S] see it."""
    own: Tensor | None = getattr(module, KEY, None)
    if own is None:
        return key, value, mask
    batch, dtype = key.shape[0], key.dtype
    other: Tensor = getattr(module, VALUE)
    key = torch.cat([own.to(dtype).expand(batch, -1, -1, -1), key], 2)
    value = torch.cat([other.to(dtype).expand(batch, -1, -1, -1), value], 2)
    if mask is not None:
        mask = F.pad(mask, (own.shape[2], 0), value=True if mask.dtype == torch.bool else 0.0)
    return key, value, mask


def prefixed_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    """Attention in transformers' signature, [B, H, L, d] and twice [B, K, S, d] -> [B, L, H, d], with the prefix joined."""
    before = key.shape[2]
    key, value, mask = join(module, key, value, attention_mask)
    length, keys = query.shape[2], key.shape[2]
    if mask is None and keys > before and length > 1:
        # transformers leaves out the mask where plain causal order says it all; torch would align that to the first key.
        mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril(keys - length)[None, None]
    return sdpa_attention_forward(module, query, key, value, mask, **options)


def install(model: Any) -> None:
    """Make a transformers model, whose attention modules have prefixes, use them whatever way it is called.

    Raises:
        InputError: if its rotary angles depend on the length of the text; in a forward, if the attention function was
            changed to one that knows no prefix.
    """
    check_rotary(model.config)
    model.config._attn_implementation = NAME
    for module in [m for m in model.modules() if hasattr(m, KEY)]:
        if _check not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_check)
    decoder = model.get_decoder()
    if _positions not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_positions, with_kwargs=True)


def check_rotary(config: Any) -> None:
    """Refuse rotary angles that depend on the length of the text: keys made beforehand would not fit them.

    Raises:
        InputError: naming the kind.
    """
    options = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for found in [options, *[o for o in options.values() if isinstance(o, dict)]]:
        kind = found.get("rope_type", found.get("type"))
        if kind in ("dynamic", "longrope"):
            raise InputError(f"a prefix cannot stand before a text whose rotary angles depend on its length ('{kind}')")


_KNOWING = {NAME}  # attention functions that join prefixes


def knows_prefix(name: str) -> None:
    """Say that an attention function joins prefixes."""
    _KNOWING.add(name)


def _check(module: Any, *_: Any) -> None:
    if module.config._attn_implementation not in _KNOWING:
        raise InputError(
            f"attention '{module.config._attn_implementation}' would leave out this checkpoint's prefix; "
            f"keep attn_implementation='{NAME}'"
        )


def _positions(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Count the positions of a padded batch from its first real token: the prefix stands right before that one."""
    given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or given.get("position_ids") is not None or bool(mask.all()):
        return None
    ids = given.get("input_ids")
    new = (given["inputs_embeds"] if ids is None else ids).shape[1]
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
    return args, kwargs | {"position_ids": positions}


def read_prefix(folder: Path) -> dict[str, Tensor]:
    """The prefix tensors of a checkpoint, by full name.

    Raises:
        InputError: if it has none.
    """
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            names = [n for n in f.keys() if n.rpartition(".")[2] in (KEY, VALUE)]  # noqa: SIM118
            found |= {name: f.get_tensor(name) for name in names}
    if not found:
        raise InputError(f"{folder} has no prefix")
    return found


def attach(model: Any, tensors: dict[str, Tensor]) -> None:
    """Give a model in full precision the prefix of a checkpoint that was made from it.

    Raises:
        InputError: if it does not fit.
    """
    paths = {n for n, m in model.named_modules() if hasattr(m, "k_proj")}
    found = {n.rpartition(".")[0] for n in tensors}
    if found != paths:
        raise InputError(f"the prefix belongs to {len(found)} attention modules, this model has {len(paths)} or other ones")
    heads = model.config.num_key_value_heads
    for path in sorted(paths):
        module, key, value = model.get_submodule(path), tensors[f"{path}.{KEY}"], tensors[f"{path}.{VALUE}"]
        size = module.k_proj.out_features // heads
        if key.shape[1] != heads or key.shape[3] != size:
            raise InputError(f"the prefix has {key.shape[1]} key heads of {key.shape[3]}, this model {heads} of {size}")
        give_prefix(module, key, value)
    install(model)


ALL_ATTENTION_FUNCTIONS.register(NAME, prefixed_sdpa)
# Without an entry here transformers would make no masks at all for this name.
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
