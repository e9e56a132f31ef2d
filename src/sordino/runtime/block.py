"""A forward for decoders of known families that leaves as little as possible to single torch operations.

It looks whether everything is as the kernels know it: no hook of anybody else's, no adapter, nothing asked but the last hidden
state. While text is being decoded (one new token of a few texts, none padded, a cache that grows) all layers are one native
call: norms, linears, rotary embedding, R3, R4, the rounding of inputs, the cache's new rows and attention over them, the prefix
included (kernels/block.h); embedding, rotary angles and the final norm stay torch's. Prompts, padded and larger batches go
through layers.py. Everything else takes transformers' own forward. All round at the same places.

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
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from sordino.numerics.hadamard import rotation
from sordino.runtime import layers
from sordino.runtime.attention import KEY_SCALE, OWN_HOOKS, VALUE_SCALE, plain_or_ours
from sordino.runtime.attention import NAME as ATTENTION
from sordino.runtime.cache import PackedLayer, RoomyLayer, enter
from sordino.runtime.inputs import OrderInput, RotateInput
from sordino.runtime.kernels import library
from sordino.runtime.kernels.linear import TYPES, able, traced
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
        out = None if args or traced() else _forward(self, **kwargs)
        return plain(self, *args, **kwargs) if out is None else out

    if all(type(layer).__name__ in FAMILIES for layer in decoder.layers):
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
    if ids.shape[1] == 1 and ids.shape[0] <= FEW_TEXTS and use_cache and _all_seen(attention_mask):
        out = _step(decoder, ids, position_ids, cache)
    if out is None:
        out = _whole(decoder, ids, attention_mask, position_ids, cache)
    return None if out is None else BaseModelOutputWithPast(last_hidden_state=decoder.norm(out), past_key_values=cache)


def _plain_request(decoder: Any, mask: Any, others: dict[str, Any]) -> bool:
    """Whether nothing is wanted but last hidden states, causal, of all layers, without gradients, in the model's own dtype."""
    config = decoder.config
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
    return (mask is None or isinstance(mask, Tensor)) and not torch.is_autocast_enabled("cpu") and not traced()


def _step(decoder: Any, ids: Tensor, position_ids: Tensor | None, cache: Any) -> Tensor | None:
    """What the one call makes of one new token of each text; None if it cannot."""
    native = library.active()
    known = _looked_at(decoder, cache) if cache.layers else None
    if known is None or native is None:
        return None
    held = known.find(cache, ids.shape[0])
    if held is None:
        return None
    embedded = known.embed(decoder, ids, torch.tensor([[held[0].length]]) if position_ids is None else position_ids)
    if embedded is None:
        return None
    x, cos, sin = embedded
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
    return out


def _whole(decoder: Any, ids: Tensor, mask: Any, position_ids: Tensor | None, cache: Any) -> Tensor | None:
    """What layers.py makes of any tokens; None if a layer is not what it knows."""
    known = _known(decoder)
    if known.norms is None or known.window is not None or ids.numel() == 0:
        return None
    past = 0 if cache is None else cache.get_seq_length()
    places = torch.arange(past, past + ids.shape[1])[None] if position_ids is None else position_ids
    embedded = known.embed(decoder, ids, places)
    if embedded is None:
        return None
    x, cos, sin = embedded
    mask = create_causal_mask(
        config=decoder.config, inputs_embeds=x, attention_mask=mask, past_key_values=cache, position_ids=places
    )
    return layers.run(list(decoder.layers), known.norms, x, cos, sin, mask, cache)


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


