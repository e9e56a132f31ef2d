"""A forward for decoders of known families that leaves as little as possible to single torch operations.

It looks whether everything is as the kernels know it (known.py): no hook of anybody else's, nothing asked but the last hidden
state. While text is being decoded (one new token of a few texts, a cache that grows) all layers are one native call: norms,
linears, rotary embedding, R3, R4, the rounding of inputs, the cache's new rows and attention over them, the prefix included
(kernels/block.h); embedding, rotary angles and the final norm stay torch's. Prompts and larger batches are one call, too, where
all linears multiply codes with codes and the cache is packed; others go through layers.py.
Everything else takes transformers' own forward. All round at the same places.

The layers are looked at when the first token of a text is decoded, since that takes longer than the token's products: what is
changed in the middle of a text counts from the next one. ``SORDINO_ONE_CALL=off`` switches all this off.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from sordino.runtime import layers
from sordino.runtime.cache import PackedLayer, RoomyLayer, enter
from sordino.runtime.kernels import library
from sordino.runtime.kernels.linear import FEW_ROWS, traced
from sordino.runtime.known import FAMILIES, Known

VARIABLE = "SORDINO_ONE_CALL"
FEW_TEXTS = 4  # kMaxRows of kernels.h
LONG = 1024  # tokens from which torch's attention in half precision is faster than kernels without products of bf16
_LAYERS = {f"{family}DecoderLayer" for family in FAMILIES}

_on = os.environ.get(VARIABLE) != "off"


@contextmanager
def one_call(on: bool) -> Iterator[None]:
    """Allow or forbid the call for the body."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


def decode_in_one_call(decoder: Any) -> None:
    """Give the decoder of a model, if its layers are of a known family, the forward described above."""
    plain = type(decoder).forward

    @wraps(plain)  # others look at its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = None if args or traced() else _forward(self, **kwargs)
        return plain(self, *args, **kwargs) if out is None else out

    if all(type(layer).__name__ in _LAYERS for layer in decoder.layers):
        decoder.forward = MethodType(forward, decoder)


def _forward(
    decoder: Any,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **others: Any,
) -> BaseModelOutputWithPast | None:
    """The kernels' forward; None if they cannot do what is asked."""
    ids, cache, config = input_ids, past_key_values, decoder.config
    if ids is None or inputs_embeds is not None or not _on or library.active() is None or decoder.training:
        return None
    if not _plain_request(decoder, attention_mask, others):
        return None
    if use_cache is None:
        use_cache = config.use_cache
    if cache is None and use_cache:
        cache = DynamicCache(config=config)
    if cache is not None and (type(cache) is not DynamicCache or not use_cache):
        return None
    out = None
    seen = _Seen.by(attention_mask, position_ids)
    if ids.shape[1] == 1 and ids.shape[0] <= FEW_TEXTS and use_cache and seen is not None:
        out = _step(decoder, ids, position_ids, cache, seen)
    if out is None:
        out = _whole(decoder, ids, attention_mask, position_ids, cache, seen)
    return None if out is None else BaseModelOutputWithPast(last_hidden_state=decoder.norm(out), past_key_values=cache)


def _plain_request(decoder: Any, mask: Any, others: dict[str, Any]) -> bool:
    """Whether nothing is wanted but last hidden states, causal, of all layers, without gradients, in the model's own dtype."""
    config = decoder.config
    if _global_forward_hooks or _global_forward_pre_hooks:  # they want to see every module
        return False
    if others.get("is_causal") is not None or getattr(config, "is_causal", None) is not None:
        return False
    if any(v is not None and v is not False for k, v in others.items() if k != "return_dict"):
        return False
    if others.get("return_dict") is False or getattr(config, "return_dict", True) is False:
        return False
    if config.output_hidden_states or config.output_attentions or config.num_hidden_layers != len(decoder.layers):
        return False
    if torch.is_grad_enabled() and any(p.requires_grad for p in decoder.parameters()):
        return False
    return (mask is None or isinstance(mask, Tensor)) and not torch.is_autocast_enabled("cpu")


def _step(decoder: Any, ids: Tensor, position_ids: Tensor | None, cache: Any, seen: _Seen) -> Tensor | None:
    """What the one call makes of one new token of each text; None if it cannot."""
    native = library.active()
    known = _looked_at(decoder, cache) if cache.layers else None
    if known is None or native is None:
        return None
    held = known.find(cache, ids.shape[0])
    if held is None or not seen.fits(len(ids), held[0].length + 1):
        return None
    embedded = known.embed(decoder, ids, torch.tensor([[held[0].length]]) if position_ids is None else position_ids)
    if embedded is None:
        return None
    x, cos, sin = embedded
    out = torch.empty_like(x)
    done = native.sordino_decode(
        known.blocks, held, len(held), x.data_ptr(), out.data_ptr(), cos.data_ptr(), sin.data_ptr(), int(cos.shape[0] == 1),
        seen.address(), len(x), torch.get_num_threads(),
    )  # fmt: skip
    if done != 0:
        return None
    layer: Any
    for layer in cache.layers:
        layer.length += 1
    return out


