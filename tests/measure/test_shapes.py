"""Random checkpoints hold what real ones of the same recipe hold, and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import sordino
from sordino.anatomy import skeleton
from sordino.errors import InputError
from sordino.measure.bench import bench
from sordino.measure.shapes import SHAPES, random_checkpoint, shape, stored
from tiny import FAMILIES, make_tiny

# Parameters as published with the models, in millions (a table that is tied counts once).
PUBLISHED = {
    "smollm2-135m": 134.5, "llama-3.2-1b": 1235.8, "llama-3.2-3b": 3212.7, "llama-3-8b": 8030.3, "mistral-7b": 7248.0,
    "qwen2.5-0.5b": 494.0, "qwen2.5-7b": 7615.6, "qwen3-0.6b": 596.0,
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_as_many_parameters_as_the_models(name: str) -> None:
    config = dict(shape(name))
    model = skeleton(AutoConfig.for_model(config.pop("model_type"), **config))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PUBLISHED[name], rel=1e-3)


@pytest.mark.parametrize("recipe", ["rtn-w4", "w8a8", "prefixquant-w4a4kv4-static", "d2quant-w3"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "olmo2"])
def test_a_random_checkpoint_holds_what_a_real_one_does(family: str, recipe: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", family, layers=2)
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    # Found outliers decide how long a real prefix is: without the move the layouts must be the same to the last tensor.
    chosen = sordino.recipe.load_recipe(recipe, ["guard=off"])
    chosen = chosen.model_copy(update={"moves": tuple(m for m in chosen.moves if m.move != "prefix")})
    sordino.quantize(str(model), chosen, tmp_path / "out", windows=4, seqlen=32)
    (tmp_path / "own.toml").write_text(chosen.to_toml())
    real, ours = sordino.load(tmp_path / "out")[0], random_checkpoint(config, stored(config, str(tmp_path / "own.toml")))
    a, b = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in (real, ours))
    assert {n: t.shape for n, t in a.items()} == {n: t.shape for n, t in b.items()}
    assert not any(t.is_meta for t in b.values())
    if recipe.startswith("prefixquant"):
        ours = random_checkpoint(config, stored(config, recipe))
        assert ours.model.layers[0].self_attn.prefix_key.shape[2] == 2  # type: ignore[union-attr, index]
    assert torch.isfinite(ours(torch.randint(2, 300, (1, 40)), use_cache=True).logits).all()


def test_bench_by_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    monkeypatch.setitem(SHAPES, "tiny", json.loads((model / "config.json").read_text()))
    found = bench(shapes=["tiny"], recipes=["rtn-w4", "w8a8"], prompt_tokens=20, new_tokens=2, threads=1)
    rows = found.to_json()["models"]
    assert [r["model"] for r in rows] == ["tiny rtn-w4", "tiny w8a8", "bf16 twin", "fp32 twin"]
    assert all(r["prefill_tokens_per_s"] > 0 for r in rows) and rows[0]["ratio_to_bf16"]["decode"] > 0


def test_twins_that_have_no_room_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sordino.measure import bench as module

    model = make_tiny(tmp_path / "model", layers=1)
    weights = sum(p.numel() for p in sordino.load(model)[0].parameters())
    memory = type("Memory", (), {"available": 3 * weights / 0.8})()
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: memory)
    rows = bench([model], prompt_tokens=5, new_tokens=1, threads=1).to_json()["models"]
    assert [r["model"] for r in rows] == [str(model), "bf16 twin"]
    assert rows[0]["ratio_to_fp32"] is None and rows[0]["ratio_to_bf16"] is not None


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(InputError, match=r"did you mean 'llama-3\.2-1b'"):
        bench(shapes=["llama3.2-1b"])
    with pytest.raises(InputError, match="nothing to measure"):
        bench()
    with pytest.raises(InputError, match=r"9000 tokens .* 8192 positions of llama-3-8b"):
        bench(shapes=["llama-3-8b"], prompt_tokens=8990, new_tokens=10)
