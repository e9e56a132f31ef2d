"""A text alone or in a padded batch, at once or token by token, with a cache or without one: the same codes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from decoders import RECIPES, tiny_checkpoint
from levels import every_level, needs_kernels
from sordino.runtime import kernels
from sordino.runtime.block import LONG
from sordino.runtime.kernels import library
from sordino.runtime.modules import QuantLinear

pytestmark = needs_kernels


# Linears whose codes are multiplied with codes: other products are sums in the order that suits the number of tokens.
ROUNDED = ("static, prefix, R3, R4", "dynamic, prefix, R3, R4", "integer products")


@every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ROUNDED)
def test_every_code_is_the_same(recipe: str, dtype: torch.dtype, level: str, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path, *RECIPES[recipe], dtype=dtype, head_dim=64)
    assert any(isinstance(m, QuantLinear) for m in model.modules())
    # The norm behind all layers is torch's, and not the same to the bit; one code is worth a thousand times as much.
    most = {torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]
    apart = {name: float(((a - b).abs() / (1 + b.abs())).max()) for name, a, b in several_ways(model, level)}
    assert len(apart) > 10 and max(apart.values()) <= most, apart


@every_level
def test_so_is_every_code_of_a_long_text(level: str, tmp_path: Path) -> None:
    """No length sends half precision to torch's attention where the kernels make theirs of products of bf16."""
    with kernels.using(level):
        dtype = torch.bfloat16 if library.attends_in_bf16(64) else torch.float32
    model = tiny_checkpoint(tmp_path, *RECIPES[ROUNDED[0]], dtype=dtype, head_dim=64, max_position_embeddings=2048)
    apart = [float(((a - b).abs() / (1 + b.abs())).max()) for _, a, b in several_ways(model, level, (LONG + 70, 40))]
    assert max(apart) <= {torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]


def several_ways(model: Any, level: str, lengths: tuple[int, ...] = (9, 300, 21)) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Last hidden states of the last tokens of texts: computed in one way, and alone without a cache."""
    decoder = model.get_decoder()
    ids = [torch.randint(2, 300, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    longest, new = max(lengths), 4

    def padded(left: bool) -> tuple[Tensor, Tensor]:
        texts = [F.pad(x, (longest - len(x), 0) if left else (0, longest - len(x)), value=1) for x in ids]
        masks = [F.pad(torch.ones_like(x), (longest - len(x), 0) if left else (0, longest - len(x))) for x in ids]
        return torch.stack(texts), torch.stack(masks)

    with torch.no_grad(), kernels.using(level):
        alone = [decoder(input_ids=x[None], use_cache=False)[0][0] for x in ids]
        for i, x in enumerate(ids):
            cache = decoder(input_ids=x[None, :-new], use_cache=True).past_key_values
            parts = [decoder(input_ids=x[None, j : j + 1], past_key_values=cache)[0][0] for j in range(len(x) - new, len(x))]
            yield f"{i} token by token", torch.cat(parts), alone[i][-new:]
        for left in (True, False):
            texts, mask = padded(left)
            places = (mask.cumsum(1) - 1).clamp(min=0)
            out = decoder(input_ids=texts, attention_mask=mask, position_ids=places, use_cache=False)[0]
            for i in range(len(ids)):
                yield f"{i} padded, {left}", out[i][mask[i] > 0], alone[i]
        texts, mask = padded(True)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        start = {"attention_mask": mask[:, :-new], "position_ids": places[:, :-new]}
        cache = decoder(input_ids=texts[:, :-new], **start, use_cache=True).past_key_values
        for j in range(longest - new, longest):
            here = {"attention_mask": mask[:, : j + 1], "position_ids": places[:, j : j + 1]}
            out = decoder(input_ids=texts[:, j : j + 1], **here, past_key_values=cache)[0]
            for i in range(len(ids)):
                yield f"{i} padded, token by token", out[i][-1], alone[i][j - longest]