def _whole(decoder: Any, ids: Tensor, mask: Any, position_ids: Tensor | None, cache: Any, seen: _Seen | None) -> Tensor | None:
    """What the kernels make of any tokens, in one call or layer by layer; None if a layer is not what they know."""
    known = _known(decoder)
    if known.norms is None or known.window is not None or ids.numel() == 0:
        return None
    past = 0 if cache is None else cache.get_seq_length()
    places = torch.arange(past, past + ids.shape[1])[None] if position_ids is None else position_ids
    embedded = known.embed(decoder, ids, places)
    if embedded is None:
        return None
    x, cos, sin = embedded
    length = past + ids.shape[1]
    fast = length <= LONG or ids.shape[1] == 1 or x.dtype == torch.float32 or library.attends_in_bf16(known.size)
    if known.attentions is not None and seen is not None and seen.fits(len(ids), length) and fast:
        if cache is None and known.packed:
            cache = DynamicCache(config=decoder.config)  # keys and values are rounded on their way in
        out = _prompt(decoder, known, x, cos, sin, cache, seen)
        if out is not None:
            return out
        attend = layers.by_rows(known.attentions, seen.first, cache)
    else:
        mask = create_causal_mask(
            config=decoder.config, inputs_embeds=x, attention_mask=mask, past_key_values=cache, position_ids=places
        )
        attend = layers.by_torch(mask, cache)
    return layers.run(list(decoder.layers), known.norms, x, cos, sin, attend)


def _prompt(decoder: Any, known: Known, x: Tensor, cos: Tensor, sin: Tensor, cache: Any, seen: _Seen) -> Tensor | None:
    """What one call makes of many tokens, where linears multiply codes with codes and the cache holds codes; else None."""
    native, (texts, tokens) = library.active(), x.shape[:2]
    if native is None or known.blocks is None or not known.packed or texts * tokens <= FEW_ROWS:
        return None
    if native.sordino_suits_prompt(known.blocks, len(known.blocks)) != 0:
        return None
    held = known.enter(decoder, cache, texts, tokens)
    if held is None:
        return None
    out, products = torch.empty_like(x), ctypes.c_double()
    done = native.sordino_prompt(
        known.blocks, held, len(held), x.data_ptr(), out.data_ptr(), cos.data_ptr(), sin.data_ptr(), int(cos.shape[0] == 1),
        seen.address(), texts, tokens, ctypes.addressof(products), torch.get_num_threads(),
    )  # fmt: skip
    library.products_seconds(products.value)
    if done != 0:
        return None
    for layer in cache.layers:
        layer.length += tokens
    return out


class _Seen(NamedTuple):
    """Tokens that a batch is about, where each text is one run of them.

    Attributes:
        length: of the mask; None without one.
        first: int64 [B], where each text begins; None: at 0.
    """

    length: int | None
    first: Tensor | None

    @classmethod
    def by(cls, mask: Tensor | None, places: Tensor | None) -> _Seen | None:
        """What a mask leaves to see; None where that is more than one run a text, or nothing."""
        if mask is None:
            # transformers reads positions that begin again as several texts in one row.
            return cls(None, None) if places is None or bool((places.diff(dim=-1) == 1).all()) else None
        if mask.ndim != 2 or mask.device.type != "cpu":
            return None
        if bool(mask.all()):
            return cls(mask.shape[1], None)
        ones = mask != 0
        first, behind = ones.int().argmax(1), ones.int().flip(1).argmax(1)  # what is behind the last token hides itself
        whole = ones.any(1) & (ones.sum(1) == mask.shape[1] - behind - first)
        return cls(mask.shape[1], first) if bool(whole.all()) else None

    def fits(self, texts: int, length: int) -> bool:
        """Whether it is about so many texts of so many tokens, those in a cache included."""
        return self.length in (None, length) and (self.first is None or len(self.first) == texts)

    def address(self) -> int | None:
        """Of :attr:`first`, for the kernels."""
        return None if self.first is None else self.first.data_ptr()


def _looked_at(decoder: Any, cache: Any) -> Known | None:
    """What the kernel knows of a decoder, looked at once a text; None if it cannot go on with the text."""
    known: Known | None = decoder.__dict__.get("_one_call")
    if known is not None and getattr(cache.layers[0], "checked", None) is known:
        return known
    if known is not None and getattr(cache.layers[0], "refused_by", None) is known:
        return None
    fits = _begin(decoder, cache)
    known = decoder.__dict__["_one_call"]
    if not fits:
        cache.layers[0].refused_by = known
    return known if fits else None


def _begin(decoder: Any, cache: Any) -> bool:
    """Look at a decoder, and at a cache that it has put the first tokens of a text into; whether the kernel can go on."""
    known = _known(decoder)
    if known.blocks is None or len(cache.layers) != len(decoder.layers) or getattr(cache, "offloading", False):
        return False
    plain = [layer for layer in cache.layers if type(layer) is not PackedLayer]
    if known.packed != (not plain) or any(type(x) not in (DynamicLayer, RoomyLayer) or not x.is_initialized for x in plain):
        return False
    for i, (block, layer) in enumerate(zip(decoder.layers, cache.layers, strict=True)):
        if known.packed:
            enter(block.self_attn, (), {"past_key_values": cache})  # refuses another checkpoint's
        elif type(layer) is DynamicLayer:
            cache.layers[i] = RoomyLayer.of(layer)
    if any(layer.dtype != known.dtype for layer in cache.layers):
        return False
    for layer in cache.layers:
        layer.checked = known
    return True


def _known(decoder: Any) -> Known:
    """What the kernels know of a decoder as it is now."""
    known: Known | None = decoder.__dict__.get("_one_call")
    if known is None or not known.holds(decoder):
        known = decoder.__dict__["_one_call"] = Known(decoder)
    return known
