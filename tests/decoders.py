"""Tiny checkpoints of every kind that the kernels know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import sordino
from sordino.moves import MOVES
from sordino.recipe import load_recipe
from sordino.runtime.prefix import prefix_length
from tiny import Fixed, make_tiny

SMALL: dict[str, Any] = {"windows": 8, "seqlen": 48}

CENTER = "{move='center'}"
RECIPES: dict[str, tuple[str, list[str]]] = {
    "weights alone": ("rtn-w4", []),
    "2 bits, a scale a row": ("rtn-w4", [f"format.weights.{x}" for x in ("bits=2", "symmetric=true", 'group="channel"')]),
    "norms with a bias": ("d2quant-paper-w3", []),
    "additive grids": ("d2quant-w3", []),
    "static, prefix, R3, R4": ("prefixquant-w4a4kv4-static", []),
    "dynamic, prefix, R3, R4": ("prefixquant-w4a4kv4-dynamic", []),
    "groups of weights, rounded inputs": ("w4a4kv4", ['moves=[{move="rotate-inner"}]']),
    "groups of channels": ("quarot-w4a4", []),
    "groups of channels, zero points": ("quarot-w4a4", ["format.activations.symmetric=false"]),
    "zero points by token": ("prefixquant-w4a4kv4-dynamic", ["format.activations.symmetric=false"]),
    "no means": ("w4a4kv4", [f"moves=[{CENTER}, {{move='rotate', size='full'}}, {{move='rotate-inner'}}, {{move='prefix'}}]"]),
    "no means, unturned": ("w4a4kv4", [f"moves=[{CENTER}]"]),
    "R3, plain cache": ("rtn-w4", ["moves=[{move='rotate-inner'}]"]),
    "R3, no means, plain cache": ("rtn-w4", [f"moves=[{CENTER}, {{move='rotate-inner'}}]"]),
    "integer products": ("w8a8", []),
    "3-bit cache": ("rtn-w4", ['format.kv={bits=3, mode="dynamic", symmetric=true}']),
}


def tiny_checkpoint(
    folder: Path, recipe: str, sets: list[str], family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """A tiny model, quantized by a recipe that may put three tokens before every text, and loaded."""
    make_tiny(folder / "model", family, layers=2, **options)
    made = load_recipe(recipe, [*sets, "guard=off"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MOVES, "prefix", Fixed)
        sordino.quantize(str(folder / "model"), made, folder / "out", **SMALL)
    model = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=dtype).eval()
    assert prefix_length(model) == 3 * any(m.move == "prefix" for m in made.moves)
    return model
