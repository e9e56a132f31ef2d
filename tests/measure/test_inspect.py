"""Inspection on a tiny random model: every figure against a slower way to the same number, and bad input."""

from __future__ import annotations

import copy
import heapq
import json
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from markupsafe import escape
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer
from typer.testing import CliRunner

import sordino
from sordino.anatomy import SITES, Anatomy, anatomy_of, hidden_states
from sordino.cli import app
from sordino.errors import InputError
from sordino.measure.activations import Activations, Loudest, look
from sordino.measure.advice import Advice, advise
from sordino.measure.diffusion import Horizontal, attended, attention_received, horizontal, last_with_rows_rounded
from sordino.measure.inspect import inspect
from sordino.measure.propagation import Spread, Vertical, massive_tokens, relative_errors, run_blocks, vertical
from sordino.measure.sensitivity import Sensitivity, names_of, round_weights, sensitivities, with_weights
from sordino.numerics.affine import AffineGrid
from sordino.protect.prefix import Prefix
from sordino.recipe import MoveSpec, load_recipe
from sordino.report.inspect import maps, plots
from sordino.walk.attention import NAME
from tiny import STORIES, Sordino, make_tiny

TEXT = heapq.__file__
Loaded = tuple[Path, Any, Anatomy, Tensor]


@pytest.fixture(scope="module", params=["llama", "qwen2", "olmo2"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    path = make_tiny(tmp_path_factory.mktemp("inspect") / "model", request.param, layers=3)
    model, _ = sordino.load(path, dtype=torch.float32)
    model.set_attn_implementation(NAME)
    ids = torch.randint(2, 290, (3, 20), generator=torch.Generator().manual_seed(0))
    return path, model, anatomy_of(model), ids


def rounded_copy(model: Any, bits: int) -> Any:
    """What rounding weights on the fly is held against."""
    copied, grid = copy.deepcopy(model), AffineGrid(bits)
    for name, module in copied.get_decoder().layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            groups = 32 if module.in_features % 64 else 64
            values = grid.nearest(module.weight.data, grid.fit_groups(module.weight.data, groups))[1]
            assert not torch.equal(values, module.weight), name
            module.weight.data = values
    return copied


@torch.no_grad()
def test_the_most_attended_place_is_a_sink_not_the_last() -> None:
    """Every query gives half to the first token and half to the one before it: means alone name the last places."""
    length = 12
    weights = torch.zeros(length, length)
    weights[1:, 0] = 0.5
    weights[torch.arange(1, length), torch.arange(length - 1)] += 0.5
    means = weights.sum(0) / torch.arange(length - 1, -1, -1).clamp(min=1)
    assert int(means.argmax()) in (0, length - 2) and int((means > 0.4).sum()) > 1
    order = attended(means)
    assert int(order[0]) == 0 and int(order[-1]) == length - 1 and sorted(order.tolist()) == list(range(length))


def test_looking_finds_what_the_prefix_move_finds(loaded: Loaded) -> None:
    _, model, anatomy, ids = loaded
    found = look(model, anatomy, ids, threshold=1.2)
    seen: dict[int, list[Tensor]] = {i: [] for i in range(3)}
    for i, layer in enumerate(model.get_decoder().layers):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, a, i=i: seen[i].append(a[0]))
    model.get_decoder()(input_ids=ids)
    for layer in model.get_decoder().layers:
        layer.mlp.down_proj._forward_pre_hooks.clear()
    move, artifacts = Prefix(threshold=1.2), {"ids": ids}
    for i in range(3):
        move.survey(i, torch.nn.Identity(), lambda _, i=i: iter([(slice(0, 3), seen[i][0])]), artifacts)  # type: ignore[arg-type, misc]
        torch.testing.assert_close(found.channels["down"][i], seen[i][0].abs().amax((0, 1)))
    assert found.outliers.seen == artifacts["prefix"].seen and found.outliers.seen
    assert found.outliers.means == artifacts["prefix"].means
    assert found.ratios == pytest.approx(artifacts["prefix"].ratios, rel=1e-5)
    assert sum(t.times - t.first for t in found.tokens.values()) == found.outliers.seen.total()
    assert max(t.ratio for t in found.tokens.values()) == max(t.ratio for t in found.loudest)
    for i, loudest in enumerate(found.loudest):
        peaks = seen[i][0].abs().amax(-1)
        ratios = peaks / peaks.median(-1, keepdim=True).values
        window, place = divmod(int(ratios.argmax()), 20)
        assert (loudest.place, loudest.id) == (place, int(ids[window, place]))
        assert loudest.ratio == pytest.approx(float(ratios.max()), rel=1e-5)


@torch.no_grad()
def test_rounding_one_kind_leaves_the_model_as_it_was(loaded: Loaded) -> None:
    _, model, anatomy, ids = loaded
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rounded = rounded_copy(model, 4)
    rows = {(r.what, r.where): r for r in sensitivities(model, round_weights(model, anatomy, 4), anatomy, ids, 4)}
    assert len(rows) == 8 + 5 + 5 + 1 and all(r.kl > 0 and r.error > 0 for r in rows.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k in before)
    p, q = (torch.log_softmax(m(input_ids=ids).logits.double(), -1) for m in (model, rounded))
    assert rows["weights", "all"].kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    finer = {(r.what, r.where): r for r in sensitivities(model, round_weights(model, anatomy, 8), anatomy, ids, 8)}
    assert all(finer[key].kl < rows[key].kl for key in rows)


@torch.no_grad()
def test_vertical_errors_are_those_of_running_blocks_by_hand(loaded: Loaded) -> None:
    _, model, anatomy, ids = loaded
    rounded, weights = rounded_copy(model, 3), round_weights(model, anatomy, 3)
    simulated = partial(with_weights, model, weights, names_of(anatomy, anatomy.linears))
    found = vertical(model, simulated, ids[:1], singles=(1,))
    # transformers' own list of hidden states; its last one is behind the final norm, so only the first two blocks.
    exact, other = (m(input_ids=ids[:1], output_hidden_states=True).hidden_states for m in (model, rounded))
    calls: list[dict[str, Any]] = []
    hook = rounded.get_decoder().layers[1].register_forward_pre_hook(lambda _, a, k: calls.append(k), with_kwargs=True)
    rounded(input_ids=ids[:1])
    hook.remove()
    alone = hidden_states(rounded.get_decoder().layers[1](exact[1], **calls[0] | {"past_key_values": None}))
    for place in (1, 2):
        errors = [
            ((q - h) ** 2).sum() / (h**2).sum() for q, h in zip(other[place][0].double(), exact[place][0].double(), strict=True)
        ]
        assert found.accumulated[place - 1].mean == pytest.approx(float(sum(errors) / 20), rel=1e-3)
    errors = [((q - h) ** 2).sum() / (h**2).sum() for q, h in zip(alone[0].double(), exact[2][0].double(), strict=True)]
    assert found.isolated[1].mean == pytest.approx(float(sum(errors) / 20), rel=1e-3)
    assert found.isolated[0] == found.accumulated[0] and found.ratio[0] == 1.0
    # One block alone equals a model in which only that block is rounded.
    mixed = copy.deepcopy(model)
    mixed.get_decoder().layers[1] = copy.deepcopy(rounded.get_decoder().layers[1])
    single = vertical(model, lambda: nullcontext(mixed), ids[:1])
    assert [s.median for s in single.accumulated[1:]] == pytest.approx(found.single[1], rel=1e-4)
    assert single.accumulated[0].mean == 0.0 and len(found.single[1]) == 2


def test_massive_tokens_are_told_apart() -> None:
    x = torch.ones(1, 5, 3)
    x[0, 0] *= 11
    assert massive_tokens(x).tolist() == [[True, False, False, False, False]]
    errors = relative_errors(torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[0.0, 4.0], [1.0, 0.0]]))
    assert errors.tolist() == pytest.approx([9 / 16, 1.0])
    assert Spread.of(torch.tensor([8.0, 1.0, 3.0]), torch.tensor([True, False, False])) == Spread(4.0, 2.0, 3.0)


