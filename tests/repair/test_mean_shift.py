"""Mean shift: it removes the mean deviation exactly, and its two stored forms are one function."""

from pathlib import Path
from typing import Any

import pytest
import torch

import sordino
from sordino.contract import Move
from sordino.moves import MOVES
from sordino.recipe import MoveSpec, load_recipe
from sordino.repair.mean_shift import MeanShift, mean_input
from tiny import make_tiny

SMALL = {"windows": 16, "seqlen": 32}


def recipe(*moves: dict[str, Any]) -> sordino.Recipe:
    return load_recipe("gptq-w2").model_copy(update={"moves": tuple(MoveSpec(**m) for m in moves), "guard": "off"})


SHIFT: dict[str, Any] = {"move": "mean-shift", "always": True}


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


def test_is_counted(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    result = sordino.quantize(str(model), recipe(SHIFT), tmp_path / "out", **SMALL)
    plain = sordino.quantize(str(model), recipe(), tmp_path / "plain", **SMALL)
    measured = sordino.evaluate(tmp_path / "out", seqlen=32, windows=1)
    assert measured.bits_per_weight == pytest.approx(result.manifest["bits_per_weight"])
    assert result.manifest["bits_per_weight"] > plain.manifest["bits_per_weight"]
