"""Trained scales find the best one from a bad start, and are what is stored."""

from __future__ import annotations

import pytest
import torch

from sordino.numerics.affine import round_scale
from sordino.numerics.inputs import InputGrid
from sordino.numerics.kv import KvGrid
from sordino.repair.input_spaces import Trained
from sordino.runtime.inputs import Once


def descend(trained: Trained, error: object) -> None:
    optimizer = torch.optim.Adam([trained.parameter], lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        error(trained()).sum().backward()  # type: ignore[operator]
        optimizer.step()


@pytest.mark.parametrize("start", [0.3, 3.0])
@pytest.mark.parametrize("bits", [3, 4])
def test_a_static_scale_comes_near_the_best_of_a_fine_grid(bits: int, start: float) -> None:
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))

    def error(scale: torch.Tensor) -> torch.Tensor:
        return (InputGrid(bits, static=True).fake(x, scale) - x).square().mean()

    grid = torch.linspace(0.05, 2.0, 400)
    errors = torch.stack([error(s) for s in grid])
    trained = Trained(torch.tensor([start * float(grid[errors.argmin()])]))
    descend(trained, error)
    assert torch.equal(trained().detach(), round_scale(trained().detach()))
    assert float(error(trained().detach())) <= 1.05 * float(errors.min())


def test_each_head_finds_its_own() -> None:
    sizes = torch.tensor([1.0, 10.0])
    x = torch.randn(2, 2, 300, 16, generator=torch.Generator().manual_seed(1)) * sizes[:, None, None]
    grid = KvGrid(4, True, True)
    trained = Trained(torch.tensor([1.0, 1.0]))
    descend(trained, lambda s: (grid.fake(x, s) - x).square().mean((0, 2, 3)) / sizes.square())
    scales = trained().detach()
    assert float(scales[1] / scales[0]) == pytest.approx(10.0, rel=0.15)


def test_linears_of_a_site_round_their_input_once() -> None:
    """And the next input anew, whoever asks first."""
    once, made = Once(2), []

    def make() -> torch.Tensor:
        made.append(torch.randn(3))
        return made[-1]

    first, second = torch.zeros(3), torch.zeros(3)
    assert once(first, make) is once(first, make) and len(made) == 1
    assert once(first, make) is made[1]  # a second pass with the same tensor: something may have been trained between
    assert once(second, make) is once(second, make) and len(made) == 3
    assert once(first, make) is not made[2]
