"""A layer of transformers' cache that holds packed codes instead of numbers.

The rows of :class:`sordino.numerics.kv.KvGrid` stand where the plain layer has keys and values, so lengths, cropping and the
reordering of beams are the plain layer's own. New tokens are rotated (R3), rounded and packed once, on their way in; the
attention function gets what the rows say. Shapes: B batch, K key heads, S tokens, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sordino.errors import InputError


class PackedLayer(DynamicLayer):
    """Keys and values of one attention module as packed rows, uint8 [B, K, S, bytes].

    It keeps every token, also where the model slides a window: the mask leaves out what is too far away.
    """

    def __init__(self, attention: Any):
        super().__init__()  # type: ignore[no-untyped-call]
        self.grid, self.turn = attention.kv_grid, getattr(attention, "key_rotation", None)
        self.scales: tuple[Tensor, Tensor] = attention.key_scale, attention.value_scale

    def fits(self, attention: Any) -> bool:
        """Whether the rows are what this attention module would have made."""
        if self.grid != attention.kv_grid or self.turn is not getattr(attention, "key_rotation", None):
            return False
        pairs = zip(self.scales, (attention.key_scale, attention.value_scale), strict=True)
        return all(a is b or torch.equal(a, b) for a, b in pairs)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty rows; transformers calls it before the first update."""
        self.dtype, self.device = key_states.dtype, key_states.device
        rows = (key_states.shape[0], key_states.shape[1], 0, self.grid.row_bytes(key_states.shape[-1]))
        self.keys, self.values = (torch.empty(rows, dtype=torch.uint8, device=self.device) for _ in range(2))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Round and pack new keys and values [B, K, S, d]; returns the values of all, in their dtype."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        grid, size, (key_scale, value_scale) = self.grid, key_states.shape[-1], self.scales
        key = key_states if self.turn is None else self.turn.apply(key_states)
        self.keys = torch.cat([self.keys, grid.pack(key, key_scale)], 2)  # type: ignore[list-item]
        self.values = torch.cat([self.values, grid.pack(value_states, value_scale)], 2)  # type: ignore[list-item]
        return (
            grid.unpack(self.keys, key_scale, size, key_states.dtype),
            grid.unpack(self.values, value_scale, size, value_states.dtype),
        )


def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attention module: put a packed layer into the cache it is about to use.

    Raises:
        InputError: if that cache already holds plain keys and values, or is of a kind that cannot be exchanged.
    """
    cache = kwargs.get("past_key_values")
    module.packed_cache = cache is not None
    if cache is None:
        return
    layers, index = getattr(cache, "layers", None), module.layer_idx
    if layers is None or getattr(cache, "offloading", False):
        raise InputError(f"a {type(cache).__name__} cannot hold packed keys and values; use a DynamicCache, not offloaded")
    while len(layers) <= index:
        layers.append(DynamicLayer())
    layer = layers[index]
    if isinstance(layer, PackedLayer):
        if not layer.fits(module):
            raise InputError("the cache was filled by another checkpoint; use an empty DynamicCache")
        return
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.get_seq_length():
        what = type(layer).__name__ + (", filled by another model" if layer.get_seq_length() else "")
        raise InputError(f"the cache ({what}) cannot hold packed keys and values; use an empty DynamicCache")
    layers[index] = PackedLayer(module)
    for i, other in enumerate(layers):
        # Packed layers keep every token. Masks are made for all layers alike, so none may slide beside them.
        if type(other) is DynamicSlidingWindowLayer and not other.get_seq_length():
            layers[i] = DynamicLayer()
