"""Tuning and distillation through the main path; on random tiny models, so mechanics are tested here, not quality."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import sordino
from sordino.errors import InputError
from sordino.moves import MOVES
from sordino.recipe import MoveSpec, load_recipe
from sordino.repair.distill import Distill, HeadDivergence
from sordino.walk import plan as plan_module
from sordino.walk.store import Work
from tiny import assert_seen_in_the_walk, make_tiny

SMALL = {"windows": 64, "seqlen": 32}


def recipe(*moves: dict[str, Any], base: str = "gptaq-w2") -> sordino.Recipe:
    return load_recipe(base).model_copy(update={"moves": tuple(MoveSpec(**m) for m in moves)})


TUNE: dict[str, Any] = {"move": "tune", "epochs": 3, "batch": 4, "weights": 0.01}
DISTILL: dict[str, Any] = {"move": "distill", "epochs": 3, "batch": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "olmo2"])
def test_tuned_blocks_are_better_on_held_out_windows(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", family, dtype, layers=2)
    result = sordino.quantize(str(model), recipe(TUNE), tmp_path / "out", **SMALL)
    notes = [b["moves"]["tune"] for b in result.manifest["blocks"]]
    assert all(n["kept"] == (n["after"] < n["before"]) for n in notes) and any(n["kept"] for n in notes)


@pytest.mark.parametrize("guard", ["on", "tell"])
def test_a_tuning_that_does_harm_is_undone(guard: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    wild = load_recipe(recipe(TUNE | {"weights": 1.0, "scales": 1.0}), [f"guard={guard}"])
    result = sordino.quantize(str(model), wild, tmp_path / "wild", **SMALL)
    assert not any(b["moves"]["tune"]["kept"] for b in result.manifest["blocks"])
    sordino.quantize(str(model), "gptaq-w2", tmp_path / "plain", **SMALL)
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("wild", "plain")]
    assert files[0] == files[1]


def test_a_target_is_judged_by_itself(tmp_path: Path) -> None:
    """Against the full-precision block on the quantized stream: smaller in deeper blocks than against its own stream."""
    model = make_tiny(tmp_path / "model", layers=3)
    notes = {}
    for target in ("full", "quantized"):
        made = load_recipe(recipe(TUNE | {"target": target}), ["guard=tell"])
        blocks = sordino.quantize(str(model), made, tmp_path / target, **SMALL).manifest["blocks"]
        notes[target] = [b["moves"]["tune"]["before"] for b in blocks]
    assert notes["full"][0] == notes["quantized"][0] and notes["quantized"][2] < 0.8 * notes["full"][2]


def test_without_guards_everything_trained_is_kept(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    plain = load_recipe(recipe(TUNE, DISTILL), ["guard=off"])
    manifest = sordino.quantize(str(model), plain, tmp_path / "out", **SMALL).manifest
    assert all(b["moves"]["tune"]["kept"] for b in manifest["blocks"]) and manifest["finish"]["distill"]["kept"]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_norms_given_a_bias_have_it_trained_stored_and_counted(family: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", family, layers=2)
    made = load_recipe(recipe(TUNE | {"biases": True, "gains": 0.03}), ["guard=tell"])
    manifest = sordino.quantize(str(model), made, tmp_path / "out", windows=16, seqlen=48).manifest
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    added = {name: tensors[name] for name in tensors if name.endswith("norm.bias")}
    kept = [b["moves"]["tune"]["kept"] for b in manifest["blocks"]]
    assert len(added) == 4 and any(kept)
    assert all(bool(bias.any()) == kept[int(name.split(".")[2])] for name, bias in added.items())
    assert_seen_in_the_walk(model, tmp_path / "out", manifest)


def test_biases_need_norms_to_stand_in(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", "olmo2", layers=2)
    with pytest.raises(InputError, match="olmo2 has no norms in front"):
        sordino.quantize(str(model), recipe(TUNE | {"biases": True}), tmp_path / "out", **SMALL)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    for name in ("a", "b"):
        sordino.quantize(str(model), recipe(TUNE, DISTILL), tmp_path / name, **SMALL)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("weights", [0.0, 0.01])
@pytest.mark.parametrize("tied", [True, False])
def test_distillation_lowers_the_divergence_that_the_checkpoint_has(weights: float, tied: bool, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2, tied=tied)
    move = DISTILL | {"weights": weights, "scales": 0.01}
    result = sordino.quantize(str(model), recipe(move), tmp_path / "out", **SMALL)
    note = result.manifest["finish"]["distill"]
    assert note["kept"] and note["kl_after"] < note["kl_before"] and note["loss"][1] < note["loss"][0]
    sordino.quantize(str(model), "gptaq-w2", tmp_path / "plain", **SMALL)
    text = tmp_path / "text"
    text.write_text("The distribution of the next word, on words that nobody trained on. " * 20)
    options: dict[str, Any] = {"text": str(text), "seqlen": 32, "against": str(model)}
    ours, plain = (sordino.evaluate(tmp_path / n, **options).kl for n in ("out", "plain"))
    assert ours is not None and plain is not None and ours < plain
    codes = [sordino.load(tmp_path / n)[0].model.layers[0].mlp.up_proj.codes() for n in ("out", "plain")]
    assert torch.equal(*codes) == (weights == 0.0)


@pytest.mark.parametrize("rotated", [False, True])
def test_distillation_trains_on_more_windows_than_the_walk(rotated: bool, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    moves = [{"move": "rotate"}] * rotated
    notes = {}
    for windows in (0, 4, 80):
        out = tmp_path / str(windows)
        result = sordino.quantize(str(model), recipe(*moves, DISTILL | {"windows": windows}), out, **SMALL)
        notes[windows] = result.manifest["finish"]["distill"]
    drawn = SMALL["windows"]
    assert [notes[n]["windows"] for n in (0, 4, 80)] == [drawn, 4, 80]
    assert [Distill(times=2.5).finish_windows(n) for n in (4, 128)] == [10, 320] and Distill().finish_windows(7) == 7
    # The targets of the further windows are the full-precision model's: the loss starts where it starts on the others.
    assert abs(notes[80]["loss"][0] / notes[0]["loss"][0] - 1) < 0.2
    assert len({n["kl_before"] for n in notes.values()}) == 1


def test_a_kill_during_the_finish_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    sordino.quantize(str(model), recipe(TUNE, DISTILL), tmp_path / "a", **SMALL)

    class Killed(Distill):
        def finish(self, ctx: Any) -> None:
            super().finish(ctx)
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setitem(MOVES, "distill", Killed)
        with pytest.raises(KeyboardInterrupt):
            sordino.quantize(str(model), recipe(TUNE, DISTILL), tmp_path / "b", **SMALL)
    with monkeypatch.context() as m:
        m.setattr(Work, "load_ends", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sordino.quantize(str(model), recipe(TUNE, DISTILL), tmp_path / "b", **SMALL)
    sordino.quantize(str(model), recipe(TUNE, DISTILL), tmp_path / "b", **SMALL)
    for name in ("model.safetensors", "sordino.json", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("weights", [0.0, 0.01])
@pytest.mark.parametrize("base", ["gptaq-w2", "d2quant-w2", "prefixquant-w4a8kv4-dynamic"])
def test_where_memory_is_short_blocks_are_computed_twice_to_the_same_bytes(
    base: str, weights: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    meta: list[bool] = []  # of a run, whether a rounded weight has no values
    forwards: list[bool] = []  # of the first block, whether it was one for a step

    class Watched(Distill):
        def finish(self, ctx: Any) -> None:
            up = ctx.blocks[0].get_submodule("mlp.up_proj")
            meta.append(up.weight.is_meta)
            ctx.blocks[0].register_forward_pre_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
            super().finish(ctx)

    monkeypatch.setitem(MOVES, "distill", Watched)
    made = load_recipe(base)
    made = made.model_copy(update={"moves": (*made.moves, MoveSpec(**DISTILL | {"weights": weights, "epochs": 1}))})
    manifests, steps = {}, {}
    for lean in (False, True):
        # Too much without, nothing with: what the machine of this test has must not matter.
        with monkeypatch.context() as m:
            m.setattr(plan_module, "_memory", lambda plan, _: 0 if plan.lean or not lean else 1 << 62)  # noqa: B023
            manifests[lean] = sordino.quantize(str(model), made, tmp_path / str(lean), **SMALL).manifest
        steps[lean] = sum(forwards)
        forwards.clear()
    assert meta == [False, True]
    assert manifests[False] == manifests[True] and steps[True] == 2 * steps[False] > 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "False" / name).read_bytes() == (tmp_path / "True" / name).read_bytes()


def test_head_divergence_is_the_definition_with_its_gradient() -> None:
    h, t = (torch.randn(150, 8, dtype=torch.float64) for _ in range(2))
    student, teacher = (torch.randn(40, 8, dtype=torch.float64) for _ in range(2))
    mine, exact = h.float().requires_grad_(), h.clone().requires_grad_()
    value = HeadDivergence.apply(mine, student.float(), t.float(), teacher.float())
    value.backward()
    log_p, log_q = F.log_softmax(t @ teacher.T, -1), F.log_softmax(exact @ student.T, -1)
    definition = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    definition.backward()
    assert abs(value.item() - float(definition)) <= 1e-5 * float(definition)
    assert mine.grad is not None and exact.grad is not None
    assert (mine.grad - exact.grad).norm() <= 1e-5 * exact.grad.norm()
