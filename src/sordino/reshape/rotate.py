"""Offline rotation of the residual stream by groups of channels (D²Quant, spec section 3.2; QuaRot's R1 with small groups).

The gains of the norms go into the linears they feed; then every linear that reads the stream is multiplied by Q on its
input side and every linear that writes to it on its output side. An RMS norm without gain commutes with Q. Around the
blocks nothing stored changes: embeddings are rotated as they are looked up, and the final norm takes the rotation back,
so a tied model keeps its one table. Inputs of o_proj and down_proj are not rotated, which leaves down_proj the uneven
columns that a column scale lives on. QuaRot also takes the mean off every embedding, which is not function-preserving
under an RMS norm: left out.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from sordino.anatomy import Anatomy
from sordino.contract import Move
from sordino.errors import InputError
from sordino.numerics.basis import Basis
from sordino.recipe import Format
from sordino.reshape.turning import turn_stream


class Rotate(Move):
    """Rotate the residual stream.

    Args:
        size: largest group of channels; the largest power of two up to it that divides the hidden size is taken. "full" takes
            all channels at once (QuaRot), or the most that there is a Hadamard matrix for.
        seed: of the signs.
    """

    name = "rotate"

    def __init__(self, size: Literal[2, 4, 8, 16, 32, 64, 128, 256, 512, "full"] = 128, seed: int = 0) -> None:
        self.size, self.seed = size, seed

    def check(self, fmt: Format, anatomy: Anatomy, target: str | None) -> None:
        """Needs norms in front of the sublayers, and a hidden size with a power of two in it."""
        if not anatomy.norms:
            raise InputError(f"move 'rotate': {anatomy.model_type} has no norms before its linears to take gains from")
        hidden = anatomy.hidden
        if hidden % 2:
            raise InputError(f"move 'rotate': the hidden size {hidden} is odd, no Hadamard group divides it")

    def basis(self, hidden: int) -> Basis:
        """The basis that the blocks are moved to."""
        return Basis.whole(hidden, self.seed) if self.size == "full" else Basis.draw(hidden, self.seed, self.size)

    @torch.no_grad()
    def reshape(self, block: nn.Module, index: int, anatomy: Anatomy, artifacts: dict[str, Any]) -> None:
        """Fuse the gains, rotate the linears."""
        turn_stream(block, anatomy, self.basis(anatomy.hidden).apply)