def test_a_rotated_checkpoint_with_a_prefix_is_compared_in_one_basis(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=3)
    recipe = load_recipe("rtn-w4", ["format.weights.bits=16", "guard=off"])
    moves = (MoveSpec(move="prefix", threshold=1.5), MoveSpec(move="rotate", size=32))  # type: ignore[call-arg]
    recipe = recipe.model_copy(update={"moves": moves})
    result = sordino.quantize(str(model), recipe, tmp_path / "out", text=TEXT, windows=4, seqlen=20)
    assert result.manifest["prefix"]["ids"]
    inspection = inspect(result.out, against=model, text=TEXT, windows=2, seqlen=20)
    found = inspection.vertical
    assert max(s.mean for s in (*found.accumulated, *found.isolated)) < 1e-6  # nothing was rounded
    assert len(plots(inspection)) == 8
    for name, drawn in plots(inspection).items():  # the same lines as figures by themselves
        assert inspection.figure(name).svg.count("<polyline") == len(drawn.series) == str(escape(drawn)).count("<polyline")
    assert len(maps(inspection)) == len(SITES)
    for name, map_ in maps(inspection).items():
        assert inspection.figure(name).svg.count("<rect") == str(escape(map_)).count("<rect") > 0
    with pytest.raises(InputError, match="there are outlier tokens, "):
        inspection.figure("none")


