"""D²Quant through the main path: the merge of the column scale, storage, loading (spec, section 6.5)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import sordino
from sordino.errors import InputError
from sordino.numerics.additive import AdditiveGrid, DualScaleGrid
from sordino.numerics.affine import AffineGrid, GridParams, round_scale
from sordino.recipe import load_recipe
from sordino.round.gptq import GptqSolver
from sordino.rounding import Rounded, Stats
from sordino.walk.context import Context
from sordino.walk.doctor import examine
from tiny import assert_seen_in_the_walk, make_tiny

SMALL: dict[str, Any] = {"windows": 16, "seqlen": 32}
PRESETS = ["d2quant-w2", "d2quant-w3", "d2quant-paper-w2", "d2quant-paper-w3"]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_column_scale_is_merged_into_up_proj(preset: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Rounded, Rounded, Rounded, torch.Tensor]] = []
    original = Context.commit

    def commit(self: Context, linear: str, rounded: Rounded) -> None:
        before = self.solved.get("mlp.up_proj")
        original(self, linear, rounded)
        if linear == "mlp.down_proj" and rounded.column is not None and before is not None:
            seen.append((before, self.solved["mlp.up_proj"], rounded, self.solved[linear].values()))

    monkeypatch.setattr(Context, "commit", commit)
    model = make_tiny(tmp_path / "model", family, layers=2, ffn=128)
    recipe = load_recipe(preset, ["guard=off"])
    sordino.quantize(str(model), recipe, tmp_path / "out", **SMALL)
    assert len(seen) == 2
    for up, merged, down, stored_down in seen:
        assert down.column is not None
        assert torch.equal(up.codes, merged.codes) and torch.equal(up.zero, merged.zero)
        assert torch.equal(merged.scale, round_scale(up.scale * down.column[:, None]))
        x, gate = torch.randn(5, up.codes.shape[1]), torch.rand(5, up.codes.shape[0])
        unmerged = F.linear(gate * F.linear(x, up.values()), down.values())
        exact = F.linear(gate * F.linear(x, up.values() * down.column[:, None]), stored_down)
        assert (unmerged - exact).norm() <= 1e-5 * unmerged.norm()
        stored = F.linear(gate * F.linear(x, merged.values()), stored_down)
        assert (unmerged - stored).norm() <= 5e-3 * unmerged.norm()


@pytest.mark.parametrize("form", ["norm", "linear"])
def test_a_bias_of_up_proj_takes_the_column_scale_too(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own bias, and the one that a mean shift in the form of the linears has put there."""
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    original = Context.commit

    def commit(self: Context, linear: str, rounded: Rounded) -> None:
        up: Any = self.q.get_submodule("mlp.up_proj")
        before = up.bias.detach().clone()
        original(self, linear, rounded)
        if rounded.column is not None:
            seen.append((before, up.bias.detach(), rounded.column))

    monkeypatch.setattr(Context, "commit", commit)
    model = make_tiny(tmp_path / "model", layers=2, ffn=128, mlp_bias=True)
    moves = f'moves=[{{move="rotate"}}, {{move="mean-shift", always=true, form="{form}"}}]'
    result = sordino.quantize(str(model), load_recipe("d2quant-paper-w2", [moves, "guard=off"]), tmp_path / "out", **SMALL)
    assert len(seen) == 2
    for before, after, column in seen:
        assert torch.allclose(after, before * column) and (column - 1).abs().max() > 0.2
    stored = sordino.load(tmp_path / "out")[0].model.layers[1].mlp.up_proj.bias
    assert torch.allclose(stored, seen[1][1]) and result.manifest["bits_per_weight"] > 0


