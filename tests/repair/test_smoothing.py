"""Soft-constrained smoothing: step 0 is the host, equal factors keep the function, gradients are those of differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sordino
from draws import normal
from sordino.anatomy import Anatomy, anatomy_of
from sordino.contract import BlockContext, Move
from sordino.errors import InputError
from sordino.moves import MOVES
from sordino.numerics.affine import AffineGrid
from sordino.numerics.inputs import InputGrid
from sordino.numerics.kept import Kept
from sordino.recipe import load_recipe
from sordino.repair import tune
from sordino.repair.clip import ClippedLinear, ClipSpace
from sordino.repair.smoothing import Mode, Smoothing, SmoothSpace, candidates
from sordino.round.rtn import RtnSolver
from sordino.rounding import Rounded
from sordino.runtime.inputs import order_input, round_inputs, rounding
from tiny import Fixed, assert_seen_in_the_walk, make_tiny


class Norm(nn.Module):
    """RMS norm with a gain, and maybe a bias."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(1 + 0.2 * torch.randn(16, generator=rng), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(16, generator=rng), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.weight * x / x.square().mean(-1, keepdim=True).sqrt()
        return y if self.bias is None else y + self.bias


def made(bits: int = 8, bias: bool = False, kept: int = 0, order: bool = False, mode: Mode = "soft") -> Any:
    """A norm that feeds two linears of one site, which are trained."""
    block = nn.Module()
    block.norm, solved = Norm(bias), {}
    places = torch.randperm(16, generator=torch.Generator().manual_seed(4)).int() if order else None
    for i, name in enumerate(("a", "b")):
        w = torch.randn(6, 16, generator=torch.Generator().manual_seed(2 + i))
        w = w if places is None else w[:, places]
        r: Rounded = RtnSolver().solve(w, None, AffineGrid(bits, True), 8)
        r.latent = w
        r.kept = Kept.of(w[:, -kept:]) if kept else None
        linear = nn.Linear(16, 6, bias=False)
        linear.weight = nn.Parameter(r.values(), requires_grad=False)
        if places is not None:
            order_input(linear, places.clone())
        block.add_module(name, linear)
        solved[name] = r
    clips = ClipSpace(block, solved, 0.01, {}, 0.01)
    trained: list[ClippedLinear] = list(clips.trained.values())
    held = [block.norm.weight] + ([block.norm.bias] if bias else [])
    smooth = Smoothing("qkv", 16, trained, torch.arange(16) if places is None else places.long(), mode, held)
    return block, clips, smooth


def outputs(block: Any, x: torch.Tensor) -> torch.Tensor:
    y = block.norm(x)
    return torch.cat([block.a(y), block.b(y)], -1)


