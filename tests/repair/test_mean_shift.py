"""Mean shift: it removes the mean deviation exactly, and its two stored forms are one function."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sordino
from sordino.contract import Move
from sordino.corpus import DEFAULT_TEXT, calibration_windows, load_text, tokenize
from sordino.moves import MOVES
from sordino.recipe import MoveSpec, load_recipe
from sordino.repair import mean_shift
from sordino.repair.mean_shift import MeanShift, mean_input
from tiny import make_tiny

SMALL = {"windows": 16, "seqlen": 32}


def recipe(*moves: dict[str, Any]) -> sordino.Recipe:
    return load_recipe("gptq-w2").model_copy(update={"moves": tuple(MoveSpec(**m) for m in moves), "guard": "off"})


SHIFT: dict[str, Any] = {"move": "mean-shift", "always": True}
FINAL = SHIFT | {"final": True}


def test_nothing_of_the_mean_deviation_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    class Watch(Move):
        def after(self, ctx: Any, site: str) -> None:
            if site == "o":
                seen.append(float((mean_input(ctx, "fp") - mean_input(ctx, "q")).abs().max()))

    monkeypatch.setitem(MOVES, "watch", Watch)
    model = make_tiny(tmp_path / "model", layers=2)
    sordino.quantize(str(model), recipe({"move": "watch"}, SHIFT, {"move": "watch"}), tmp_path / "out", **SMALL)
    assert min(seen[0], seen[2]) > 1e-3 and max(seen[1], seen[3]) < 1e-5


def test_a_teacher_that_is_off_by_a_constant_gives_that_constant() -> None:
    class Context:
        anatomy: Any = type(
            "A", (), {"norms": {"gate_up": "norm"}, "at": lambda self, site: [type("L", (), {"in_features": 4})]}
        )()
        given: Any = None
        norm = None

        def __init__(self) -> None:
            self.notes: dict[str, Any] = {}

        def inputs(self, which: str, site: str, split: str = "calib", stream: str | None = None) -> Any:
            x = torch.arange(24.0).view(2, 3, 4) + (0.2 if which == "fp" else 0.0)
            return iter([(slice(0, 2), x)])

        def shift(self, module: str, bias: torch.Tensor) -> None:
            self.given = bias

        def stream(self, name: str, split: str = "calib") -> torch.Tensor:
            return torch.zeros(2, 3, 4)

    ctx = Context()
    MeanShift(always=True).after(ctx, "o")  # type: ignore[arg-type]
    assert torch.allclose(ctx.given, torch.full((4,), 0.2), atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("rotated", [False, True])
def test_both_forms_give_the_same_logits_and_load(family: str, rotated: bool, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", family, layers=2)
    first = [{"move": "rotate"}] if rotated else []
    logits = []
    for form in ("norm", "linear"):
        # down is left alone: it would be rounded with statistics that differ by rounding errors
        plain = load_recipe(recipe(*first, SHIFT | {"form": form}), ['format.weights.ignore=["*.down_proj"]'])
        sordino.quantize(str(model), plain, tmp_path / form, **SMALL)
        ours, tokenizer = sordino.load(tmp_path / form, dtype=torch.float32)
        ids = tokenizer("one function in two forms", return_tensors="pt").input_ids
        with torch.no_grad():
            logits.append(ours(ids).logits)
        ours.save_pretrained(tmp_path / f"{form}-again")
        again = (tmp_path / f"{form}-again" / "model.safetensors").read_bytes()
        assert again == (tmp_path / form / "model.safetensors").read_bytes()
    assert ours.model.layers[0].mlp.up_proj.bias is not None
    assert (logits[0] - logits[1]).norm() <= 1e-3 * logits[0].norm()


@pytest.mark.parametrize("shift", [SHIFT, FINAL])
def test_is_counted(shift: dict[str, Any], tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    result = sordino.quantize(str(model), recipe(shift), tmp_path / "out", **SMALL)
    plain = sordino.quantize(str(model), recipe(), tmp_path / "plain", **SMALL)
    measured = sordino.evaluate(tmp_path / "out", seqlen=32, windows=1)
    assert measured.bits_per_weight == pytest.approx(result.manifest["bits_per_weight"])
    assert result.manifest["bits_per_weight"] > plain.manifest["bits_per_weight"]


@pytest.mark.parametrize("rotated", [False, True])
def test_final_norm_gets_what_rounding_the_last_mlp_moved_its_mean_by(rotated: bool, tmp_path: Path) -> None:
    """Against the stored model itself, once as it is and once with the last MLP as the source has it."""
    model = make_tiny(tmp_path / "model", layers=2)
    first = [{"move": "rotate"}] if rotated else []
    recipe_ = load_recipe(recipe(*first, FINAL), ['format.weights.ignore=["*.self_attn.*"]'])
    sordino.quantize(str(model), recipe_, tmp_path / "out", text=DEFAULT_TEXT, seed=0, **SMALL)
    ours, tokenizer = sordino.load(tmp_path / "out", dtype=torch.float32)
    # Attention is exact, so the teacher of the final norm is the first block as stored and the second as it was.
    sordino.quantize(str(model), load_recipe(recipe(*first), ['format.weights.ignore=["*"]']), tmp_path / "exact", **SMALL)
    exact, _ = sordino.load(tmp_path / "exact", dtype=torch.float32)
    exact.model.layers[0] = ours.model.layers[0]
    ids = tokenize(load_text(DEFAULT_TEXT), tokenizer)
    windows = calibration_windows(ids, SMALL["seqlen"], SMALL["windows"], 4, 0)[: SMALL["windows"]]
    with torch.no_grad():
        means = [m.model(windows).last_hidden_state.flatten(0, 1).mean(0) for m in (exact, ours)]
    bias = ours.model.norm.bias
    assert bias.abs().max() > 1e-3 and torch.allclose(means[0], means[1], atol=1e-5)


def test_distillation_learns_from_the_norm_without_the_shift(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    shifted, plain = (
        sordino.quantize(
            str(model),
            load_recipe("gptq-w2").model_copy(update={"moves": tuple(MoveSpec(**m) for m in moves)}),
            tmp_path / f"{len(moves)}",
            **SMALL,
        ).manifest
        for moves in ([FINAL, {"move": "distill", "epochs": 1}], [])
    )
    assert shifted["guard"]["fp_ppl"] == plain["guard"]["fp_ppl"]
    assert shifted["finish"]["distill"]["kl_after"] == pytest.approx(shifted["guard"]["kl"], rel=1e-4)
    assert shifted["blocks"][-1]["moves"]["mean-shift"]["final_kept"]


def test_a_final_shift_that_does_not_help_is_dropped_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mean_shift, "final_deviation", lambda *_: (1.0, 2.0))
    model = make_tiny(tmp_path / "model", layers=2)
    moves = (MoveSpec(move="mean-shift", final=True),)
    sordino.quantize(str(model), load_recipe("gptq-w2").model_copy(update={"moves": moves}), tmp_path / "out", **SMALL)
    assert not sordino.load(tmp_path / "out")[0].model.norm.bias.any()
    assert "shift of the final norm" in (tmp_path / "out" / "report.html").read_text()


def test_without_held_out_text_no_figure_is_made_up(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    sordino.quantize(str(model), recipe(FINAL), tmp_path / "out", **SMALL)
    text = (tmp_path / "out" / "sordino.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["blocks"][-1]["moves"]["mean-shift"]["final_kept"]