def test_latents_follow_a_merged_column_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuner starts where the solver left a weight, in up_proj and down_proj too."""
    shares: list[float] = []
    original = Context.commit

    def commit(self: Context, linear: str, rounded: Rounded) -> None:
        original(self, linear, rounded)
        for name in ["mlp.up_proj", linear] if rounded.column is not None else []:
            r = self.solved[name]
            assert r.latent is not None and r.column is None
            own = AffineGrid(r.bits).nearest(r.latent, GridParams(r.scale, r.zero))[0]
            shares.append(float((own == r.codes).float().mean()))

    monkeypatch.setattr(Context, "commit", commit)
    model = make_tiny(tmp_path / "model", layers=2, ffn=128)
    sets = ["guard=off", "format.weights.solver.refit=false", 'moves=[{move="tune", epochs=1}]']
    sordino.quantize(str(model), load_recipe("w3", sets), tmp_path / "out", **SMALL)
    assert len(shares) == 4 and min(shares) > 0.99


def assert_generates_and_saves_again(ours: Any, tokenizer: Any, folder: Path) -> None:
    ids = tokenizer("and it goes on", return_tensors="pt").input_ids
    assert ours.generate(ids, max_new_tokens=8).shape[1] == ids.shape[1] + 8
    ours.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, again(ids).logits)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint_loads_generates_and_saves_again(preset: str, tied: bool, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", dtype=torch.bfloat16, layers=2, tied=tied, ffn=172)  # no multiple of 32
    result = sordino.quantize(str(model), preset, tmp_path / "out", **SMALL, overrides=("guard=off",))
    ours, tokenizer = sordino.load(tmp_path / "out")
    assert_generates_and_saves_again(ours, tokenizer, tmp_path / "again")
    measured = sordino.evaluate(tmp_path / "out", seqlen=32, windows=1)
    assert measured.bits_per_weight == pytest.approx(result.manifest["bits_per_weight"])


def by_group(grid: Any, rounded: Rounded) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest codes and values of the latent weight, group after group."""
    assert rounded.column is not None and rounded.latent is not None
    parts = []
    for g, w in enumerate(rounded.latent.split(rounded.group, 1)):
        own = GridParams(rounded.scale[:, g : g + 1], rounded.zero[:, g : g + 1], rounded.column.split(rounded.group)[g])
        parts.append(grid.nearest(w.contiguous(), own))
    return torch.cat([c for c, _ in parts], 1), torch.cat([v for _, v in parts], 1)


