"""Bits of inputs, keys and values, against the formats' arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest

import sordino
from tiny import make_tiny

OPTIONS = {"windows": 8, "seqlen": 48, "overrides": ("guard=off",)}


@pytest.mark.parametrize(
    ("recipe", "inputs", "kv"),
    [
        ("rtn-w4", None, None),
        # head size 16: 8 bytes of codes, a bf16 scale and a byte for the zero point
        ("quarot-w4a4", 4.0, (64 + 16 + 8) / 16),
        ("prefixquant-w4a4kv4-static", 4.0, 4.0),
        # 4 channels of 64 (six linears) and of 96 (down_proj) at 8 bits
        ("atom-w3a3", 3 + 5 * 4 * 7 / (6 * 64 + 96), (64 + 16 + 8) / 16),
    ],
)
def test_bits_of_operands(recipe: str, inputs: float | None, kv: float | None, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    options = dict(OPTIONS)
    if recipe.startswith("atom"):
        options["overrides"] = ("guard=off", 'moves=[{move="channels", count=4}]')
    sordino.quantize(str(model), recipe, tmp_path / "out", **options)  # type: ignore[arg-type]
    row = sordino.evaluate(tmp_path / "out", seqlen=32, windows=1).to_json()
    assert row["bits_per_input"] == (None if inputs is None else pytest.approx(inputs))
    assert row["bits_per_kv"] == (None if kv is None else pytest.approx(kv))
