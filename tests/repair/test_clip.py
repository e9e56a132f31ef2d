"""Parameter-efficient spaces: step 0 is the host, what is trained folds exactly, gradients are those of the definition."""

from __future__ import annotations

from dataclasses import replace
from itertools import repeat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sordino.numerics.affine import AffineGrid, round_scale
from sordino.numerics.kept import Kept
from sordino.repair.clip import Clip, ClippedLinear, ClipSpace, rounded_from
from sordino.repair.descent import descend
from sordino.repair.low_rank import LowRank, error_directions, random_directions
from sordino.round.gptq import GptqSolver
from sordino.round.rtn import RtnSolver
from sordino.rounding import Rounded, Stats


def solved(seed: int, bits: int, symmetric: bool, gptq: bool, group: int = 16) -> Rounded:
    rng = torch.Generator().manual_seed(seed)
    w, x = torch.randn(6, 32, generator=rng), torch.randn(100, 32, generator=rng) @ torch.randn(32, 32, generator=rng)
    solver = GptqSolver() if gptq else RtnSolver()
    solver.keep_latent = True
    prepared = solver.prepare(Stats(100, x.T @ x), group) if gptq else None
    return solver.solve(w, prepared, AffineGrid(bits, symmetric), group)


def update(r: Rounded, rank: int = 4) -> LowRank:
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(200, r.codes.shape[1], generator=rng)
    return LowRank(error_directions(rounded_from(r) - r.values(), x.T @ x, 200, rank), len(r.codes))


@given(st.integers(0, 1000), st.sampled_from([2, 3, 4, 8]), st.booleans(), st.booleans(), st.booleans())
def test_step_0_is_the_host(seed: int, bits: int, symmetric: bool, gptq: bool, low_rank: bool) -> None:
    r = solved(seed, bits, symmetric, gptq)
    made = ClippedLinear(r, None, update(r) if low_rank else None)
    assert torch.equal(made.weight(torch.float32).detach(), r.values())
    back = made.rounded()
    assert torch.equal(back.codes, r.codes) and torch.equal(back.scale, r.scale)