@torch.no_grad()
def test_rounding_rows_reaches_later_tokens_only(loaded: Loaded) -> None:
    _, model, anatomy, ids = loaded
    exact = run_blocks(model, ids[:1])[-1]
    rows = torch.zeros(3, 20, dtype=torch.bool)
    rows[0, 7] = rows[1, 19] = True
    for kv_only in (False, True):
        got = last_with_rows_rounded(model, anatomy, ids[0], rows, 4, kv_only)
        errors = relative_errors(got, exact)
        assert float(errors[0, :7].max()) < 1e-9 and float(errors[0, 7:].min()) > 1e-9
        assert float(errors[1, :19].max()) < 1e-9 < float(errors[1, 19]) and float(errors[2].max()) < 1e-9
    every = last_with_rows_rounded(model, anatomy, ids[0], torch.ones(1, 20, dtype=torch.bool), 4, True)
    keep = [m for m in model.modules() if hasattr(m, "k_proj")]
    assert all(m.kv_grid is None for m in keep)
    whole = [
        r for r in sensitivities(model, round_weights(model, anatomy, 4), anatomy, ids[:1], 4) if r.what == "keys and values"
    ]
    norm = model.get_decoder().norm
    assert float(relative_errors(norm(every), norm(exact)).median()) == pytest.approx(whole[0].error, rel=1e-3)


@torch.no_grad()
def test_attention_received_is_that_of_eager_attention(loaded: Loaded) -> None:
    path, model, _, ids = loaded
    eager, _ = sordino.load(path, dtype=torch.float32, attn_implementation="eager")
    weights = torch.stack(eager(input_ids=ids[:1], output_attentions=True).attentions)[:, 0]  # [blocks, H, L, L]
    expected = [float(weights[:, :, i + 1 :, i].mean()) for i in range(19)]
    assert attention_received(model, ids[0])[:19].tolist() == pytest.approx(expected, rel=1e-4)
    assert float(attention_received(model, ids[0])[19]) == 0.0


def test_horizontal_figures_belong_together(loaded: Loaded) -> None:
    _, model, anatomy, ids = loaded
    found = horizontal(model, anatomy, ids[:2], 4)
    assert len(found.sources) == 2 * 19 and all(s.diffused > 0 and s.own > 0 for s in found.sources)
    assert found.correlation is not None and -1 <= found.correlation <= 1
    first = [s.diffused for s in found.sources if s.window == 0]
    other = [s.diffused for s in found.sources if s.window == 1]
    assert found.shares[1] == pytest.approx((first[0] / sum(first) + other[0] / sum(other)) / 2)  # every place was tried
    assert found.shares[1] <= found.shares[4] <= found.shares[16] <= 1
    assert list(found.doses) == ["first", "random", "most attended"]
    assert all([p for p, _ in curve] == [0, 1, 2, 4] for curve in found.doses.values())
    assert len({curve[0][1] for curve in found.doses.values()}) == 1
    assert all(curve[-1][1] < curve[0][1] for curve in found.doses.values())
    assert horizontal(model, anatomy, ids[:2], 4) == found  # same seed, same figures


def _advice(*, weights: float, ratio: float, share: float, peak: float, model: Path) -> list[Advice]:
    plain = Activations([1.5, peak], [1.5, 2.0], {}, {}, {}, [Loudest(3, 1, 1.5, "a"), Loudest(7, 0, peak, "the")])
    costs = [("weights", "all", weights), ("weights", "down_proj", 0.5), ("inputs", "all", 1.25)]
    costs += [("rotated inputs", "all", 0.875), ("keys and values", "all", 0.001)]
    rows = [Sensitivity(what, where, 0.0, kl) for what, where, kl in costs]
    depth = Vertical([], [], [ratio], [], [], [], {})
    across = Horizontal([], None, None, {4: share}, {4: share}, {}, 256)
    return advise(plain, None, rows, depth, across, str(model))


