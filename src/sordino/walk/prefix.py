"""The prefix's own small stream: full-precision hidden states of its tokens, and the keys and values each block makes of them.

Every block's part is a file of the work folder, so a resumed run finds it there, as does the assembly.
Shapes: P prefix tokens, D hidden size, K key heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from sordino.anatomy import hidden_states
from sordino.runtime.attention import placed_keys
from sordino.runtime.inner import ATTENTION
from sordino.runtime.prefix import KEY, VALUE
from sordino.walk.blocks import BlockFactory
from sordino.walk.ends import Ends
from sordino.walk.store import Work


class PrefixStream:
    """Keys and values of some tokens, block by block in order.

    Attributes:
        ids: the tokens.
        stored: dtype in which the checkpoint holds them; what calibration sees has been through it.
    """

    def __init__(self, ids: tuple[int, ...], factory: BlockFactory, work: Work, ends: Ends, stored: torch.dtype):
        self.ids, self.work, self.stored = ids, work, stored
        self.first = ends.embed(torch.tensor([ids]), exact=True)
        self.calls = factory.calls(len(ids), first=-len(ids))

    @torch.no_grad()
    def at(self, index: int, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Keys (at the positions -P … -1) and values that a full-precision block makes of the prefix, [1, K, P, d] each."""
        known = self.work.load_prefix(index)
        if not known:
            x = self.work.load_prefix(index - 1)["hidden"] if index else self.first
            cache: Any = DynamicCache()
            hidden = hidden_states(layer(x, **self.calls[index] | {"past_key_values": cache, "use_cache": True}))
            made = cache.layers[index]
            keys = placed_keys(layer.get_submodule(ATTENTION), made.keys)
            known = {"hidden": hidden, KEY: keys.to(self.stored), VALUE: made.values.to(self.stored)}
            self.work.save_prefix(index, known)
        dtype = self.first.dtype
        return known[KEY].to(dtype), known[VALUE].to(dtype)


def first_token(config: Any) -> int | None:
    """The token that begins a text, or the one that ends it where a model has only that (Qwen)."""
    for found in (getattr(config, "bos_token_id", None), getattr(config, "eos_token_id", None)):
        token = found[0] if isinstance(found, list) and found else found
        if isinstance(token, int) and 0 <= token < config.vocab_size:
            return token
    return None
