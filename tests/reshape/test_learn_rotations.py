"""Learned rotations keep the function on every family, lower the loss they learn on, and come out the same after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import sordino
from sordino.errors import InputError
from sordino.measure.propagation import basis_of, last_states
from sordino.numerics.basis import Basis, Dense
from sordino.recipe import Recipe, load_recipe
from sordino.reshape.learn_rotations import LearnRotations
from sordino.walk.plan import make_plan
from sordino.walk.source import open_source
from sordino.walk.store import Work
from tiny import STORIES, make_tiny, tell_stories

SMALL: dict[str, Any] = {"windows": 8, "seqlen": 32}
TURNS = '{move="rotate", size="full"}, {move="rotate-inner"}'
LONG = '{move="learn-rotations", steps=40, windows=32, batch=8}'
LEARN = '{move="learn-rotations", steps=6, length=24}'
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "smollm3"]


def learned(*overrides: str) -> Recipe:
    return load_recipe("spinquant-w4a4kv4", ["guard=off", f"moves=[{TURNS}, {LEARN}]", *overrides])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_unchanged(family: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned on rounded inputs and values, then stored with nothing rounded: the reshape is all that is left."""
    model = make_tiny(tmp_path / "model", family, tied=tied, layers=2, hidden_size=96, num_attention_heads=6, ffn=172)
    monkeypatch.setattr(LearnRotations, "check", lambda *_: None)
    rounding = learned().format
    inner = LearnRotations.learn

    def learn(self: LearnRotations, ctx: Any) -> dict[str, torch.Tensor]:
        ctx.format = rounding
        return inner(self, ctx)

    monkeypatch.setattr(LearnRotations, "learn", learn)
    plain = learned("format.weights.bits=16", "format.activations={bits=16}", "format.kv={bits=16}")
    manifest = sordino.quantize(str(model), plain, tmp_path / "out", **SMALL).manifest
    assert manifest["learned"]["learn-rotations"]["kept"]
    exact = AutoModelForCausalLM.from_pretrained(model)
    ours, tokenizer = sordino.load(tmp_path / "out")
    assert ours.config.quantization_config.basis == {"size": 96, "signs": None}
    ids = tokenizer("the function stays", return_tensors="pt").input_ids
    with torch.no_grad():
        a, b = exact(ids).logits, ours(ids).logits
    assert (a - b).norm() <= 1e-4 * a.norm()
    assert torch.equal(exact.generate(ids, max_new_tokens=16), ours.generate(ids, max_new_tokens=16))
    basis = basis_of(ours)  # as `inspect` turns its states back
    assert basis is not None
    torch.testing.assert_close(basis.undo(last_states(ours, ids)), last_states(exact, ids), rtol=1e-3, atol=1e-4)
    start, turned = Basis.whole(96, 0).apply(torch.eye(96)), ours.model.norm.basis.view(torch.float32)
    assert not torch.allclose(start, turned, atol=1e-3)
    torch.testing.assert_close(turned @ turned.T, torch.eye(96), atol=1e-5, rtol=0)


def test_a_killed_run_goes_on_with_what_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    sordino.quantize(str(model), learned(), tmp_path / "whole", **SMALL)
    save, calls = Work.save_block, []

    def dies(self: Work, index: int, *args: Any, **kwargs: Any) -> None:
        calls.append(index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(self, index, *args, **kwargs)

    monkeypatch.setattr(Work, "save_block", dies)
    with pytest.raises(KeyboardInterrupt):
        sordino.quantize(str(model), learned(), tmp_path / "killed", **SMALL)
    monkeypatch.undo()
    monkeypatch.setattr(LearnRotations, "learn", lambda *_: pytest.fail("learned twice"))
    sordino.quantize(str(model), learned(), tmp_path / "killed", **SMALL)
    for name in ("model.safetensors", "sordino.json", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_what_was_measured_is_what_ships(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", "qwen2", layers=2)
    result = sordino.quantize(str(model), learned(), tmp_path / "out", **SMALL)
    ours, _ = sordino.load(tmp_path / "out")
    ours.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    ids = torch.randint(2, 300, (1, 24))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, again(ids).logits)
    size = sordino.evaluate(tmp_path / "out", windows=1, seqlen=16).bits_per_weight
    assert size == pytest.approx(result.manifest["bits_per_weight"])
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(half.model.norm.basis, ours.model.norm.basis)  # loading casts nothing of it


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        ('{move="rotate-inner"}, ' + LEARN, "put 'rotate' before it"),
        (f"{LEARN}, {TURNS}", "must stand behind 'rotate'"),
        ('{move="rotate"}, ' + LEARN + ', {move="rotate-inner"}', "must stand behind 'rotate-inner'"),
        (f"{TURNS}, {LEARN}, {LEARN}", "stands there twice"),
    ],
)
def test_refused_orders(moves: str, message: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=1)
    with pytest.raises(InputError, match=message):
        sordino.quantize(str(model), learned(f"moves=[{moves}]"), tmp_path / "out", **SMALL)


def test_needs_something_rounded(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=1)
    with pytest.raises(InputError, match="the format has none"):
        sordino.quantize(str(model), learned("format.activations={bits=16}", "format.kv={bits=16}"), tmp_path / "out", **SMALL)


@pytest.mark.parametrize("better", [True, False])
def test_kept_only_if_held_out_text_agrees(better: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    losses = iter([2.0, 1.0] if better else [1.0, 2.0])
    monkeypatch.setattr("sordino.reshape.learn_rotations._mean_loss", lambda *_: next(losses))
    result = sordino.quantize(str(model), learned("guard=on"), tmp_path / "out", **SMALL)
    assert result.manifest["learned"]["learn-rotations"]["kept"] is better
    ours, _ = sordino.load(tmp_path / "out")
    assert (ours.config.quantization_config.basis["signs"] is None) is better
    assert hasattr(ours.model.norm, "basis") is better
    size = sordino.evaluate(tmp_path / "out", windows=1, seqlen=16).bits_per_weight
    assert size == pytest.approx(result.manifest["bits_per_weight"])


def test_learning_on_many_windows_lowers_the_loss_of_others(tmp_path: Path) -> None:
    """A trained model, text of its own kind: what was learned on some windows helps on held-out ones."""
    result = sordino.quantize(
        str(STORIES), learned("guard=on", f"moves=[{TURNS}, {LONG}]"), tmp_path / "out",
        text=tell_stories(tmp_path / "stories.txt", 0), windows=32, seqlen=64,
    )  # fmt: skip
    facts = result.manifest["learned"]["learn-rotations"]
    assert facts["kept"] and facts["heldout_loss"][1] < facts["heldout_loss"][0]


def test_doctor_counts_the_model_that_is_in_memory_meanwhile(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2, hidden_size=512, ffn=2048)
    source = open_source(str(model))
    without = make_plan(source, load_recipe("quarot-w4a4kv4"), None, None)
    many, few = (
        make_plan(
            source, learned("guard=on", f"moves=[{TURNS}, {{move='learn-rotations', batch={b}, length=512}}]"), None, None
        )
        for b in (16, 1)
    )
    assert many.memory > few.memory >= without.memory


def test_a_dense_basis_is_undone() -> None:
    matrix = Basis.whole(36, 1).matrix
    x, basis = torch.randn(5, 36, dtype=torch.float64), Dense(matrix)
    torch.testing.assert_close(basis.apply(x), x @ matrix)
    torch.testing.assert_close(basis.undo(basis.apply(x)), x)