def test_advice_follows_the_figures_and_names_them(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2, ffn=128)
    many = _advice(weights=0.5, ratio=9.0, share=0.9, peak=2.0, model=model)
    recipes = ["w4", "d2quant-w3", "quarot-w4a4kv4", "w4a8kv4", "", "w4a4kv4", "prefixquant-w4a4kv4-dynamic"]
    assert [a.recipe for a in many] == recipes
    figures = ["0.5000 nats", "0.5000 alone", "1.250 nats", "0.875 nats", "0.0010 nats", "9.0 times", "make 90.0%"]
    assert all(figure in a.reason for figure, a in zip(figures, many, strict=True))
    few = _advice(weights=0.001, ratio=1.0, share=0.01, peak=200.0, model=model)
    assert [a.recipe for a in few] == ["gptq-w4", "d2quant-w3", "w4a4kv4", "w4a8kv4", "", "", ""]
    assert "'the' stands out 200.0-fold at down_proj of block 1" in few[2].reason


def test_a_recipe_that_does_not_fit_gives_way(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2, ffn=172)  # no groups of 64 in down_proj
    first = _advice(weights=0.5, ratio=1.0, share=0.01, peak=2.0, model=model)[0]
    assert first.recipe == "gptq-w4" and "Not w4, which this model cannot take" in first.reason and "172" in first.reason


def test_the_command_on_a_trained_model(tmp_path: Path) -> None:
    page, figures = tmp_path / "look.html", tmp_path / "look.json"
    arguments = ("-o", page, "--json", figures, "--text", TEXT, "--windows", 2, "--seqlen", 64)
    done = Sordino("inspect", STORIES, *arguments, log=tmp_path / "log").wait()
    assert (done.code, done.err) == (0, "")
    found, html = json.loads(figures.read_text(encoding="utf-8")), page.read_text(encoding="utf-8")
    channels = {site: [len(block) for block in blocks] for site, blocks in found["plain"]["channels"].items()}
    assert channels == {"qkv": [64] * 5, "o": [64] * 5, "gate_up": [64] * 5, "down": [172] * 5}
    words = AutoTokenizer.from_pretrained(STORIES).convert_ids_to_tokens
    for loudest in found["plain"]["loudest"]:
        assert loudest["token"] == words(loudest["id"]) and escape(repr(loudest["token"])) in html
    assert all(escape(a["reason"]) in html and a["recipe"] in done.out for a in found["advice"])
    done = Sordino("inspect", tmp_path / "none", *arguments, log=tmp_path / "log2").wait()
    assert done.code == 2 and len(done.err.splitlines()) == 1 and done.err.startswith("sordino: ") and done.out == ""


def test_a_model_whose_answers_are_no_numbers_is_not_looked_at(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * math.nan}, model / "model.safetensors")
    with pytest.raises(InputError, match="no number"):
        inspect(model, windows=1, seqlen=16)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    out = tmp_path / "out"
    sordino.quantize(str(model), "rtn-w4", out)
    other = make_tiny(tmp_path / "other", layers=3)
    page = tmp_path / "page.html"
    cases = {
        "is quantized": [str(out)],
        "is not quantized": [str(model), "--against", str(model)],
        "was not made from": [str(out), "--against", str(other)],
        "positions": [str(model), "--seqlen", "600"],
        "missing": [str(model), "--text", str(tmp_path / "none.txt")],
    }
    for words, arguments in cases.items():
        done = CliRunner().invoke(app, ["inspect", *arguments, "-o", str(page)])
        assert isinstance(done.exception, sordino.InputError) and words in str(done.exception), words
        assert "\n" not in str(done.exception) and not page.exists()
    assert CliRunner().invoke(app, ["inspect", str(model), "-o", str(page), "--windows", "0"]).exit_code == 2
    done = CliRunner().invoke(app, ["inspect", str(model), "-o", str(tmp_path)])
    assert isinstance(done.exception, sordino.InputError) and "cannot write" in str(done.exception)
