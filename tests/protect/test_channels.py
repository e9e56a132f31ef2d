"""Outlier channels at 8 bits (Atom): function kept, calibration sees what the checkpoint does, outliers worth it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import sordino
from sordino.errors import InputError
from sordino.protect.channels import energy_order
from sordino.recipe import Recipe, load_recipe
from tiny import FAMILIES, assert_same_function, assert_seen_in_the_walk, make_tiny

SMALL: dict[str, Any] = {"windows": 4, "seqlen": 32}
ATOM = 'moves=[{move="channels", count=4}]'


def atom(*overrides: str) -> Recipe:
    return load_recipe("atom-w4a4", [ATOM, "format.weights.group=16", "format.activations.group=16", *overrides])


def test_channels_come_in_order_of_their_energy() -> None:
    x = torch.randn(3, 50, 6) * torch.tensor([3.0, 0.1, 5.0, 1.0, 0.1, 9.0])
    x[..., 4] = x[..., 1]  # equal ones stay in order
    order = energy_order(lambda _: iter([(slice(0, 2), x[:2]), (slice(2, 3), x[2:])]), "qkv")
    assert order.tolist() == [1, 4, 3, 0, 2, 5]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_unchanged(family: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", family, layers=2)
    plain = ["format.weights.bits=16", "format.activations.bits=16", "format.kv.bits=16", "guard=off"]
    sordino.quantize(str(model), atom(*plain), tmp_path / "out", **SMALL)
    names = ("mlp.down_proj", "self_attn.v_proj", "self_attn.o_proj")
    exact, ours, ids = assert_same_function(model, tmp_path / "out", [f"model.layers.1.{n}" for n in names])
    assert torch.equal(exact.generate(ids, max_new_tokens=16), ours.generate(ids, max_new_tokens=16))


@pytest.mark.parametrize("trained", ["", ', {move="tune", epochs=1}', ', {move="distill", epochs=1}'])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_calibration_sees_what_the_checkpoint_does(family: str, trained: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", family, layers=2)
    made = atom("guard=on", "format.kv.bits=16", ATOM.replace("]", f"{trained}]"))
    manifest = sordino.quantize(str(model), made, tmp_path / "out", windows=16, seqlen=48).manifest
    assert_seen_in_the_walk(model, tmp_path / "out", manifest)


def test_kept_outliers_are_worth_their_bits(tmp_path: Path) -> None:
    """With a few loud channels, keeping them beats keeping a single one (spec section 11.8)."""
    model = make_tiny(tmp_path / "model", layers=2)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for layer in loaded.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[[3, 17, 40, 55]] *= 30
    loaded.save_pretrained(model)
    kl = {}
    for count in (1, 4):
        made = atom(f'moves=[{{move="channels", count={count}}}]')
        kl[count] = sordino.quantize(str(model), made, tmp_path / f"{count}", windows=8, seqlen=32).manifest["guard"]["kl"]
    assert kl[4] < 0.7 * kl[1]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (['format.activations={bits=8, mode="static"}', "format.kv.bits=16"], "dynamic"),
        (['moves=[{move="rotate"}, {move="channels"}]'], "leave out 'rotate'"),
        (['moves=[{move="channels", count=40}]'], "fewer than half"),
        (["format.weights.solver=gptaq"], "rtn and gptq"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], words: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    with pytest.raises(InputError, match=words):
        sordino.quantize(str(model), atom(*overrides), tmp_path / "out", **SMALL)
