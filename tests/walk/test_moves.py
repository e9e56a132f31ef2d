"""The contract with a toy move per hook: each does one visible thing, and the checkpoint shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import sordino
from sordino.anatomy import SITES, Anatomy, Site
from sordino.contract import BlockContext, FinishContext, Move
from sordino.errors import InputError, SordinoError
from sordino.moves import MOVES
from sordino.numerics.divergence import token_factors
from sordino.recipe import Format, MoveSpec, load_recipe
from tiny import make_tiny

SMALL = {"windows": 32, "seqlen": 64}


class Diary(Move):
    """Writes down every hook it is called at."""

    name = "diary"
    needs_fp_stream = True
    entries: list[tuple[Any, ...]]

    def __init__(self) -> None:
        Diary.entries = []

    def check(self, fmt: Format, anatomy: Anatomy, target: str | None) -> None:
        self.entries.append(("check", fmt.weights.bits, anatomy.n_blocks))

    def survey(self, index: int, block: nn.Module, inputs: Any, artifacts: dict[str, Any]) -> None:
        artifacts.setdefault("seen", []).append(sum(len(w) for _, w in inputs("qkv")))
        self.entries.append(("survey", index))

    def reshape(self, block: nn.Module, index: int, anatomy: Anatomy, artifacts: dict[str, Any]) -> None:
        self.entries.append(("reshape", index))

    def open(self, ctx: BlockContext) -> None:
        self.entries.append(("open", ctx.index, ctx.artifacts["seen"][ctx.index]))

    def before(self, ctx: BlockContext, site: Site) -> None:
        self.entries.append(("before", ctx.index, site))

    def after(self, ctx: BlockContext, site: Site) -> None:
        self.entries.append(("after", ctx.index, site))

    def close(self, ctx: BlockContext) -> None:
        self.entries.append(("close", ctx.index, ctx.error()))

    def finish(self, ctx: FinishContext) -> None:
        self.entries.append(("finish", len(ctx.artifacts["seen"])))


class GainIntoLinears(Move):
    """Reshape: the gain of input_layernorm goes into q, k, v; the function stays."""

    def reshape(self, block: nn.Module, index: int, anatomy: Anatomy, artifacts: dict[str, Any]) -> None:
        norm = block.get_submodule(anatomy.norms["qkv"])
        for linear in anatomy.at("qkv"):
            block.get_submodule(linear.name).weight.mul_(norm.weight)
        norm.weight.fill_(1.0)


class Mirror(Move):
    """Repair in `close`: keeps the rounded block only through snapshot and restore, and checks the context's sums."""

    def close(self, ctx: BlockContext) -> None:
        state, error = ctx.snapshot(), ctx.error()
        for p in ctx.q.parameters():
            p.data = p.data * 2
        ctx.touch("qkv")
        assert ctx.error() > error
        ctx.restore(state)
        assert ctx.error() == error
        assert torch.equal(torch.rand(3, generator=ctx.rng("a")), torch.rand(3, generator=ctx.rng("a")))
        assert not torch.equal(torch.rand(3, generator=ctx.rng("a")), torch.rand(3, generator=ctx.rng("b")))


class LouderNorm(Move):
    """Finish: doubles the final norm."""

    needs_fp_stream = True

    def finish(self, ctx: FinishContext) -> None:
        for parameter in ctx.norm.parameters():
            parameter.data *= 2


class Spoiler(Move):
    """A move that ruins one block, for the guard to catch."""

    def __init__(self, block: int = 1) -> None:
        self.block = block

    def close(self, ctx: BlockContext) -> None:
        if ctx.index == self.block:
            for linear in ctx.anatomy.at("down"):
                ctx.q.get_submodule(linear.name).weight.data.mul_(-5)


