"""Decoder layers made real one at a time: transformers' own modules with weights read from the source."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sordino.anatomy import Anatomy, skeleton
from sordino.errors import InputError
from sordino.numerics.basis import Basis, Dense
from sordino.runtime.attention import KEY_MEAN, KEY_SCALE, VALUE_SCALE
from sordino.runtime.inner import dress
from sordino.runtime.modules import ORDER, SCALE, give_bias, out_of_basis
from sordino.runtime.prefix import KEY, VALUE
from sordino.walk import attention
from sordino.walk.fused import fuse
from sordino.walk.source import Source


class BlockFactory:
    """Builds single blocks and knows what a decoder passes to each of them.

    Attributes:
        model: the whole model on the meta device.
        dtype: compute dtype.
        inner: spaces inside the blocks that are turned once they are reshaped.
    """

    def __init__(self, source: Source, anatomy: Anatomy, dtype: torch.dtype, inner: tuple[str, ...] = ()):
        self.source, self.anatomy, self.dtype, self.inner = source, anatomy, dtype, inner
        self.model = skeleton(source.config, attention.NAME)

    def load(self, index: int) -> nn.Module:
        """Block ``index`` with its full-precision weights in the compute dtype, frozen, in eval mode."""
        return self._make(index, self.source.under(f"{self.anatomy.blocks}.{index}", self.dtype))

    def assemble(self, index: int, tensors: dict[str, Tensor]) -> nn.Module:
        """Block ``index`` around tensors of a reshaped one; they are used, not copied."""
        layer = self._make(index, tensors)
        dress(layer, self.inner)
        return layer

    def _make(self, index: int, tensors: dict[str, Tensor]) -> nn.Module:
        layer: nn.Module = copy.deepcopy(self.model.get_submodule(self.anatomy.blocks)[index])  # type: ignore[index]
        own = set(layer.state_dict())
        for name, tensor in tensors.items():  # what moves have added
            parent, _, leaf = name.rpartition(".")
            if leaf in (KEY, VALUE, SCALE, ORDER, KEY_SCALE, VALUE_SCALE, KEY_MEAN):
                layer.get_submodule(parent).register_buffer(leaf, tensor)
            if leaf == "bias" and name not in own and f"{parent}.weight" in own:
                give_bias(layer.get_submodule(parent))
        try:
            layer.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise InputError(f"block {index}: {str(error).splitlines()[-1].strip()}") from None
        fuse(layer)
        return layer.eval().requires_grad_(False)

    def calls(self, seqlen: int, first: int = 0) -> list[dict[str, Any]]:
        """What the model passes to each block by keyword for unpadded windows of ``seqlen`` tokens from position ``first`` on.

        The decoder itself is run once, on zeros, with recorders in place of its blocks; masks and rotary angles come
        out with batch size one and broadcast.
        """
        backbone: Any = copy.deepcopy(self.model.get_submodule(self.anatomy.blocks.rpartition(".")[0]))
        recorders = [_Recorder(layer) for layer in backbone.layers]
        backbone.layers = nn.ModuleList(recorders)
        backbone.norm = nn.Identity()
        backbone.embed_tokens = nn.Identity()
        if hasattr(backbone, "rotary_emb"):
            backbone.rotary_emb = type(backbone.rotary_emb)(config=self.source.config)
        hidden = torch.zeros(1, seqlen, self.source.config.hidden_size, dtype=self.dtype)
        with torch.no_grad():
            backbone(inputs_embeds=hidden, position_ids=torch.arange(first, first + seqlen)[None], use_cache=False)
        return [r.call for r in recorders]

    def norm(self, basis: Basis | Dense | None = None, tensors: dict[str, Tensor] | None = None) -> nn.Module:
        """The final norm, real, in the compute dtype, the source's or of given tensors; it takes hidden states in ``basis``."""
        norm = copy.deepcopy(self.model.get_submodule(self.anatomy.final_norm))
        # Copies: moves train the norm in place, and the source's own tensors must stay as they are.
        given = self.source.under(self.anatomy.final_norm) if tensors is None else tensors
        if "bias" in given:
            give_bias(norm)
        norm.load_state_dict({k: v.to(self.dtype, copy=True) for k, v in given.items()}, assign=True)
        if basis is not None:
            out_of_basis(norm, basis)
        return norm.eval().requires_grad_(False)


class _Recorder(nn.Module):
    """Stands in for a block, remembers what it was called with."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.call: dict[str, Any] = {}
        # Decoders read these off their layers when they choose masks.
        for name in ("attention_type", "layer_type"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden: Tensor, **call: Any) -> Tensor:
        self.call = call
        return hidden