X = torch.randn(30, 16, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_step_0_is_the_host_and_equal_factors_keep_the_function(bias: bool, order: bool) -> None:
    """Spec section 11.1 and 11.2; the grid is so fine that rounding is out of the way."""
    block, _, smooth = made(8, bias, order=order)
    for linear in (block.a, block.b):  # no rounding at all
        linear.weight = lambda dtype, own=linear: own.grid()[0].view_as(own.start.codes).to(dtype)
    before = outputs(block, X).detach()
    smooth.settle(torch.float32)
    torch.testing.assert_close(outputs(block, X), before, rtol=0, atol=0)
    with torch.no_grad():
        smooth.u.copy_(torch.randn(16, generator=torch.Generator().manual_seed(3)))
    smooth.settle(torch.float32)
    after = outputs(block, X).detach()
    assert (after - before).norm() <= 1e-5 * before.norm()
    with torch.no_grad():
        smooth.v.add_(0.1)
    assert (outputs(block, X).detach() - before).norm() > 0.05 * before.norm()


@pytest.mark.parametrize("order", [False, True])
def test_gradients_are_those_of_differences(order: bool) -> None:
    """By the norm and by the columns together; none on the base weight (spec section 11.7)."""
    block, clips, smooth = made(bias=True, order=order)
    for linear in (block.a, block.b):  # no rounding, whose gradient is not that of a difference
        linear.weight = lambda dtype, own=linear: own.grid()[0].view_as(own.start.codes).to(dtype)
    slope = torch.randn(30, 12, generator=torch.Generator().manual_seed(8))

    def loss() -> torch.Tensor:
        return (outputs(block, X) * slope).sum() + smooth.penalty()

    with torch.no_grad():
        smooth.u.copy_(0.2 * torch.randn(16, generator=torch.Generator().manual_seed(3)))
        smooth.v.copy_(0.1 * torch.randn(16, generator=torch.Generator().manual_seed(5)))
    smooth.settle(torch.float32)
    loss().backward()
    smooth.collect()
    assert all(not p.requires_grad for t in clips.trained.values() for p in t.parameters())
    for p in (smooth.u, smooth.v):
        for i in (0, 5, 11):
            ends = []
            for step in (1e-2, -2e-2):
                with torch.no_grad():
                    p[i] += step
                smooth.settle(torch.float32)
                ends.append(float(loss().detach()))
            with torch.no_grad():
                p[i] += 1e-2
            smooth.settle(torch.float32)
            assert float(p.grad[i]) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=0.02, abs=0.02)


def test_kept_channels_have_no_factor_and_hard_ones_no_drift() -> None:
    block, clips, smooth = made(bits=4, kept=3, order=True, mode="hard")
    with torch.no_grad():
        smooth.u.fill_(0.5)
    smooth.settle(torch.float32)
    ratio = block.norm.weight / smooth.first[0]
    kept = smooth.spread[-3:]
    assert torch.equal(ratio[kept], torch.ones(3)) and float(ratio.min()) == pytest.approx(torch.tensor(-0.5).exp().item())
    assert not smooth.v.requires_grad and float(smooth.penalty()) == 0.0
    was = outputs(block, X).detach()
    folded = clips.fold()
    y = block.norm(X)[:, smooth.spread]
    torch.testing.assert_close(torch.cat([y @ folded[n].values().T for n in ("a", "b")], -1), was)


@pytest.mark.parametrize(("size", "most"), [(0.1, 0.01), (0.3, 0.015)])
def test_scales_follow_the_columns(size: float, most: float) -> None:
    """Equal factors at 8 bits: what changes is the rounding, not that weights are cut."""
    block, _, smooth = made(8, mode="hard")
    before = outputs(block, X).detach()
    with torch.no_grad():
        smooth.u.copy_(size * torch.randn(16, generator=torch.Generator().manual_seed(3)))
    smooth.settle(torch.float32)
    after = outputs(block, X).detach()
    assert 0 < (after - before).norm() < most * before.norm()


def test_factors_stay_in_bounds_and_as_stored() -> None:
    block, _, smooth = made()
    with torch.no_grad():
        smooth.u[0], smooth.u[1] = 9.0, 0.3
    smooth.settle(torch.bfloat16)
    assert float(smooth.u[0]) == pytest.approx(4.60517, rel=1e-5)
    assert torch.equal(block.norm.weight, block.norm.weight.to(torch.bfloat16).float())


NAMES = ["mlp.gate_proj", "mlp.up_proj"]
LOUD = normal(64, 64)


