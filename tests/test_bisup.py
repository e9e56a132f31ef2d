"""Hosts of the BiSup-style reconstruction, and what training does to them, on a trained model (spec section 11.8)."""

from __future__ import annotations

from pathlib import Path

import pytest

import sordino
from sordino.recipe import load_recipe
from tiny import STORIES, tell_stories


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("stories")
    return tell_stories(folder / "calibrate.txt", 0), tell_stories(folder / "evaluate.txt", 1)


def divergence(recipe: str, text: tuple[str, str], out: Path, *overrides: str) -> float:
    """KL to full precision on other stories, in nats a token."""
    made = load_recipe(recipe, ["guard=off", *overrides])
    sordino.quantize(str(STORIES), made, out, text=text[0], windows=24, seqlen=256)
    found = sordino.evaluate(out, text=text[1], windows=16, seqlen=256, against=str(STORIES)).kl
    assert found is not None
    return found


def test_hosts_stand_in_the_order_that_they_should(text: tuple[str, str], tmp_path: Path) -> None:
    few = "moves=[{move='channels', count=4}]"
    kl = {
        "quarot 4": divergence("quarot-w4a4", text, tmp_path / "a"),
        "quarot 3": divergence("quarot-w3a3", text, tmp_path / "b"),
        "quarot 3, rtn": divergence("quarot-w3a3", text, tmp_path / "c", "format.weights.solver=rtn"),
        "not turned 3": divergence("quarot-w3a3", text, tmp_path / "d", "moves=[]"),
        "atom 4": divergence("atom-w4a4", text, tmp_path / "e", few),
        "atom 3": divergence("atom-w3a3", text, tmp_path / "f", few),
        "atom 3, rtn": divergence("atom-w3a3", text, tmp_path / "h", few, "format.weights.solver=rtn"),
        "atom 3, more kept": divergence("atom-w3a3", text, tmp_path / "g", "moves=[{move='channels', count=16}]"),
    }
    assert kl["quarot 4"] < kl["quarot 3"] < min(kl["quarot 3, rtn"], kl["not turned 3"])
    assert kl["atom 4"] < kl["atom 3"] < kl["atom 3, rtn"]
    assert kl["atom 3, more kept"] < kl["atom 3"]


@pytest.mark.parametrize(("recipe", "tune"), [("bisup-quarot-w3a3", 2), ("bisup-atom-w3a3", 1)])
def test_training_gives_back_some_of_what_3_bits_took(recipe: str, tune: int, text: tuple[str, str], tmp_path: Path) -> None:
    host = divergence(recipe.removeprefix("bisup-"), text, tmp_path / "host")
    assert divergence(recipe, text, tmp_path / "ours", f"moves.{tune}.epochs=8") < 0.9 * host
