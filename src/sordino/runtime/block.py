"""One native call for all decoder layers while text is being decoded, in place of some twenty torch operations a layer.

A checkpoint's decoder gets a forward that looks whether everything is as the kernel knows it: one new token of each text, none
padded, a cache that grows, no hook of anybody else's, no adapter. Then the kernel does norms, linears, rotary embedding, R3,
R4, the rounding of inputs, the cache's new rows and attention over them, the prefix included (kernels/block.h); embedding,
rotary angles and the final norm stay torch's. Everything else takes transformers' own forward. Both round at the same places.

The layers are looked at when the first token of a text is decoded, since that takes longer than the token's products: what is
changed in the middle of a text counts from the next one. ``SORDINO_ONE_CALL=off`` switches all this off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.activations import SiLUActivation
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from sordino.numerics.hadamard import rotation
from sordino.runtime.attention import KEY_SCALE, OWN_HOOKS, VALUE_SCALE, plain_or_ours
from sordino.runtime.cache import PackedLayer, RoomyLayer, enter
from sordino.runtime.inputs import RotateInput
from sordino.runtime.kernels import library
from sordino.runtime.kernels.linear import TYPES, able
from sordino.runtime.kernels.rows import LARGEST_HEAD, format_of, turn_of
from sordino.runtime.modules import SCALE, QuantLinear, add_bias
from sordino.runtime.prefix import KEY, VALUE

VARIABLE = "SORDINO_ONE_CALL"
FEW_TEXTS = 4  # kMaxRows of kernels.h
_MOST_HEADS = 16  # kMaxHeads of block.h
FAMILIES = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip

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
        out = None if args or torch.compiler.is_compiling() else _step(self, **kwargs)
        return plain(self, *args, **kwargs) if out is None else out

    if all(type(layer).__name__ in FAMILIES for layer in decoder.layers):
        decoder.forward = MethodType(forward, decoder)


def _step(
    decoder: Any,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **others: Any,
) -> BaseModelOutputWithPast | None:
    """What the kernel makes of one new token of each text; None if it cannot."""
    ids, native, cache, config = input_ids, library.active(), past_key_values, decoder.config
    if ids is None or inputs_embeds is not None or ids.shape[1] != 1 or ids.shape[0] > FEW_TEXTS or not _on or native is None:
        return None
    if torch.is_grad_enabled() and any(p.requires_grad for p in decoder.parameters()):
        return None
    if type(cache) is not DynamicCache or not cache.layers or use_cache is False or decoder.training:
        return None
    asked = any(v is not None and v is not False for k, v in others.items() if k != "return_dict")
    if asked or config.output_hidden_states or config.output_attentions:
        return None
    if others.get("return_dict") is False or not _all_seen(attention_mask):
        return None
    known = _looked_at(decoder, cache)
    if known is None:
        return None
    held = known.find(cache, ids.shape[0])
    if held is None:
        return None
    x = decoder.embed_tokens(ids)
    places = torch.tensor([[held[0].length]]) if position_ids is None else position_ids
    cos, sin = decoder.rotary_emb(x, position_ids=places)
    if not (x.dtype == cos.dtype == known.dtype) or not able(x) or cos.shape[-1] != known.size:
        return None
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    out = torch.empty_like(x)
    done = native.sordino_decode(
        known.blocks, held, len(held), x.data_ptr(), out.data_ptr(), cos.data_ptr(), sin.data_ptr(), int(cos.shape[0] == 1),
        len(x), torch.get_num_threads(),
    )  # fmt: skip
    if done != 0:
        return None
    layer: Any
    for layer in cache.layers:
        layer.length += 1
    return BaseModelOutputWithPast(last_hidden_state=decoder.norm(out), past_key_values=cache)


def _all_seen(mask: Any) -> bool:
    """Whether a mask hides nothing: there is none, or it is [B, S], of ones."""
    return mask is None or (isinstance(mask, Tensor) and mask.ndim == 2 and bool(mask.all()))


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
    known: Known | None = decoder.__dict__.get("_one_call")
    if known is None or not known.holds(decoder):
        known = decoder.__dict__["_one_call"] = Known(decoder)
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


class Known:
    """A decoder in the kernel's words (``blocks``; None if it cannot take one of its layers), good as long as :meth:`holds`."""

    def __init__(self, decoder: Any):
        layers = list(decoder.layers)
        self.dtype = layers[0].input_layernorm.weight.dtype
        modules = {name: m for layer in layers for name, m in layer.named_modules(prefix=str(layer.self_attn.layer_idx))}
        # All that must stay the same. The tensors are kept, so that an address is never one of memory that was freed.
        self._modules = [(m._modules, k, c) for m in (decoder.layers, *modules.values()) for k, c in m._modules.items()]
        self._hooks = [d for m in modules.values() for d in (m._forward_hooks, m._forward_pre_hooks)]
        self._own = [m.__dict__ for m in modules.values()]
        kept = [d for m in modules.values() for d in (m._buffers, m._parameters)]
        self._places = [(d, k) for d in kept for k, t in d.items() if t is not None]
        self._storages = [d[k].untyped_storage() for d, k in self._places]
        self._state = self._look()
        found = [_describe(layer, self.dtype) if self.dtype in TYPES else None for layer in layers]
        fit, config = [f for f in found if f is not None], decoder.config
        self.size: int = layers[0].self_attn.head_dim
        self.packed = getattr(layers[0].self_attn, "kv_grid", None) is not None
        same = all((getattr(x.self_attn, "kv_grid", None) is not None) == self.packed for x in layers)
        all_fit = same and len(fit) == len(layers) and plain_or_ours(config._attn_implementation)
        self.blocks = (library.Block * len(layers))(*fit) if all_fit else None
        self.window: int | None = getattr(config, "sliding_window", None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()  # addresses mean nothing in a copy

    def _look(self) -> tuple[Any, ...]:
        return [d[k].data_ptr() for d, k in self._places], [len(h) for h in self._hooks]

    def holds(self, decoder: Any) -> bool:
        """Whether nothing was moved, replaced, hooked or patched since."""
        if not plain_or_ours(decoder.config._attn_implementation):
            return False
        try:
            same = self._look() == self._state
        except (KeyError, AttributeError):
            return False
        return same and all(d.get(k) is c for d, k, c in self._modules) and not any("forward" in d for d in self._own)

    def find(self, cache: Any, texts: int) -> Any:
        """Where the rows of a cache are, with room for one more; None if a layer is not what it was, or sees not all rows."""
        length = cache.get_seq_length()
        if self.window is not None and length >= self.window:
            return None
        found = (library.Held * len(cache.layers))()
        for held, layer in zip(found, cache.layers, strict=True):
            if getattr(layer, "checked", None) is not self:
                return None
            keys, values = layer.make_room(1)
            if layer.length != length or keys.shape[0] != texts:
                return None
            held.keys, held.values, held.length, held.room = keys.data_ptr(), values.data_ptr(), length, keys.shape[2]
        return found


def _nothing() -> None:
    return None


def _describe(layer: Any, dtype: torch.dtype) -> library.Block | None:
    """A layer as the kernel sees it, or None."""
    attention, linears = layer.self_attn, [layer.get_submodule(n) for n in _LINEARS]
    norms = [
        layer.input_layernorm,
        layer.post_attention_layernorm,
        *(getattr(attention, n, None) for n in ("q_norm", "k_norm")),
    ]
    heads, key_heads, size = attention.config.num_attention_heads, attention.config.num_key_value_heads, attention.head_dim
    if not all(isinstance(x, QuantLinear) for x in linears) or heads % key_heads or heads > _MOST_HEADS * key_heads:
        return None
    if (
        size % 2
        or size > LARGEST_HEAD
        or not isinstance(layer.mlp.act_fn, nn.SiLU | SiLUActivation)
        or not _hooks_are_ours(layer, linears, norms)
    ):
        return None
    weights = [w for x in linears if (w := _weight(x)) is not None]
    roundings = [r for x in linears if (r := _rounding(x)) is not None]
    if not len(weights) == len(roundings) == len(linears) or not all(n is None or _plain(n, dtype) for n in norms):
        return None
    block = library.Block(
        linear=(library.Weight * 7)(*weights), rounding=(library.Rounding * 7)(*roundings),
        norm=(library.Norm * 4)(*(_norm(n) for n in norms)),
        heads=heads, key_heads=key_heads, size=size, scaling=attention.scaling, type=TYPES[dtype],
    )  # fmt: skip
    if (turn := getattr(attention, "key_rotation", None)) is not None:
        block.keys = turn_of(turn)
    if any(isinstance(h, RotateInput) for h in linears[-1]._forward_pre_hooks.values()):
        block.down = turn_of(rotation(linears[-1].in_features))
    if (grid := getattr(attention, "kv_grid", None)) is not None:
        shares = [attention.get_buffer(n) for n in (KEY_SCALE, VALUE_SCALE)]
        formats = [f for s in shares if (f := format_of(grid, s)) is not None]
        if len(formats) < len(shares):
            return None
        block.key, block.value = formats
    if (key := getattr(attention, KEY, None)) is not None:
        value = attention.get_buffer(VALUE)
        if not _ready(key, dtype) or not _ready(value, dtype):
            return None
        block.prefix_key, block.prefix_value, block.prefix = key.data_ptr(), value.data_ptr(), key.shape[2]
    return block


def _ready(x: Tensor, dtype: torch.dtype) -> bool:
    return x.device.type == "cpu" and x.dtype == dtype and x.is_contiguous()


def _plain(norm: Any, dtype: torch.dtype) -> bool:
    """Whether a norm is an RMS norm with numbers of the model's dtype."""
    bias = getattr(norm, "bias", None)
    return type(norm).__name__.endswith("RMSNorm") and _ready(norm.weight, dtype) and (bias is None or _ready(bias, dtype))


def _hooks_are_ours(layer: Any, linears: list[Any], norms: list[Any]) -> bool:
    """Whether the kernel does what the hooks inside a layer do."""
    down, attention = linears[-1], layer.self_attn
    for module in [layer, attention, layer.mlp, layer.mlp.act_fn, *linears, *(n for n in norms if n is not None)]:
        before, after = list(module._forward_pre_hooks.values()), list(module._forward_hooks.values())
        if module is attention:
            before = [h for h in before if h not in OWN_HOOKS]
        if module is down:
            before = [h for h in before if not isinstance(h, RotateInput)]
        if module in norms and getattr(module, "bias", None) is not None:
            after = [h for h in after if h is not add_bias]
        if before or after or "forward" in module.__dict__:
            return False
    return True


def _weight(linear: Any) -> library.Weight | None:
    if linear.kept or linear.side:
        return None
    found = linear._native_weight()
    return None if found is None else found.weight


def _rounding(linear: Any) -> library.Rounding | None:
    if linear.inputs is None:
        return library.Rounding()
    scale: Tensor = linear.get_buffer(SCALE)
    if not _ready(scale, torch.float32):
        return None
    group = linear.inputs.get("group") or linear.in_features
    return library.Rounding(scale.data_ptr(), group, linear.inputs["bits"], linear.inputs["mode"] == "static")


def _norm(norm: Any) -> library.Norm:
    if norm is None:
        return library.Norm()
    bias = getattr(norm, "bias", None)
    return library.Norm(norm.weight.data_ptr(), 0 if bias is None else bias.data_ptr(), norm.variance_epsilon)
