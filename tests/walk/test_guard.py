"""Guards: a block that is worse than RTN is replaced by RTN, by name; a model worse than RTN fails the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sordino
from sordino.contract import BlockContext, Move
from sordino.errors import SordinoError
from sordino.moves import MOVES
from sordino.recipe import MoveSpec, load_recipe
from sordino.round.gptq import GptqSolver
from sordino.rounding import Grid, Rounded, Stats
from sordino.walk.ends import Ends
from tiny import make_tiny

SMALL = {"windows": 32, "seqlen": 64}


good = GptqSolver.solve


def bad(self: GptqSolver, w: Tensor, prepared: object, grid: Grid, group: int) -> Rounded:
    rounded = good(self, w, prepared, grid, group)  # type: ignore[arg-type]
    rounded.codes = rounded.codes.flip(1)  # a classic indexing error
    return rounded


def test_a_bad_solver_falls_back_to_rtn_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny(tmp_path / "model")
    monkeypatch.setattr(GptqSolver, "solve", bad)
    result = sordino.quantize(str(model), "gptq-w4", tmp_path / "out", **SMALL)
    assert [b.get("fallback") for b in result.manifest["blocks"]] == ["rtn"] * 4
    assert all(b["refused_error"] > b["error"] == b["rtn_error"] for b in result.manifest["blocks"])
    sordino.quantize(str(model), "rtn-w4", tmp_path / "rtn")
    ours, rtn = sordino.load(tmp_path / "out")[0].state_dict(), sordino.load(tmp_path / "rtn")[0].state_dict()
    assert all(torch.equal(ours[k], rtn[k]) for k in rtn)


def test_guard_off_keeps_what_the_solver_made(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    result = sordino.quantize(str(model), "gptq-w4", tmp_path / "out", overrides=("guard=off",), **SMALL)
    assert result.manifest["guard"] == {}
    assert not any("error" in b for b in result.manifest["blocks"])


def test_guard_tell_says_what_is_worse_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny(tmp_path / "model")
    monkeypatch.setattr(GptqSolver, "solve", bad)
    with pytest.raises(SordinoError, match="worse than RTN"):  # of the whole
        sordino.quantize(str(model), "gptq-w4", tmp_path / "out", overrides=("guard=tell",), **SMALL)
    blocks = json.loads((tmp_path / "out" / "sordino.json").read_text())["blocks"]
    assert [b.get("fallback") for b in blocks] == [None] * 4 and blocks[0]["error"] > 1.1 * blocks[0]["rtn_error"]


def test_final_guard_fails_the_run_and_marks_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny(tmp_path / "model", layers=2)

    def worse(self: Ends, *_: object) -> None:
        self.guard = {"kl": 0.5, "rtn_kl": 0.4}

    monkeypatch.setattr(Ends, "final_guard", worse)
    with pytest.raises(SordinoError, match="worse than RTN") as caught:
        sordino.quantize(str(model), "gptq-w4", tmp_path / "out", **SMALL)
    assert caught.value.exit_code == 1
    assert json.loads((tmp_path / "out" / "sordino.json").read_text())["guard"]["failed"]
    sordino.load(tmp_path / "out")  # kept and loadable


def test_activations_that_are_not_finite_name_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny(tmp_path / "model", layers=2)

    def infinite(self: GptqSolver, stats: Stats, group: int) -> object:
        stats.h[0, 0] = float("inf")
        return original(self, stats, group)

    original = GptqSolver.prepare
    monkeypatch.setattr(GptqSolver, "prepare", infinite)
    with pytest.raises(SordinoError, match=r"block 0, qkv: .*not finite"):
        sordino.quantize(str(model), "gptq-w4", tmp_path / "out", **SMALL)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_fallback_takes_everything_back_that_moves_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ruin(Move):
        def close(self, ctx: BlockContext) -> None:
            for parameter in ctx.q.parameters():
                parameter.data = -3 * parameter.data
            ctx.touch("qkv")

    monkeypatch.setitem(MOVES, "ruin", Ruin)
    model = make_tiny(tmp_path / "model", layers=2)
    moves = (MoveSpec(move="mean-shift", always=True, final=True), MoveSpec(move="ruin"))
    recipe = load_recipe("gptq-w4").model_copy(update={"moves": moves})
    result = sordino.quantize(str(model), recipe, tmp_path / "out", **SMALL)
    blocks = result.manifest["blocks"]
    assert [b.get("fallback") for b in blocks] == ["rtn"] * 2 and not any("moves" in b for b in blocks)
    assert blocks[-1]["refused_moves"]["mean-shift"]["final_kept"]
    sordino.quantize(str(model), "rtn-w4", tmp_path / "rtn")
    ours, rtn = sordino.load(tmp_path / "out")[0].state_dict(), sordino.load(tmp_path / "rtn")[0].state_dict()
    assert all(torch.equal(ours[k], rtn[k]) for k in rtn)
    assert len(set(ours) - set(rtn)) == 3 and all(not ours[k].any() for k in set(ours) - set(rtn))
