"""PrefixQuant's presets through the main path: what calibration and tuning saw is what the checkpoint computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import sordino
from sordino.corpus import DEFAULT_TEXT, calibration_windows, load_text, tokenize
from sordino.moves import MOVES
from sordino.recipe import load_recipe, presets
from tiny import IDS, Fixed, make_tiny

SMALL: dict[str, Any] = {"windows": 16, "seqlen": 48}
NAMES = [n for n in presets() if n.startswith(("prefixquant-", "quarot-", "spinquant-", "w4a"))]


@pytest.fixture(autouse=True)
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MOVES, "prefix", Fixed)


def test_all_presets_of_the_paper_are_there() -> None:
    kinds = [f"prefixquant-w4a{a}kv4-{m}{t}" for a in (4, 8) for m in ("static", "dynamic") for t in ("", "-tuned")]
    assert set(kinds) | {"quarot-w4a4kv4", "spinquant-w4a4kv4"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_calibration_saw_is_what_ships(name: str, tmp_path: Path) -> None:
    family = ("llama", "qwen2", "qwen3", "smollm3")[NAMES.index(name) % 4]
    model = make_tiny(tmp_path / "model", family, layers=2)
    overrides = ["format.activations.bits=8"]  # at 4 bits one code that falls the other way shows in the whole model
    manifest = sordino.quantize(str(model), load_recipe(name, overrides), tmp_path / "out", **SMALL).manifest
    ours, tokenizer = sordino.load(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(model)
    begins = torch.tensor([IDS] * 4) if not name.startswith(("quarot", "spinquant")) else torch.empty(4, 0, dtype=torch.long)
    windows = calibration_windows(tokenize(load_text(DEFAULT_TEXT), tokenizer), 48, 16, 4, 0)[16:]
    with torch.no_grad():
        q = ours(windows, use_cache=False).logits.log_softmax(-1)
        p = plain(torch.cat([begins, windows], 1)).logits[:, begins.shape[1] :].log_softmax(-1)
        cached = ours(windows, use_cache=True).logits.log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(manifest["guard"]["kl"], rel=1e-2)
    assert float((q.exp() * (q - cached)).sum(-1).mean().abs()) < 1e-3 * manifest["guard"]["kl"]
    size = sordino.evaluate(tmp_path / "out", windows=1, seqlen=16).bits_per_weight
    assert size == pytest.approx(manifest["bits_per_weight"])


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_tuning_trains_the_scales_of_inputs_keys_and_values(mode: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=1)
    found = {}
    for rate in (1e-9, 0.01):
        options = f"weights=0.0, scales=0.0, gains=0.0, inputs={rate}, epochs=32, batch=16"
        tune = f'moves=[{{move="rotate-inner"}}, {{move="tune", {options}}}]'
        made = load_recipe(f"prefixquant-w4a4kv4-{mode}-tuned", [tune, "guard=off"])
        manifest = sordino.quantize(str(model), made, tmp_path / str(rate), **SMALL).manifest
        found[rate] = sordino.load(tmp_path / str(rate))[0].model.layers[0], manifest["blocks"][0]["moves"]["tune"]["loss"]
    (before, flat), (after, falling) = found.values()
    assert flat[1] == pytest.approx(flat[0], rel=1e-3)
    # Static ones start at the best of a random block; tests/repair/test_input_spaces.py trains them from elsewhere.
    assert falling[1] < (0.98 if mode == "dynamic" else 1.05) * falling[0]
    changed = []
    for scale in ("self_attn.key_scale", "self_attn.value_scale", "mlp.down_proj.input_scale", "self_attn.q_proj.input_scale"):
        a, b = before.get_buffer(scale), after.get_buffer(scale)
        changed.append(not torch.equal(a, b))
        assert torch.equal(b.bfloat16().float(), b.float())
    assert sum(changed) >= 2  # a small step may end on the stored number it began with
    assert torch.equal(after.self_attn.q_proj.input_scale, after.self_attn.k_proj.input_scale)
    assert torch.equal(before.mlp.up_proj.weight_packed, after.mlp.up_proj.weight_packed)


def test_distillation_trains_them_too_and_takes_it_back_if_it_does_not_help(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    scales = {}
    for rate in (1e-9, 0.003, 1.0):  # the last one ruins the model: nothing of it may stay
        options = f"epochs=4, scales=0.0, gains=0.0, inputs={rate}"
        made = load_recipe("prefixquant-w4a4kv4-static", [f'moves=[{{move="distill", {options}}}]'])
        manifest = sordino.quantize(str(model), made, tmp_path / str(rate), **SMALL).manifest
        scales[rate] = (
            [float(b.mlp.down_proj.input_scale) for b in sordino.load(tmp_path / str(rate))[0].model.layers],
            manifest["finish"]["distill"]["kept"],
        )
    assert scales[0.003][1] and scales[0.003][0] != scales[1e-9][0]
    assert not scales[1.0][1] and scales[1.0][0] == scales[1e-9][0]
