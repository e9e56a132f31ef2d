"""What the kernels know of a decoder of a known family: its norms, and every layer for the one call (kernels/block.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from sordino.numerics.hadamard import rotation
from sordino.runtime.attention import KEY_MEAN, KEY_SCALE, OWN_HOOKS, VALUE_SCALE, does_all_of
from sordino.runtime.cache import enter
from sordino.runtime.inputs import OrderInput, RotateInput
from sordino.runtime.kernels import library
from sordino.runtime.kernels.linear import TYPES, able
from sordino.runtime.kernels.rows import LARGEST_HEAD, format_of, turn_of
from sordino.runtime.layers import Norms
from sordino.runtime.modules import SCALE, QuantLinear, add_bias
from sordino.runtime.prefix import KEY, VALUE

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")  # their layers, norms and MLPs compute one and the same
SILU = (nn.SiLU, SiLUActivation)
_MOST_HEADS = 16  # kMaxHeads of block.h
_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


class Known:
    """A decoder in the kernels' words, good as long as :meth:`holds`.

    Attributes:
        norms: of every layer; None if one of them is more than its family's, so that transformers has to run it.
        attentions: of every layer, what the kernels have to know of its attention; None if they cannot do one of them.
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
        usual = self.dtype in TYPES and all(_usual(layer, self.dtype) for layer in layers)
        usual = usual and does_all_of(self._attention, [layer.self_attn for layer in layers])
        self.norms = [_norms(layer) for layer in layers] if usual else None
        self.size: int = layers[0].self_attn.head_dim
        self.key_heads: int = decoder.config.num_key_value_heads
        self.packed = getattr(layers[0].self_attn, "kv_grid", None) is not None
        usual = usual and all((getattr(x.self_attn, "kv_grid", None) is not None) == self.packed for x in layers)
        usual = usual and all(x.self_attn.layer_idx == i for i, x in enumerate(layers))  # the cache has them in that order
        self.attentions = _all([_attention(layer.self_attn, self.dtype) for layer in layers] if usual else [None])
        self.blocks = _all([_describe(layer, self.dtype) for layer in layers] if self.attentions else [None])
        self.window: int | None = getattr(decoder.config, "sliding_window", None)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # addresses mean nothing in a copy

    def _look(self) -> tuple[Any, ...]:
        addresses, hooks = [d[k].data_ptr() for d, k in self._places], [len(h) for h in self._hooks]
        return addresses, hooks, ["forward" in d for d in self._own]

    def holds(self, decoder: Any) -> bool:
        """Whether nothing was moved, replaced, hooked or patched since."""
        if decoder.config._attn_implementation != self._attention or decoder.layers is not self._layers:
            return False
        try:
            same = self._look() == self._state
        except (KeyError, AttributeError):
            return False
        return same and all(d.get(k) is c for d, k, c in self._modules)

    def embed(self, decoder: Any, ids: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Embedded tokens, and cosine and sine of their rotary angles; None if the kernels cannot read them."""
        x = decoder.embed_tokens(ids)
        cos, sin = decoder.rotary_emb(x, position_ids=places)
        if not (x.dtype == cos.dtype == self.dtype) or not able(x):
            return None
        if cos.ndim != 3 or cos.shape[0] not in (1, len(ids)) or cos.shape[1:] != (ids.shape[1], self.size):
            return None
        return x.contiguous(), cos.contiguous(), sin.contiguous()

    def enter(self, decoder: Any, cache: Any, texts: int, tokens: int) -> Any:
        """Where the packed rows of a cache are, with room for so many more; None if a layer is not what the kernels know.

        Raises:
            InputError: if the cache already holds plain keys and values, or another checkpoint's.
        """
        for layer in decoder.layers:
            enter(layer.self_attn, (), {"past_key_values": cache})
        if len(cache.layers) != len(decoder.layers):
            return None
        empty = torch.empty((texts, self.key_heads, 0, self.size), dtype=self.dtype, device="cpu")
        for layer in cache.layers:
            if not layer.is_initialized:
                layer.lazy_initialization(empty, empty)
        rooms = [layer.make_room(tokens) for layer in cache.layers]
        length = cache.layers[0].length
        for layer, (keys, _) in zip(cache.layers, rooms, strict=True):
            if layer.length != length or keys.shape[0] != texts or layer.dtype != self.dtype:
                return None
        return Places(rooms).at(length)

    def find(self, cache: Any, texts: int) -> Any:
        """Where the rows of a cache are, with room for one more; None if a layer is not what it was, or sees not all rows."""
        length = cache.get_seq_length()
        if self.window is not None and length >= self.window:
            return None
        layers = cache.layers
        if any(getattr(layer, "checked", None) is not self for layer in layers):
            return None
        places: Places | None = layers[0].places
        if places is None or not places.hold(layers, length):
            rooms = [layer.make_room(1) for layer in layers]
            if any(layer.length != length or keys.shape[0] != texts for layer, (keys, _) in zip(layers, rooms, strict=True)):
                return None
            places = layers[0].places = Places(rooms)
        return places.at(length) if places.texts == texts else None


class Places:
    """Where the rows of a cache are, in the kernels' words; looked up again only when a layer has moved.

    Attributes:
        texts: rows of the batch.
    """

    def __init__(self, rooms: list[tuple[Tensor, Tensor]]):
        self._rooms, self._array = rooms, (library.Held * len(rooms))()
        self._each = list(self._array)  # views of the array, made once
        self.texts, self._most = rooms[0][0].shape[0], min(keys.shape[2] for keys, _ in rooms)
        for held, (keys, values) in zip(self._each, rooms, strict=True):
            held.keys, held.values, held.room = keys.data_ptr(), values.data_ptr(), keys.shape[2]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # addresses mean nothing in a copy

    def hold(self, layers: list[Any], length: int) -> bool:
        """Whether all layers are where they were, hold so many tokens, and have room for one more."""
        if length >= self._most or len(layers) != len(self._rooms):
            return False
        return all(layer.holds(room, length) for layer, room in zip(layers, self._rooms, strict=True))

    def at(self, length: int) -> Any:
        """The array, for a token behind so many."""
        for held in self._each:
            held.length = length
        return self._array


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
            and isinstance(layer.mlp.act_fn, SILU)
            and all(n is None or _plain(n, dtype) for n in norms)
            and _hooks_are_ours([*inside, layer.mlp.act_fn, *(n for n in norms if n is not None)])
            and _hooks_are_ours(linears, linears, RotateInput | OrderInput)
        )
    except AttributeError:  # a part that others have put there
        return False


def _norms(layer: Any) -> Norms:
    before, between, query, key = (_norm(n) for n in _parts(layer)[1])
    return before, between, query, key


def _all(found: list[library.Block | None]) -> Any:
    """Blocks in the kernels' words, if every one was found."""
    fit = [f for f in found if f is not None]
    return (library.Block * len(fit))(*fit) if len(fit) == len(found) else None


def _attention(attention: Any, dtype: torch.dtype) -> library.Block | None:
    """What the kernels have to know of attention over rows of a cache, in a block that tells of nothing else; or None."""
    heads, key_heads, size = attention.config.num_attention_heads, attention.config.num_key_value_heads, attention.head_dim
    if heads % key_heads or heads > _MOST_HEADS * key_heads or size > LARGEST_HEAD:
        return None
    block = library.Block(heads=heads, key_heads=key_heads, size=size, scaling=attention.scaling, type=TYPES[dtype])
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


def _describe(layer: Any, dtype: torch.dtype) -> library.Block | None:
    """A usual layer as the one call sees it, or None."""
    attention, (linears, norms) = layer.self_attn, _parts(layer)
    block = _attention(attention, dtype)
    if block is None or not all(isinstance(x, QuantLinear) for x in linears) or not _hooks_are_ours(linears, linears[-1:]):
        return None
    weights = [w for x in linears if (w := _weight(x)) is not None]
    roundings = [r for x in linears if (r := _rounding(x)) is not None]
    if not len(weights) == len(roundings) == len(linears):
        return None
    block.linear, block.rounding = (library.Weight * 7)(*weights), (library.Rounding * 7)(*roundings)
    block.norm = (library.Norm * 4)(*(_norm(n) for n in norms))
    turn, mean = getattr(attention, "key_rotation", None), getattr(attention, KEY_MEAN, None)
    if getattr(attention, "kv_grid", None) is None and (turn is not None or mean is not None):
        # A plain cache holds keys neither centered nor turned. Attention needs neither, but beside a prefix, which is both.
        if getattr(attention, KEY, None) is not None:
            return None
        turn = mean = None
    if turn is not None:
        block.keys = turn_of(turn)
    if any(isinstance(h, RotateInput) for h in linears[-1]._forward_pre_hooks.values()):
        block.down = turn_of(rotation(linears[-1].in_features))
    if mean is not None:
        if not _ready(mean, dtype):
            return None
        block.key_mean = mean.data_ptr()
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
    if linear.kept or linear.side or linear.columned:
        return None
    found = linear._native_weight()
    return None if found is None else found.weight


def _rounding(linear: Any) -> library.Rounding | None:
    if linear.inputs is None:
        return library.Rounding()
    scale: Tensor = linear.get_buffer(SCALE)
    if not _ready(scale, torch.float32):
        return None
    grid = linear.inputs
    return library.Rounding(scale.data_ptr(), grid.group or linear.in_features, grid.bits, grid.static, not grid.symmetric)


def _norm(norm: Any) -> library.Norm:
    if norm is None:
        return library.Norm()
    bias = getattr(norm, "bias", None)
    return library.Norm(norm.weight.data_ptr(), 0 if bias is None else bias.data_ptr(), norm.variance_epsilon)
