"""Outlier channels at 8 bits (Atom; BiSup, spec section 2, host "Atom").

The input channels of every linear are put in order of their energy on the calibration text, so that those of one size share
a group, and the last k of them, with the columns of the weight that read them, have 8 bits. Energy is the sum of squares
in the full-precision model. The order is applied online, by an index; linears of one site share it.
Shapes: R = out_features, C = in_features, k kept channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sordino.anatomy import SITES, Anatomy, Site
from sordino.contract import Move, SiteInputs
from sordino.errors import InputError
from sordino.recipe import Format, PositiveInt
from sordino.reshape.replace import replace
from sordino.runtime.inner import dress
from sordino.runtime.modules import ORDER


class Channels(Move):
    """Order input channels by energy and keep the last ones at 8 bits.

    Args:
        count: how many are kept; Atom keeps 128 of 4096, about 3 %.
    """

    name = "channels"
    reshapes_alone = True
    survey_windows = 32

    def __init__(self, count: PositiveInt = 16) -> None:
        self.kept = count

    def check(self, fmt: Format, anatomy: Anatomy, target: str | None) -> None:
        """The kept channels' own scale belongs to a token, so that static scales do not go with it."""
        if fmt.activations.static:
            raise InputError("move 'channels': kept channels have a dynamic scale; set format.activations.mode=\"dynamic\"")

    def survey(self, index: int, block: nn.Module, inputs: SiteInputs, artifacts: dict[str, Any]) -> None:
        """The order of each site's channels."""
        orders: list[dict[Site, Tensor]] = artifacts.setdefault(self.name, [])
        orders.append({site: energy_order(inputs, site) for site in SITES})

    def inner(self) -> tuple[str, ...]:
        """Channels are put in order."""
        return ("channels",)

    @torch.no_grad()
    def reshape(self, block: nn.Module, index: int, anatomy: Anatomy, artifacts: dict[str, Any]) -> None:
        """Order the columns of every linear, and let it order its input."""
        for linear in anatomy.linears:
            module: Any = block.get_submodule(linear.name)
            order = artifacts[self.name][index][linear.site].clone()  # files refuse tensors that share memory
            module.register_buffer(ORDER, order)
            replace(module, module.weight[:, order])
        dress(block, self.inner())


def energy_order(inputs: SiteInputs, site: Site) -> Tensor:
    """Channels of a site by rising sum of squares, int32 [C]; equal ones stay in order."""
    energy = sum(x.flatten(0, -2).double().square().sum(0) for _, x in inputs(site))
    assert isinstance(energy, Tensor)
    return energy.argsort(stable=True).int()