class Accountant(Move):
    """Compares sums with and without a cap to their definition, on inputs with a massive token."""

    name = "accountant"
    needs_fp_stream = True
    factors: list[float]

    def __init__(self) -> None:
        Accountant.factors = []

    def before(self, ctx: BlockContext, site: Site) -> None:
        for cap in (None, 4.0):
            n = ctx.anatomy.at(site)[0].in_features
            h, d, least = torch.zeros(n, n).double(), torch.zeros(n, n).double(), 1.0
            for (_, x), (_, exact) in zip(ctx.inputs("q", site), ctx.inputs("fp", site), strict=True):
                f = torch.ones(x.shape[:2]) if cap is None else token_factors(x, cap)
                least = min(least, float(f.min()))
                a, b = ((y * f[..., None]).flatten(0, 1).double() for y in (x, exact))
                h += a.T @ a
                d += (b - a).T @ a
            stats = ctx.stats(site, frozenset({"H", "D"}), cap)
            assert stats.d is not None
            torch.testing.assert_close(stats.h.double(), h, rtol=1e-4, atol=1e-5 * float(h.diagonal().mean()))
            torch.testing.assert_close(stats.d.double(), d, rtol=1e-4, atol=1e-5 * float(h.diagonal().mean()))
            if cap is not None:
                self.factors.append(least)


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, move in {
        "diary": Diary,
        "gain": GainIntoLinears,
        "mirror": Mirror,
        "louder": LouderNorm,
        "spoiler": Spoiler,
        "accountant": Accountant,
    }.items():
        monkeypatch.setitem(MOVES, name, move)


def with_moves(name: str, *moves: str) -> Any:
    recipe = load_recipe(name)
    return recipe.model_copy(update={"moves": tuple(MoveSpec(move=m) for m in moves)})


def test_hooks_run_in_order(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    sordino.quantize(str(model), with_moves("gptq-w4", "diary"), tmp_path / "out", **SMALL)
    expected: list[tuple[Any, ...]] = [("check", 4, 2), ("survey", 0), ("survey", 1)]
    for i in range(2):
        expected += [("reshape", i), ("reshape", i), ("open", i, 32)]
        expected += [(hook, i, site) for site in SITES for hook in ("before", "after")]
        expected += [("close", i)]
    expected += [("finish", 2)]
    got = [e[:2] if e[0] == "close" else e for e in Diary.entries]
    assert got == expected


@pytest.mark.parametrize(("wanted", "seen"), [(None, 32), (5, 5), (99, 32)])
def test_a_survey_sees_the_windows_it_asks_for(
    wanted: int | None, seen: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Diary, "survey_windows", wanted)
    recipe = with_moves("gptq-w4", "diary")
    sordino.quantize(str(make_tiny(tmp_path / "model", layers=1)), recipe, tmp_path / "out", **SMALL)
    assert [e[2] for e in Diary.entries if e[0] == "open"] == [seen]


def test_a_massive_token_is_capped_in_the_sums(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][::7] *= 50
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    sordino.quantize(str(model), with_moves("gptaq-w3", "accountant"), tmp_path / "out", **SMALL)
    assert min(Accountant.factors) < 1.0 and len(Accountant.factors) == 2 * len(SITES)


def test_reshape_changes_storage_but_not_the_function(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model")
    recipe = with_moves("rtn-w4", "gain")
    recipe = load_recipe(recipe, ["format.weights.bits=16", "guard=off"])
    sordino.quantize(str(model), recipe, tmp_path / "out", **SMALL)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    reshaped, tokenizer = sordino.load(tmp_path / "out", dtype=torch.float32)
    assert bool((reshaped.model.layers[0].input_layernorm.weight == 1).all())
    ids = tokenizer("nothing has changed", return_tensors="pt").input_ids
    with torch.no_grad():
        a, b = plain(ids).logits, reshaped(ids).logits
    assert (a - b).norm() <= 1e-4 * a.norm()


def test_context_snapshot_restore_and_random_numbers(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    sordino.quantize(str(model), with_moves("gptq-w3", "mirror"), tmp_path / "out", **SMALL)


def test_finish_edits_what_surrounds_the_blocks(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    recipe = load_recipe(with_moves("rtn-w4", "louder"), ["guard=off"])
    sordino.quantize(str(model), recipe, tmp_path / "out", **SMALL)
    before = AutoModelForCausalLM.from_pretrained(model).model.norm.weight
    assert torch.equal(sordino.load(tmp_path / "out")[0].model.norm.weight, before * 2)


def test_the_final_guard_sees_what_finish_spoilt(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    with pytest.raises(SordinoError, match="worse than RTN"):
        sordino.quantize(str(model), with_moves("rtn-w4", "louder"), tmp_path / "out", **SMALL)


def test_unknown_moves_are_refused_by_name(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    for name, word in (("low-rank", "an option of"), ("men-shift", "unknown")):
        with pytest.raises(InputError, match=f"'{name}'.*{word}"):
            sordino.quantize(str(model), with_moves("rtn-w4", name), tmp_path / "out")
    assert not (tmp_path / "out").exists()