class Known:
    """A decoder in the kernels' words, good as long as :meth:`holds`.

    Attributes:
        norms: of every layer; None if one of them is more than its family's, so that transformers has to run it.
        blocks: every layer for the one call; None if it cannot take one of them.
    """

    def __init__(self, decoder: Any):
        layers = list(decoder.layers)
        self._layers, self._attention = decoder.layers, decoder.config._attn_implementation
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
        config, usual = decoder.config, self.dtype in TYPES and all(_usual(layer, self.dtype) for layer in layers)
        usual = usual and plain_or_ours(self._attention)
        # Torch's own attention function does nothing of ours.
        usual = usual and (self._attention == ATTENTION or not any(map(_treated, layers)))
        self.norms = [_norms(layer) for layer in layers] if usual else None
        found = [_describe(layer, self.dtype) for layer in layers] if usual else []
        fit = [f for f in found if f is not None]
        self.size: int = layers[0].self_attn.head_dim
        self.packed = getattr(layers[0].self_attn, "kv_grid", None) is not None
        same = all((getattr(x.self_attn, "kv_grid", None) is not None) == self.packed for x in layers)
        self.blocks = (library.Block * len(layers))(*fit) if same and len(fit) == len(layers) else None
        self.window: int | None = getattr(config, "sliding_window", None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()  # addresses mean nothing in a copy

    def _look(self) -> tuple[Any, ...]:
        return [d[k].data_ptr() for d, k in self._places], [len(h) for h in self._hooks]

    def holds(self, decoder: Any) -> bool:
        """Whether nothing was moved, replaced, hooked or patched since."""
        if decoder.config._attn_implementation != self._attention or decoder.layers is not self._layers:
            return False
        try:
            same = self._look() == self._state
        except (KeyError, AttributeError):
            return False
        return same and all(d.get(k) is c for d, k, c in self._modules) and not any("forward" in d for d in self._own)

    def embed(self, decoder: Any, ids: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Embedded tokens, and cosine and sine of their rotary angles; None if the kernels cannot read them."""
        x = decoder.embed_tokens(ids)
        cos, sin = decoder.rotary_emb(x, position_ids=places)
        if not (x.dtype == cos.dtype == self.dtype) or not able(x):
            return None
        if cos.ndim != 3 or cos.shape[0] not in (1, len(ids)) or cos.shape[1:] != (ids.shape[1], self.size):
            return None
        return x.contiguous(), cos.contiguous(), sin.contiguous()

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


def _parts(layer: Any) -> tuple[list[Any], list[Any]]:
    """Linears and norms of a layer, in the kernels' order; a norm may be None."""
    attention = layer.self_attn
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    return [layer.get_submodule(n) for n in _LINEARS], norms + [getattr(attention, n, None) for n in ("q_norm", "k_norm")]


def _usual(layer: Any, dtype: torch.dtype) -> bool:
    """Whether a layer is what its family's are but for its linears and what we do in attention."""
    try:
        size, (linears, norms) = layer.self_attn.head_dim, _parts(layer)
        inside = [layer, layer.self_attn, layer.mlp]
        return (
            size % 2 == 0
            and size <= LARGEST_HEAD
            and all(type(m).__module__.startswith("transformers.models.") for m in inside)
            and isinstance(layer.mlp.act_fn, nn.SiLU | SiLUActivation)
            and all(n is None or _plain(n, dtype) for n in norms)
            and _hooks_are_ours([*inside, layer.mlp.act_fn, *(n for n in norms if n is not None)])
            and _hooks_are_ours(linears, linears, RotateInput | OrderInput)
        )
    except AttributeError:  # a part that others have put there
        return False


def _treated(layer: Any) -> bool:
    """Whether there is something of ours in a layer's attention."""
    attention = layer.self_attn
    return any(getattr(attention, name, None) is not None for name in (KEY, "key_rotation", "kv_grid"))


def _norms(layer: Any) -> layers.Norms:
    before, between, query, key = (_norm(n) for n in _parts(layer)[1])
    return before, between, query, key


def _describe(layer: Any, dtype: torch.dtype) -> library.Block | None:
    """A usual layer as the one call sees it, or None."""
    attention, (linears, norms) = layer.self_attn, _parts(layer)
    heads, key_heads, size = attention.config.num_attention_heads, attention.config.num_key_value_heads, attention.head_dim
    if not all(isinstance(x, QuantLinear) for x in linears) or heads % key_heads or heads > _MOST_HEADS * key_heads:
        return None
    if not _hooks_are_ours(linears, linears[-1:]):
        return None
    weights = [w for x in linears if (w := _weight(x)) is not None]
    roundings = [r for x in linears if (r := _rounding(x)) is not None]
    if not len(weights) == len(roundings) == len(linears):
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


def _hooks_are_ours(modules: list[Any], turning: Any = (), turns: Any = RotateInput) -> bool:
    """Whether the kernels do what the hooks of modules do; ``turning`` are those that may turn their input."""
    for module in modules:
        before = [h for h in module._forward_pre_hooks.values() if h not in OWN_HOOKS]
        if any(module is m for m in turning):
            before = [h for h in before if not isinstance(h, turns)]
        after = [h for h in module._forward_hooks.values() if h is not add_bias]
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
