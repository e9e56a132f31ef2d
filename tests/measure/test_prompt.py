"""Controls of a protected prompt: one and the same in full precision, each another model where numbers are rounded."""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

import sordino
from sordino.errors import InputError
from sordino.measure.prompt import prefix_made_by, put_prefix
from sordino.recipe import MoveSpec, Recipe, load_recipe
from sordino.runtime.cache import PackedLayer
from tiny import make_tiny

SMALL: dict[str, Any] = {"text": heapq.__file__, "windows": 8, "seqlen": 48}
ROUNDED = ("format.weights.bits=3", "format.kv={bits=3, mode='dynamic', symmetric=false}", "guard=off")
EXACT = ("format.weights.bits=16", "guard=off")


def recipe(*sets: str) -> Recipe:
    return load_recipe("rtn-w4", sets).model_copy(update={"moves": (MoveSpec(move="rotate"), MoveSpec(move="rotate-inner"))})


def made(model: Path, out: Path, *sets: str, prompt: str | None = None) -> list[int]:
    manifest = sordino.quantize(str(model), recipe(*sets), out, system_prompt=prompt, **SMALL).manifest
    return list(manifest["prefix"]["ids"]) if prompt else []


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rows_are_one_in_full_precision_and_differ_where_rounded(family: str, tmp_path: Path) -> None:
    """Spec section 11, test 6: nothing rounded, F0 = Q0 and F1 = Q1 = Q2 = Q3; rounded, each is another model."""
    model, text = make_tiny(tmp_path / "model", family), {"text": heapq.__file__, "windows": 2, "seqlen": 32}
    for kind, sets in (("exact", EXACT), ("rounded", ROUNDED)):
        made(model, tmp_path / kind / "q0", *sets)
        ids = made(model, tmp_path / kind / "q3", *sets, prompt="You answer in one line.")
        for name, rounded in (("q1", True), ("q2", False)):
            tensors = prefix_made_by(sordino.load(tmp_path / kind / "q0")[0], ids, rounded)
            put_prefix(tmp_path / kind / "q0", tmp_path / kind / name, ids, tensors)
    f0 = sordino.evaluate(model, **text).ppl
    f1 = sordino.evaluate(model, prefix_from=tmp_path / "exact" / "q3", **text).ppl
    assert f0 is not None and f1 is not None and abs(f0 / f1 - 1) > 1e-3
    ppl = {k: [sordino.evaluate(tmp_path / k / f"q{i}", **text).ppl for i in range(4)] for k in ("exact", "rounded")}
    assert ppl["exact"] == pytest.approx([f0, f1, f1, f1], rel=1e-5)
    assert len({round(x, 3) for x in (f0, f1, *ppl["rounded"]) if x is not None}) == 6


def test_full_precision_in_the_same_basis_makes_what_is_shipped(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model")
    ids = made(model, tmp_path / "shipped", *ROUNDED, prompt="You answer in one line.")
    made(model, tmp_path / "twin", *EXACT)
    tensors = prefix_made_by(sordino.load(tmp_path / "twin")[0], ids, rounded=False)
    shipped = load_file(tmp_path / "shipped" / "model.safetensors")
    assert len(tensors) == 8
    for name, tensor in tensors.items():
        assert torch.allclose(tensor, shipped[name], atol=1e-5), name


def test_what_the_model_rounds_is_what_its_cache_holds(tmp_path: Path) -> None:
    """Q1 is the quantized model with the prompt in its text."""
    model = make_tiny(tmp_path / "model")
    made(model, tmp_path / "q0", *ROUNDED)
    ours, _ = sordino.load(tmp_path / "q0")
    ids, cache = [7, 30, 41, 99, 12], DynamicCache()
    with torch.no_grad():
        ours(torch.tensor([ids]), position_ids=torch.arange(-5, 0)[None], past_key_values=cache)
    tensors = prefix_made_by(ours, ids, rounded=True)
    for i, layer in enumerate(cache.layers):
        assert isinstance(layer, PackedLayer) and layer.keys is not None
        held = layer.grid.unpack(layer.keys, layer.scales[0], 16, torch.float32)
        assert torch.allclose(held, tensors[f"model.layers.{i}.self_attn.prefix_key"], atol=1e-6)
    put_prefix(tmp_path / "q0", tmp_path / "q1", ids, tensors)
    text = torch.randint(2, 300, (2, 20))
    places = torch.arange(-5, 20)[None]  # keys are rounded turned, so their places matter
    with torch.no_grad():
        whole = ours(torch.cat([torch.tensor([ids] * 2), text], 1), position_ids=places).logits[:, 5:]
        mine = sordino.load(tmp_path / "q1")[0](text).logits
    assert float((mine - whole).norm()) <= 1e-4 * float(whole.norm())
    with pytest.raises(InputError, match="already"):
        prefix_made_by(sordino.load(tmp_path / "q1")[0], ids, False)
    with pytest.raises(InputError, match="already"):
        put_prefix(tmp_path / "q1", tmp_path / "again", ids, {})


def test_several_shards_keep_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sordino.walk.assemble.SHARD_BYTES", 40_000)
    model = make_tiny(tmp_path / "model")
    made(model, tmp_path / "q0", *EXACT)
    assert len(list((tmp_path / "q0").glob("*.safetensors"))) > 1
    before, tensors = sordino.load(tmp_path / "q0")[0], prefix_made_by(sordino.load(tmp_path / "q0")[0], [7, 30, 41], False)
    put_prefix(tmp_path / "q0", tmp_path / "q3", [7, 30, 41], tensors)
    loaded, _ = sordino.load(tmp_path / "q3")
    assert all(torch.equal(loaded.get_buffer(n), t) for n, t in tensors.items())
    assert all(torch.equal(loaded.get_parameter(n), p) for n, p in before.named_parameters())