def loud(
    folder: Path, mode: Mode, places: torch.Tensor | None = None
) -> tuple[Any, ClipSpace, SmoothSpace, list[torch.Tensor]]:
    """A block whose gate and up round their input to 3 bits, channel 5 of which is far too loud, and what is trained of it.

    Also what the two should put out for the norm of :data:`LOUD`, but for that rounding.
    """
    model, _ = sordino.load(make_tiny(folder / "model", layers=1))
    anatomy, block = anatomy_of(model), model.model.layers[0].requires_grad_(False)
    rounded, exact = {}, []
    with torch.no_grad():
        block.post_attention_layernorm.weight[5] = 30.0
    order = torch.arange(64) if places is None else places
    for name in NAMES:
        linear = block.get_submodule(name)
        rounded[name] = RtnSolver().solve(linear.weight.float()[:, order], None, AffineGrid(8, True), 16)
        exact.append(block.post_attention_layernorm(LOUD)[:, order] @ rounded[name].values().T)
        if places is not None:
            order_input(linear, places.int())
        round_inputs(linear, InputGrid(3, group=16), scale=1.0)
    clips = ClipSpace(block, rounded, 0.0, {}, 0.0)
    return block, clips, SmoothSpace(block, anatomy, clips.trained, 0.01, mode, torch.float32), exact


def test_scales_of_inputs_move_while_factors_are_trained(tmp_path: Path) -> None:
    """The loudest channel of every token is pulled down, which a scale without gradients would not ask for."""
    block, clips, space, (gate, up) = loud(tmp_path, "hard")
    hooks = [rounding(clips.trained[n]) for n in NAMES]
    assert all(h is not None and h.moving for h in hooks)
    h = block.post_attention_layernorm(LOUD)
    found = torch.nn.functional.silu(clips.trained[NAMES[0]](h)) * clips.trained[NAMES[1]](h)
    ((found - (torch.nn.functional.silu(gate) * up).detach()) ** 2).mean().backward()
    space.collect()
    grad = space.sites[0].u.grad
    assert grad is not None and int(grad.abs().argmax()) == 5 and float(grad[5]) < 0  # louder by less: u grows
    space.fold()
    assert not any(h.moving for h in hooks if h is not None)


def test_a_site_is_left_alone_if_one_of_its_linears_is(tmp_path: Path) -> None:
    model, _ = sordino.load(make_tiny(tmp_path / "model", layers=1))
    anatomy: Anatomy = anatomy_of(model)
    block = model.model.layers[0]
    rounded = {
        n: RtnSolver().solve(block.get_submodule(n).weight.float(), None, AffineGrid(4, True), 16)
        for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj")
    }
    clips = ClipSpace(block, rounded, 0.01, {}, 0.01)
    space = SmoothSpace(block, anatomy, clips.trained, 0.01, "soft", torch.float32)
    assert [s.held for s in space.sites] == [[block.post_attention_layernorm.weight]]
    assert len(space.groups()[0]["params"]) == 2


@pytest.mark.parametrize("order", [False, True])
def test_first_values_are_those_of_least_loss(order: bool, tmp_path: Path) -> None:
    """A channel that is louder by far than the rest of its group is pulled down, and the loss is the least of all tried."""
    places = torch.randperm(64, generator=torch.Generator().manual_seed(4)) if order else None
    block, clips, space, exact = loud(tmp_path, "soft", places)
    tried: list[float] = []

    def loss() -> float:
        h = block.post_attention_layernorm(LOUD)
        tried.append(float(sum((clips.trained[n](h) - y).square().sum() for n, y in zip(NAMES, exact, strict=True))))
        return tried[-1]

    loudest = block.post_attention_layernorm(LOUD).abs().amax(0)
    space.begin({"gate_up": loudest if places is None else loudest[places]}, loss)
    (site,), before = space.sites, list(tried)
    assert len(before) == 8 and loss() == pytest.approx(min(before)) and min(before) < 0.5 * before[0]
    assert int(site.u.argmax()) == 5 and float(site.penalty()) == 0.0


def test_candidates_are_the_published_ones() -> None:
    inputs, weights = torch.tensor([1.0, 2.0, 40.0]), torch.tensor([1.0, 4.0, 1.0])
    found = list(candidates(inputs, weights))
    assert len(found) == 8 and torch.equal(found[0], torch.zeros(3))
    torch.testing.assert_close(found[1], torch.tensor([0.0, 0.0, 20.0]).clamp(min=1).log())  # above the median
    root = (inputs.sqrt() / weights.sqrt()).log()
    torch.testing.assert_close(found[-1], root - root.mean())


