"""Evening out channels keeps the function on every family, and is the best scaling there is for its measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import sordino
from sordino.errors import InputError
from sordino.recipe import Recipe, load_recipe
from sordino.reshape.smooth import even_scales, value_scales
from tiny import FAMILIES, assert_same_function, make_tiny

SMALL: dict[str, Any] = {"windows": 4, "seqlen": 32}


def recipe(moves: str) -> Recipe:
    return load_recipe("rtn-w4", ["format.weights.bits=16", "guard=off", f"moves=[{moves}]"])


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_unchanged(family: str, turned: bool, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", family, layers=2)
    moves = '{move="smooth"}' + (', {move="rotate-inner"}' if turned else "")
    sordino.quantize(str(model), recipe(moves), tmp_path / "out", **SMALL)
    names = ("mlp.down_proj", "mlp.up_proj", "self_attn.v_proj", "self_attn.o_proj")
    assert_same_function(model, tmp_path / "out", [f"model.layers.1.{n}" for n in names])


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**31))
def test_no_other_scales_are_better(size: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    m, w = torch.rand(2, size, generator=rng, dtype=torch.float64) + 0.01
    best = even_scales(m, w)

    def cost(s: torch.Tensor) -> float:
        return float((s**2 * w).sum() * (m / s**2).sum())

    # The least there can be, by Cauchy and Schwarz; and nothing near is below.
    assert cost(best) == pytest.approx(float((m * w).sqrt().sum() ** 2), rel=1e-9)
    assert all(cost(best) <= cost(best * (0.1 * torch.randn(size, generator=rng)).exp()) * (1 + 1e-9) for _ in range(8))
    assert float(best.log().mean()) == pytest.approx(0, abs=1e-9)


def test_dead_channels_stay_as_they_are() -> None:
    scale = even_scales(torch.tensor([0.0, 1.0, 16.0, 4.0]).double(), torch.tensor([1.0, 1.0, 1.0, 0.0]).double())
    assert scale[0] == scale[3] == 1
    assert scale[1:3].tolist() == pytest.approx([0.5**0.5, 2**0.5])
    assert torch.equal(even_scales(torch.zeros(3).double(), torch.ones(3).double()), torch.ones(3).double())


def test_query_heads_of_a_group_share_their_scales() -> None:
    m, weight = torch.rand(12, dtype=torch.float64), torch.randn(5, 12)  # 2 key heads, 3 query heads each, of 2
    found = value_scales(m, weight, 2, 2)
    w = weight.double().square().sum(0)
    for key in range(2):
        for place in range(2):
            of = [key * 6 + query * 2 + place for query in range(3)]
            expected = (m[of].sum() / w[of].sum()) ** 0.25
            assert float(found[key, place] / found[0, 0]) == pytest.approx(
                float(expected / (m[[0, 2, 4]].sum() / w[[0, 2, 4]].sum()) ** 0.25)
            )


def test_it_takes_a_loud_channel_off_every_token(tmp_path: Path) -> None:
    """up_proj makes one channel a thousand times louder than the others: rounded static inputs lose less afterwards."""
    torch.manual_seed(0)
    model = make_tiny(tmp_path / "model", layers=1)
    loud = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loud.model.layers[0].mlp.up_proj.weight[3] *= 1000
        loud.model.layers[0].mlp.down_proj.weight[:, 3] /= 1000
    loud.save_pretrained(tmp_path / "loud")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "loud" / name).write_bytes((model / name).read_bytes())
    table = 'format.activations={bits=4, mode="dynamic"}'
    kl = {}
    for name, moves in (("plain", ""), ("smooth", '{move="smooth"}')):
        made = load_recipe("rtn-w4", ["format.weights.bits=8", "guard=off", table, f"moves=[{moves}]"])
        sordino.quantize(str(tmp_path / "loud"), made, tmp_path / name, **SMALL)
        kl[name] = sordino.evaluate(tmp_path / name, windows=4, seqlen=32, against=str(model)).kl
    assert kl["smooth"] < 0.8 * kl["plain"]


@pytest.mark.parametrize(
    ("moves", "words"),
    [
        ('{move="rotate-inner"}, {move="smooth"}', "must stand before 'rotate-inner'"),
        ('{move="smooth"}, {move="smooth"}', "stands there twice"),
        ('{move="smooth", values=false, down=false}', "both off"),
    ],
)
def test_what_cannot_work_is_refused_beforehand(moves: str, words: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=1)
    with pytest.raises(InputError, match=words):
        sordino.quantize(str(model), recipe(moves), tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()