@given(st.integers(0, 1000), st.sampled_from([3, 4]), st.booleans())
def test_what_was_trained_is_what_is_folded(seed: int, bits: int, symmetric: bool) -> None:
    r = solved(seed, bits, symmetric, gptq=True)
    made, rng = ClippedLinear(r, None, update(r)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        assert made.update is not None
        made.update.b.copy_(0.2 * torch.randn(made.update.b.shape, generator=rng))
        made.clip.parameter.add_(torch.randn(made.clip.parameter.shape, generator=rng))
    back, weight = made.rounded(), made.weight(torch.float32).detach()
    assert torch.equal(weight, back.values())
    assert torch.equal(back.scale, round_scale(back.scale))
    # The low-rank update is in the codes, the definition as an oracle: nearest of all values of the grid, group by group.
    value = (rounded_from(r) + made.update().detach()).view(6, 2, 16)
    levels = (torch.arange(1 << bits) - back.zero[..., None]) * back.scale[..., None]
    best = (value[..., None] - levels[:, :, None]).abs().amin(-1)
    torch.testing.assert_close((value - weight.view_as(value)).abs(), best, rtol=1e-4, atol=1e-5)


def test_random_directions_have_the_size_of_the_others() -> None:
    x = torch.randn(300, 12) * torch.arange(1, 13)
    a, again = (random_directions(x.T @ x, 300, 5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert a.shape == (5, 12) and torch.equal(a, again)
    torch.testing.assert_close((x @ a.T).square().mean(0), torch.ones(5), rtol=1e-3, atol=1e-3)
    other = random_directions(x.T @ x, 300, 5, torch.Generator().manual_seed(4))
    assert not torch.allclose(a, other)


@given(st.integers(0, 1000), st.booleans())
def test_kept_columns_take_their_part_of_an_update(seed: int, gptq: bool) -> None:
    """At 8 bits again (spec section 5): the host at step 0, then within half a step of the exact sum."""
    r, rng = solved(seed, 3, True, gptq), torch.Generator().manual_seed(seed)
    r.kept = Kept.of(3 * torch.randn(6, 5, generator=rng))
    made = ClippedLinear(r, None, update(r))
    assert torch.equal(made.weight(torch.float32).detach(), r.values())
    assert made.rounded().kept is not None and torch.equal(made.rounded().kept.codes, r.kept.codes)  # type: ignore[union-attr]
    made.weight(torch.float32)[:, -5:].sum().backward()
    assert made.update is not None and made.update.b.grad is not None and bool(made.update.b.grad.any())
    with torch.no_grad():
        made.update.b.copy_(0.2 * torch.randn(made.update.b.shape, generator=rng))
    weight, back = made.weight(torch.float32).detach(), made.rounded()
    assert torch.equal(weight, back.values())
    exact, half = r.kept.values() + made.update().detach()[:, -5:], r.kept.scale / 2
    exact = torch.minimum(torch.maximum(exact, -128 * r.kept.scale), 127 * r.kept.scale)
    assert bool(((weight[:, -5:] - exact).abs() <= half * 1.001).all())
    assert not torch.equal(weight[:, -5:], r.kept.values())


def test_a_latent_whose_code_is_another_is_put_beside_the_stored_one() -> None:
    r = solved(0, 3, True, gptq=True)
    assert r.latent is not None
    moved = replace(r, latent=r.latent + 2.0 * r.scale.repeat_interleave(16, 1))
    made = ClippedLinear(moved, None, None)
    assert torch.equal(made.weight(torch.float32).detach(), r.values())
    assert torch.equal(made.rounded().codes, r.codes)


@pytest.mark.parametrize("share", [0.2, 0.85, 0.9, 0.95, 1.0])
def test_a_clip_starts_at_the_hosts_and_stays_bounded(share: float) -> None:
    first = round_scale(torch.tensor([0.3, 7.0]))
    clip = Clip(first, torch.full((2,), share))
    assert torch.equal(clip().detach(), first)
    with torch.no_grad():
        clip.parameter.fill_(50.0)
        assert bool((clip() <= first / min(share, 0.982) * 1.01).all())
        clip.parameter.fill_(-50.0)
        assert bool((clip() < 1e-4).all())


def test_gradients_reach_clips_and_b_at_once_and_a_after_it() -> None:
    """Spec section 11.7: none on the base weight, and none on A before B has left zero."""
    r, x = solved(3, 3, True, gptq=True), torch.randn(40, 32, generator=torch.Generator().manual_seed(9))
    made = ClippedLinear(r, None, update(r))
    assert made.update is not None
    assert {n for n, p in made.named_parameters() if p.requires_grad} == {"update.a", "update.b"}
    made(x).square().sum().backward()
    assert made.clip.parameter.grad is not None and bool((made.clip.parameter.grad != 0).all())
    assert made.update.b.grad is not None and float(made.update.b.grad.abs().amin()) > 0
    assert made.update.a.grad is not None and not made.update.a.grad.any()
    with torch.no_grad():
        made.update.b.add_(0.01)
    made(x).square().sum().backward()
    assert bool(made.update.a.grad.any())


def test_a_clips_gradient_is_lsqs() -> None:
    """Of one weight inside and one that is clipped, by hand: rounding error in steps, or the outermost code."""
    codes, scale = torch.tensor([[5, 7]], dtype=torch.uint8), torch.tensor([[0.5]])
    r = Rounded(codes, scale, torch.tensor([[4.0]]), 3, 2, True, latent=torch.tensor([[0.6, 2.2]]))
    made = ClippedLinear(r, None, None)
    made.weight(torch.float32).sum().backward()
    clip = made.clip
    slope = clip.whole * torch.sigmoid(clip.parameter) * (1 - torch.sigmoid(clip.parameter))
    assert clip.parameter.grad is not None
    assert float(clip.parameter.grad) == pytest.approx(float(slope.detach()) * ((1 - 1.2) + 3), rel=1e-5)


@given(st.integers(0, 1000), st.sampled_from([1, 3, 8]))
def test_directions_are_the_best_of_their_rank(seed: int, rank: int) -> None:
    """Eckart and Young: no other update of that rank leaves less of the error, channels weighted by their size."""
    rng = torch.Generator().manual_seed(seed)
    error, x = (
        torch.randn(6, 12, generator=rng),
        torch.randn(300, 12, generator=rng) * (0.1 + torch.rand(12, generator=rng) * 5),
    )
    a = error_directions(error, x.T @ x, 300, rank)
    assert a.shape == (min(rank, 6), 12)
    torch.testing.assert_close((x @ a.T).square().mean(0), torch.ones(len(a)), rtol=1e-3, atol=1e-3)
    c = x.square().mean(0).sqrt()
    target, basis = (error * c).double(), (a * c).double()
    left = (target - target @ torch.linalg.pinv(basis) @ basis).square().sum()
    least = torch.linalg.svdvals(target)[len(a) :].square().sum()
    assert float(left) == pytest.approx(float(least), rel=1e-4, abs=1e-6)


def test_training_comes_nearer_to_the_exact_output_and_folds() -> None:
    """Host: min-max RTN at 3 bits. Clips lower the output error, an update more; the fold is what was trained."""
    rng = torch.Generator().manual_seed(2)
    w, x = torch.randn(6, 32, generator=rng), torch.randn(400, 32, generator=rng) @ torch.randn(32, 32, generator=rng)
    grid = AffineGrid(3, True, search=0)
    params = grid.fit_groups(w, 16)
    r = Rounded.of(grid.codes(w, params), params, grid, 16, latent=w)
    exact, errors = x @ w.T, {}
    for name, rate, rank in (("host", 0.0, 0), ("clip", 0.02, 0), ("both", 0.02, 6)):
        block = nn.Module()
        block.linear = nn.Linear(32, 6, bias=False)
        block.linear.weight = nn.Parameter(r.values(), requires_grad=False)
        space = ClipSpace(block, {"linear": r}, rate, {"linear": update(r, rank)} if rank else {}, 0.02)

        def backward(_: torch.Tensor, linear: nn.Module = block.linear) -> float:
            loss: torch.Tensor = (linear(x) - exact).square().mean()
            loss.backward()
            return loss.item()

        if rate:
            descend([space], repeat(torch.zeros(1)), 300, backward)
        trained = block.linear(x).detach()
        back = space.fold()["linear"]
        assert type(block.linear) is nn.Linear
        torch.testing.assert_close(x @ back.values().T, trained)
        errors[name] = float((trained - exact).square().mean())
    assert errors["clip"] < 0.9 * errors["host"] and errors["both"] < 0.9 * errors["clip"]