@pytest.mark.parametrize("grid", [AdditiveGrid(2), AdditiveGrid(3), DualScaleGrid(AffineGrid(3))])
@pytest.mark.parametrize("static", [False, True])
def test_column_scales_come_back_in_the_order_of_the_columns(grid: Any, static: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (torch.randn(64, generator=generator)).exp()
    w = torch.randn(48, 64, generator=generator) * sizes
    x = torch.randn(400, 64, generator=generator) * torch.randn(64, generator=generator).exp()
    solver = GptqSolver(order="gar", static_groups=static)
    solver.keep_latent = True
    rounded = solver.solve(w, solver.prepare(Stats(400, x.T @ x), 32), grid, 32)
    assert rounded.column is not None and rounded.latent is not None
    # Every code is the nearest one under its own column's scale, which holds in no other order.
    codes, values = by_group(grid, rounded)
    assert torch.equal(codes.to(torch.uint8), rounded.codes)
    assert torch.allclose(values, rounded.values(), rtol=1e-5, atol=1e-7)
    if static:
        fitted = grid.fit_groups(w, 32).column
        assert fitted is not None and torch.equal(fitted, rounded.column)
    plain = AffineGrid(grid.bits)
    base = GptqSolver(order="gar").solve(w, solver.prepare(Stats(400, x.T @ x), 32), plain, 32)
    ours, theirs = (float(((r.values() - w) @ x.T).square().sum()) for r in (rounded, base))
    assert ours < theirs


ALL = "format.weights.column_scale=true"


@pytest.mark.parametrize(
    ("family", "base", "moves"),
    [
        ("llama", "gptq-w3", ""),
        ("qwen2", "gptaq-w3", '{move="tune", epochs=1}, {move="distill", epochs=1}'),
        ("llama", "gptq-w3", '{move="tune", epochs=1, weights=0, scales=0, inputs=0, clips=0.01, rank=2}'),
        ("qwen3", "d2quant-w2", '{move="rotate"}, {move="mean-shift"}, {move="tune", epochs=1}'),
    ],
)
def test_column_scale_is_stored_where_nothing_can_take_it(family: str, base: str, moves: str, tmp_path: Path) -> None:
    """All linears have one: down_proj's is merged, the others' stand beside their codes."""
    model = make_tiny(tmp_path / "model", family, layers=2)
    recipe = load_recipe(base, [ALL, "format.weights.override=[]", f"moves=[{moves}]"])
    if base == "d2quant-w2":
        recipe = load_recipe(recipe, ['format.weights.grid="additive"', "format.weights.bits=2"])
    manifest = sordino.quantize(str(model), recipe, tmp_path / "out", windows=16, seqlen=48).manifest
    assert_seen_in_the_walk(model, tmp_path / "out", manifest)
    ours, tokenizer = sordino.load(tmp_path / "out")
    layer = ours.model.layers[1]
    stored = [n for n, m in layer.named_modules() if getattr(m, "columned", False)]
    assert len(stored) == 6 and "mlp.down_proj" not in stored
    for name in stored:
        linear = layer.get_submodule(name)
        assert float((linear.column() - 1).abs().max()) > 0.05 or manifest["blocks"][1].get("fallback")
        for rows in (1, 3, 40):
            x = torch.randn(rows, linear.in_features)
            exact = F.linear(x, linear.dequantize(torch.float32), linear.bias).detach()
            assert float((linear(x).detach() - exact).norm()) <= 1e-5 * float(exact.norm())
    assert_generates_and_saves_again(ours, tokenizer, tmp_path / "again")


def test_a_stored_column_scale_is_worth_it_where_columns_differ(tmp_path: Path) -> None:
    """Columns of o_proj of very different sizes, the inputs alike: rounding to nearest, so that nothing else helps."""
    model = make_tiny(tmp_path / "model", layers=2)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for layer in loaded.model.layers:
            sizes = (1.5 * torch.randn(64, generator=torch.Generator().manual_seed(3))).exp()
            layer.self_attn.o_proj.weight *= sizes
    loaded.save_pretrained(model)
    kl = {}
    for name, column in (("with", "true"), ("without", "false")):
        sets = [f'format.weights.override=[{{match="*.o_proj", bits=3, column_scale={column}}}]', "format.weights.bits=8"]
        sordino.quantize(str(model), load_recipe("rtn-w4", sets), tmp_path / name)
        kl[name] = sordino.evaluate(tmp_path / name, seqlen=64, windows=4, against=str(model)).kl or 0.0
    assert kl["with"] < 0.6 * kl["without"]


def test_a_stored_column_scale_goes_with_plain_inputs_only(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    with pytest.raises(InputError, match=r"q_proj.*column scale.*mlp.down_proj.*plain inputs"):
        sordino.quantize(str(model), "w8a8", tmp_path / "out", overrides=(ALL,))
    with pytest.raises(InputError, match=r"vllm.*a stored column scale runs in Sordino only"):
        examine(str(model), "gptq-w3", (ALL, "format.weights.group=32"), ("vllm",))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_up_proj_takes_the_scale_with_its_bias(kept: bool, bias: bool, tmp_path: Path) -> None:
    """Rounded to 8 bits or in full precision; what the two do together stays."""
    model = make_tiny(tmp_path / "model", layers=2, ffn=128, mlp_bias=bias)
    alone = ["*.gate_proj", "*.self_attn.*", *["*.up_proj"] * kept]
    keep = f"format.weights.ignore={json.dumps(alone)}"
    recipe = load_recipe("d2quant-paper-w3", [keep, "format.weights.bits=8", "format.weights.override.0.bits=8"])
    recipe = recipe.model_copy(update={"moves": ()})
    sordino.quantize(str(model), recipe, tmp_path / "out", **SMALL)
    figures = sordino.evaluate(tmp_path / "out", seqlen=32, windows=4, against=str(model))
    assert figures.kl is not None and figures.kl < 1e-3
