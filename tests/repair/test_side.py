"""A low-rank pair beside every linear: what the walk saw is what the checkpoint computes, its bits counted."""

from __future__ import annotations

from pathlib import Path

import pytest

import sordino
from sordino.errors import InputError
from sordino.recipe import load_recipe
from sordino.repair import tune
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


def test_a_side_without_a_rank_is_refused(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=1)
    tune = '{move="tune", weights=0, scales=0, inputs=0, clips=0.01, side=true}'
    with pytest.raises(InputError, match="set its rank"):
        sordino.quantize(str(model), load_recipe("quarot-w3a3", [f"moves=[{tune}]", *SMALL]), tmp_path / "out")
