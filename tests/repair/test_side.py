"""A low-rank pair beside every linear: what the walk saw is what the checkpoint computes, its bits counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sordino
from sordino.errors import InputError
from sordino.recipe import load_recipe
from sordino.repair import clip, low_rank, tune
from sordino.rounding import Rounded
from sordino.runtime.modules import QuantLinear
from tiny import assert_seen_in_the_walk, make_tiny

HOSTS = ['{move="rotate", size="full"}, {move="rotate-inner"}', '{move="channels", count=4}']
TUNE = '{move="tune", epochs=4, weights=0, scales=0, inputs=0, gains=0, rank=8, side=true}'
SMALL = ["format.weights.group=16", "format.activations.group=16", "format.kv.bits=16"]


@pytest.mark.parametrize("last", ["", ', {move="distill", epochs=1}'])
@pytest.mark.parametrize("host", HOSTS)
def test_what_was_trained_is_what_the_checkpoint_computes(
    host: str, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "better", lambda *_: True)  # of random weights, the last bits decide whether it is
    model = make_tiny(tmp_path / "model", "qwen2", layers=2)
    recipe = load_recipe("quarot-w3a3", [f"moves=[{host}, {TUNE}{last}]", *SMALL])
    manifest = sordino.quantize(str(model), recipe, tmp_path / "out", windows=16, seqlen=48).manifest
    assert all(b["moves"]["tune"]["kept"] for b in manifest["blocks"])
    ours, _ = sordino.load(tmp_path / "out")
    linears = [m for m in ours.modules() if isinstance(m, QuantLinear)]
    assert all(m.side_a.shape == (8, m.in_features) for m in linears) and any(m.side_b.any() for m in linears)
    assert_seen_in_the_walk(model, tmp_path / "out", manifest)


def test_it_is_worth_its_bits_at_3_bits(tmp_path: Path) -> None:
    """Beside the weight a pair of half the width takes most of the error away, more than one that is merged can."""
    model, kl = make_tiny(tmp_path / "model", layers=2), {}
    for name, more in (("merged", "rank=32"), ("side", "rank=32, side=true")):
        tune = f'{{move="tune", epochs=2, weights=0, scales=0, inputs=0, gains=0, {more}}}'
        recipe = load_recipe("gptq-w3", [f"moves=[{tune}]", "format.weights.group=16"])
        kl[name] = sordino.quantize(str(model), recipe, tmp_path / name, windows=16, seqlen=48).manifest["guard"]["kl"]
    assert kl["side"] < 0.5 * kl["merged"]


PLAIN = "weights=0, scales=0, inputs=0, gains=0"
ONE, SMOOTH = f'{{move="tune", {PLAIN}, rank=4, side=true}}', f'{{move="tune", {PLAIN}, smooth=0.002}}'
DOWN = 'format.weights.override=[{match="*.down_proj", column_scale=true}]'


@pytest.mark.parametrize(
    ("moves", "more", "words"),
    [
        (f'{{move="tune", {PLAIN}, clips=0.01, side=true}}', [], "set its rank"),
        (f"{TUNE}, {ONE}", [], "not of 4 and 8"),
        (f"{ONE}, {SMOOTH}", [], "smooth and pairs"),
        (ONE.replace("side", "smooth=0.002, side"), [], "smooth and pairs"),
        (ONE, [DOWN], "column scale and a pair"),
    ],
)
def test_what_does_not_go_with_a_side_is_refused_before_the_walk(
    moves: str, more: list[str], words: str, tmp_path: Path
) -> None:
    model = make_tiny(tmp_path / "model", layers=1)
    recipe = load_recipe("gptq-w3", [f"moves=[{moves}]", "format.weights.group=16", *more])
    with pytest.raises(InputError, match=words):
        sordino.quantize(str(model), recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_second_tuning_has_a_note_of_its_own(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=1)
    moves = f'{{move="tune", {PLAIN}, clips=0.1, epochs=1}}, {{move="tune", epochs=1, inputs=0}}'
    recipe = load_recipe("gptq-w3", [f"moves=[{moves}]", "format.weights.group=16"])
    (block,) = sordino.quantize(str(model), recipe, tmp_path / "out", windows=8, seqlen=32).manifest["blocks"]
    assert {"kept", "before", "after"} <= block["moves"]["tune"].keys() & block["moves"]["tune 2"].keys()


def test_an_update_before_a_column_scale_starts_from_the_error_in_its_own_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding to 4 bits errs by a small share of what is rounded, whatever columns are multiplied by afterwards."""
    latents: list[torch.Tensor] = []
    shares: list[float] = []

    def rounded_from(rounded: Rounded) -> torch.Tensor:
        latents.append(clip.rounded_from(rounded))
        return latents[-1]

    def error_directions(error: torch.Tensor, h: torch.Tensor, tokens: int, rank: int) -> torch.Tensor:
        shares.append(float(error.norm() / latents[-1].norm()))
        return low_rank.error_directions(error, h, tokens, rank)

    monkeypatch.setattr(tune, "rounded_from", rounded_from)
    monkeypatch.setattr(tune, "error_directions", error_directions)
    model = make_tiny(tmp_path / "model", layers=1)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] *= torch.linspace(-2, 2, 64).exp().to(torch.bfloat16)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    own = 'format.weights.override=[{match="*.q_proj", column_scale=true}]'
    moves = f'moves=[{{move="tune", {PLAIN}, epochs=1, rank=4}}]'
    sordino.quantize(str(model), load_recipe("gptq-w4", [moves, own]), tmp_path / "out", windows=8, seqlen=32)
    assert "model.layers.0.self_attn.q_proj.column_scale" in sordino.load(tmp_path / "out")[0].state_dict()
    assert len(shares) == 7 and max(shares) < 0.3