def test_a_fallback_gives_the_prefix_its_values_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ruin(Move):
        def close(self, ctx: BlockContext) -> None:
            divided.append(ctx.q.self_attn.prefix_value / ctx.fp.self_attn.prefix_value)
            for parameter in ctx.q.parameters():
                parameter.data = -3 * parameter.data
            ctx.touch("qkv")

    divided: list[torch.Tensor] = []
    monkeypatch.setattr(tune, "better", lambda *_: True)
    monkeypatch.setitem(MOVES, "ruin", Ruin)
    monkeypatch.setitem(MOVES, "prefix", Fixed)
    model = make_tiny(tmp_path / "model", layers=2)
    groups = ["format.weights.group=16", "format.activations.group=16", "format.kv.bits=16"]
    values = []
    for name, moves in (("smooth", f'{HOSTS[1]}, {{move="prefix"}}, {TUNE}}}'), ("plain", f'{HOSTS[1]}, {{move="prefix"}}')):
        recipe = load_recipe("quarot-w4a4", [f'moves=[{moves}, {{move="ruin"}}]', *groups])
        manifest = sordino.quantize(str(model), recipe, tmp_path / name, windows=8, seqlen=32).manifest
        assert all(b["fallback"] == "rtn" for b in manifest["blocks"])
        values.append([x.self_attn.prefix_value for x in sordino.load(tmp_path / name)[0].model.layers])
    assert float((divided[0] - 1).abs().max()) > 1e-3 and torch.equal(divided[2], torch.ones_like(divided[2]))
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


HOSTS = ['{move="rotate", size="full"}, {move="rotate-inner"}', '{move="channels", count=4}']
TUNE = '{move="tune", epochs=8, weights=0, scales=0, inputs=0, gains=0, smooth=0.001'


@pytest.mark.parametrize("mode", ["soft", "hard", "free"])
@pytest.mark.parametrize("host", HOSTS)
def test_what_was_trained_is_what_the_checkpoint_computes(
    host: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spec section 11.4, by the whole path: the walk's divergence is the loaded checkpoint's."""
    monkeypatch.setattr(tune, "better", lambda *_: True)  # of random weights, the last bits decide whether it is
    model = make_tiny(tmp_path / "model", "qwen2", layers=2)
    moves = f'moves=[{host}, {TUNE}, smooth_mode="{mode}"}}]'
    # guard=tell: of random weights, plain rounding may be better, and would take the place of what is tested here.
    groups = ["format.weights.group=16", "format.activations.group=16", "format.kv.bits=16", "guard=tell"]
    moves = moves.replace("}]", ', smooth_start="search"}]') if mode == "free" else moves
    recipe = load_recipe("quarot-w4a4", [moves, *groups])
    manifest = sordino.quantize(str(model), recipe, tmp_path / "out", windows=16, seqlen=48).manifest
    tuned = [b["moves"]["tune"] for b in manifest["blocks"]]
    assert all(t["kept"] for t in tuned)
    assert_seen_in_the_walk(model, tmp_path / "out", manifest)


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", "weights=0.01, scales=0, inputs=0, gains=0, smooth=0.01", "set weights=0"),
        ("llama", "weights=0, scales=0, inputs=0, smooth=0.01", "set gains=0"),
        ("llama", 'weights=0, scales=0, inputs=0, gains=0, smooth=0.01, smooth_mode="firm"', "smooth_mode"),
    ],
)
def test_what_does_not_go_together_is_refused(family: str, options: str, words: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", family, layers=2)
    recipe = load_recipe("quarot-w4a4", [f'moves=[{{move="tune", {options}}}]', "format.weights.group=16"])
    with pytest.raises(InputError, match=words):
        sordino.quantize(str(model), recipe, tmp_path / "out", windows=4, seqlen=32)
