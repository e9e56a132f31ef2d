"""Layers of transformers' cache that grow in place, and one of them that holds packed codes instead of numbers.

The plain layer copies all it holds whenever a token comes. These keep room behind the last token, and what others see are views
of the filled part. In a packed layer the rows of :class:`sordino.numerics.kv.KvGrid` stand where the plain layer has keys and
values, so lengths, cropping and the reordering of beams are the plain layer's own. New tokens are rotated (R3), rounded and
packed once, on their way in; the attention function gets what the rows say.

Shapes: B batch, K key heads, S tokens, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sordino.errors import InputError
from sordino.runtime.kernels import rows


class RoomyLayer(DynamicLayer):
    """Keys and values [B, K, S, w] at the beginning of tensors with room for more tokens.

    Attributes:
        room: those tensors, [B, K, room, w] each; None before the first token.
        length: how many tokens of them are there, S.
    """

    def __init__(self) -> None:
        self.room: tuple[Tensor, Tensor] | None = None
        self.length = 0
        self.checked: object = None  # runtime/block.py's own
        self.places: object = None  # runtime/known.py's own
        self._given: list[Any] = [None, None]  # what others put in the place of keys and values, until more room is wanted
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def of(cls, plain: DynamicLayer) -> RoomyLayer:
        """What a plain layer holds."""
        new = cls()
        new.keys, new.values = plain.keys, plain.values
        new.dtype, new.device, new.is_initialized = plain.dtype, plain.device, True
        return new

    def _seen(self, which: int) -> Any:
        if self._given[which] is not None or self.room is None:
            return self._given[which]
        return self.room[which].narrow(2, 0, self.length)

    # The base class assigns to these, when it crops or reorders.
    keys = property(lambda self: self._seen(0), lambda self, x: self._given.__setitem__(0, x))
    values = property(lambda self: self._seen(1), lambda self, x: self._given.__setitem__(1, x))

    def holds(self, room: tuple[Tensor, Tensor], length: int) -> bool:
        """Whether these are its tensors, with so many tokens, and nobody has put others in their place."""
        return self.room is room and self.length == length and self._given[0] is None and self._given[1] is None

    def make_room(self, more: int) -> tuple[Tensor, Tensor]:
        """:attr:`room` for so many tokens more."""
        if self._given[0] is not None or self._given[1] is not None:
            self._settle()
        if self.room is None or self.length + more > self.room[0].shape[2]:
            self._grow(more)
        assert self.room is not None
        return self.room

    def _settle(self) -> None:
        """Hold what was assigned. What was cut off may be in the hands of others: new tokens do not go over it."""
        held, before = (self.keys, self.values), self.length
        self.length = held[0].shape[2]
        if self.room is None or self.length < before or not all(map(_begins, self.room, held)):
            self.room = held
        self._given = [None, None]

    def _grow(self, more: int) -> None:
        assert self.room is not None
        held = self.keys, self.values
        tokens = self.length + more + (max(64, self.length // 4) if self.length else 0)
        with torch.inference_mode(False), torch.no_grad():  # whatever mode writes to it later
            room = [x.new_empty((*x.shape[:2], tokens, x.shape[3])) for x in held]
            for new, old in zip(room, held, strict=True):
                new[:, :, : self.length] = old
        self.room = room[0], room[1]

    def put(self, keys: Tensor, values: Tensor) -> None:
        """Append tokens [B, K, n, w]."""
        more = keys.shape[2]
        for room, new in zip(self.make_room(more), (keys, values), strict=True):
            room[:, :, self.length : self.length + more] = new
        self.length += more

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """No tokens yet, of the kind of these [B, K, n, d]."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.room, self.length, self.checked, self.places = None, 0, None, None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values [B, K, n, d]; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.put(key_states, value_states)
        return self.keys, self.values


def _begins(room: Tensor, held: Tensor) -> bool:
    """Whether a tensor is the filled part of another one."""
    return room.data_ptr() == held.data_ptr() and room.stride() == held.stride() and room.shape[:2] == held.shape[:2]


class PackedLayer(RoomyLayer):
    """Keys and values of one attention module as packed rows, uint8 [B, K, S, bytes].

    It keeps every token, also where the model slides a window: the mask leaves out what is too far away.
    """

    def __init__(self, attention: Any):
        super().__init__()
        self.grid, self.turn = attention.kv_grid, getattr(attention, "key_rotation", None)
        self.scales: tuple[Tensor, Tensor] = attention.key_scale, attention.value_scale
        self.mean: Tensor | None = getattr(attention, "key_mean", None)

    def fits(self, attention: Any) -> bool:
        """Whether the rows are what this attention module would have made."""
        if self.grid != attention.kv_grid or self.turn is not getattr(attention, "key_rotation", None):
            return False
        if self.is_initialized:
            shape, size = self.keys.shape, attention.head_dim
            if shape[1] != attention.config.num_key_value_heads or shape[3] != self.grid.row_bytes(size):
                return False
        own, mean = [*self.scales, self.mean], getattr(attention, "key_mean", None)
        pairs = zip(own, (attention.key_scale, attention.value_scale, mean), strict=True)
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty rows; transformers calls it before the first update."""
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (key_states.shape[0], key_states.shape[1], 0, self.grid.row_bytes(key_states.shape[-1]))
        self.keys, self.values = (torch.empty(shape, dtype=torch.uint8, device=self.device) for _ in range(2))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Round and pack new keys and values [B, K, S, d]; returns the values of all, in their dtype."""
        self.append(key_states, value_states)
        return self._unpacked(0, key_states), self._unpacked(1, value_states)

    def append(self, keys: Tensor, values: Tensor) -> tuple[int, Tensor, Tensor]:
        """Round and pack new keys and values [B, K, n, d]; returns how many tokens there are, and :attr:`room`.

        Raises:
            InputError: if the cache holds more or fewer texts.
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self._pack(keys, values)
        assert self.room is not None
        return self.length, *self.room

    def _pack(self, keys: Tensor, values: Tensor) -> None:
        more, (key_scale, value_scale) = keys.shape[2], self.scales
        room, length = self.make_room(more), self.length
        if room[0].shape[0] != keys.shape[0]:
            raise InputError(f"the cache holds {room[0].shape[0]} texts, and {keys.shape[0]} were given to go on with")
        if rows.store(self.grid, key_scale, self.mean, self.turn, keys, room[0], length) and rows.store(
            self.grid, value_scale, None, None, values, room[1], length
        ):
            self.length += more
            return
        placed = rows.placed(self.mean, self.turn, keys)
        self.put(self.grid.pack(placed, key_scale), self.grid.pack(values, value_scale))

    def _unpacked(self, which: int, like: Tensor) -> Tensor:
        """Values of all rows of keys (0) or values (1)."""
        grid, scale, size = self.grid, self.scales[which], like.shape[-1]
        assert self.room is not None
        found = rows.load(grid, scale, self.room[which], self.length, size, like.dtype)
        return grid.unpack(self._seen(which), scale, size, like.dtype) if found is None else found


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
