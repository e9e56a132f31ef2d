"""Rounding by tiles equals the formula written out with torch's operations, values and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sordino.numerics import straight


def written_out(x: Tensor, scale: Tensor, low: Any, high: Any) -> Tensor:
    steps = x.float() / scale
    near = steps + (steps.detach().round() - steps.detach())
    return (near.clamp(low, high) * scale).to(x.dtype)


@pytest.mark.parametrize("tile", [1, 7, 64, 1 << 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "scales", "zeros"),
    [
        ((), (), None),
        ((0, 3), (1,), None),
        ((3, 5, 12), (), None),
        ((3, 5, 12), (1,), None),
        ((3, 5, 12), (3, 5, 1), None),
        ((3, 5, 12), (3, 5, 12), None),
        ((3, 5, 12), (12,), None),
        ((2, 3, 5, 4), (3, 1, 1), (3, 1, 1)),
        ((2, 3, 5, 4), (2, 3, 5, 1), (2, 3, 5, 1)),
        ((6, 3, 4), (6, 3, 1), (6, 3, 1)),
    ],
)
def test_equals_the_formula(
    shape: tuple[int, ...], scales: tuple[int, ...], zeros: Any, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(straight, "_TILE", tile)
    rng = torch.Generator().manual_seed(len(shape))
    x = (2 * torch.randn(shape, generator=rng)).to(dtype)
    scale = torch.rand(scales, generator=rng) / 2 + 0.3
    zero = None if zeros is None else torch.randint(3, 6, zeros, generator=rng).float()
    low, high = (-4, 3) if zero is None else (-zero, 7 - zero)
    results = []
    for function in (straight.fake_round, written_out):
        leaves = [t.clone().requires_grad_() for t in (x, scale)]
        out = function(*leaves, low, high)
        weights = torch.linspace(-1, 2, out.numel()).view(shape).to(dtype)
        results.append((out, *torch.autograd.grad(out, leaves, weights)))
    (ours, dx, ds), (theirs, dx_written, ds_written) = results
    assert ours.dtype == dtype and torch.equal(ours, theirs)
    torch.testing.assert_close(dx, dx_written)
    torch.testing.assert_close(ds, ds_written, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(straight.fake_round(x, scale, low, high), theirs)


def test_only_what_is_trained_gets_a_gradient() -> None:
    x, scale = torch.tensor([[0.2, 9.0]]), torch.tensor([0.5])
    leaf = x.clone().requires_grad_()
    straight.fake_round(leaf, scale, -4, 3).sum().backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [[1.0, 0.0]] and scale.grad is None
    leaf = scale.clone().requires_grad_()
    straight.fake_round(x, leaf, -4, 3).sum().backward()
    assert leaf.grad is not None and leaf.grad.tolist() == pytest.approx([3.0 - 0.4]) and x.grad is None
    assert not straight.fake_round(x, scale, -4, 3).requires_grad
