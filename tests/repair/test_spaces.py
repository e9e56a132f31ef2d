"""Parameter spaces: step 0 is the rounded weight, gradients are what they say, and folding gives what was trained."""

import pytest
import torch
from torch import Tensor, nn

from sordino.numerics.affine import AffineGrid
from sordino.repair.spaces import GainSpace, TrainedLinear, WeightSpace
from sordino.round.rtn import RtnSolver
from sordino.rounding import Rounded


def rounded(bits: int, symmetric: bool = False, seed: int = 0) -> Rounded:
    w = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))
    solver = RtnSolver()
    solver.keep_latent = True
    return solver.solve(w, None, AffineGrid(bits, symmetric), 16)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("latent", [True, False])
def test_step_zero_is_the_rounded_weight(bits: int, symmetric: bool, latent: bool) -> None:
    r = rounded(bits, symmetric)
    if not latent:
        r.latent = None
    trained = TrainedLinear(r, None, weights=True, scales=True)
    assert torch.equal(trained.weight(torch.float32), r.values())
    back = trained.rounded()
    assert torch.equal(back.codes, r.codes) and torch.equal(back.scale, r.scale)


def test_scale_gradient_is_exact_and_latent_gradient_goes_straight_through() -> None:
    r = rounded(3)
    trained = TrainedLinear(r, None, weights=True, scales=True)
    g = torch.randn(6, 32)
    (trained.weight(torch.float32) * g).sum().backward()
    steps = r.codes.float().view(6, 2, 16) - r.zero[..., None]
    assert trained.growth.grad is not None and trained.latent.grad is not None
    # d/d growth of (steps * first * exp(growth)) at growth 0
    assert torch.allclose(trained.growth.grad, (steps * g.view(6, 2, 16)).sum(-1) * r.scale, rtol=1e-5, atol=1e-6)
    assert torch.allclose(trained.latent.grad, g.view(6, 2, 16) * r.scale[..., None])


def test_latent_positions_stay_on_the_grid() -> None:
    trained = TrainedLinear(rounded(2), None, weights=True, scales=True)
    with torch.no_grad():
        trained.latent += 100 * torch.randn_like(trained.latent)
    trained.limit()
    codes = (trained.latent.round() + trained.zero).view(6, 32)
    assert torch.equal(codes, trained.rounded().codes.float())


def test_scales_are_stored_numbers_at_every_step() -> None:
    trained = TrainedLinear(rounded(3), None, weights=False, scales=True)
    with torch.no_grad():
        trained.growth += 0.1 * torch.randn_like(trained.growth)
    scale = trained.scale().detach()
    assert torch.equal(scale, scale.bfloat16().float()) and torch.equal(trained.rounded().scale, scale)


def test_weight_space_replaces_and_puts_back() -> None:
    block = nn.Sequential(nn.Linear(32, 6), nn.ReLU())
    plain, r = block[0], rounded(2)
    space = WeightSpace(block, {"0": r}, weights=0.1, scales=0.0)
    assert isinstance(block[0], TrainedLinear) and len(space.groups()) == 1
    x: Tensor = torch.randn(3, 32)
    assert torch.allclose(block[0](x), nn.functional.linear(x, r.values(), plain.bias), atol=1e-5)
    assert torch.equal(space.fold()["0"].codes, r.codes)
    assert block[0] is plain


def test_gains_are_trained_in_fp32_and_used_as_stored() -> None:
    norm = nn.LayerNorm(8, bias=False, dtype=torch.bfloat16)
    space = GainSpace([norm], 0.1, torch.float32)
    optimizer = torch.optim.SGD(space.groups())
    norm(torch.randn(2, 8).bfloat16()).float().square().sum().backward()
    space.collect()
    assert norm.weight.grad is None and space.masters[0].grad is not None
    optimizer.step()
    space.settle()
    assert torch.equal(norm.weight.detach(), space.masters[0].detach().bfloat16())
    space.fold()
    assert not norm.weight.requires_grad
