"""Trained scales and clips of rounded inputs and of keys and values (PrefixQuant, spec section 5, trainables c).

A static scale, or the share of a token's extremes that a dynamic one reaches, is trained by its logarithm and used on every
step as it will be stored. Linears of a site share theirs. Shapes: K key heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sordino.anatomy import SITES, Anatomy
from sordino.numerics.kv import KvGrid
from sordino.repair.clip import Clip
from sordino.repair.spaces import grown
from sordino.rounding import Rounded
from sordino.runtime.attention import KEY_SCALE, VALUE_SCALE
from sordino.runtime.inner import ATTENTION
from sordino.runtime.inputs import Once, RoundInput, rounding
from sordino.runtime.modules import SCALE


class Trained:
    """One scale, or one for every head.

    Attributes:
        first: its value before training.
        parameter: logarithm of its value over the first one.
    """

    def __init__(self, first: Tensor):
        self.first = first.detach().float().clone()
        self.parameter = nn.Parameter(torch.zeros_like(self.first))

    def __call__(self) -> Tensor:
        """The value as it will be stored, with gradients as if it were not rounded."""
        return grown(self.first, self.parameter)


def _trained(first: Tensor, share: bool) -> Trained | Clip:
    return Clip(first, first) if share else Trained(first)


class InputSpace:
    """Scales of the rounded inputs of a block, and of its keys and values.

    Args:
        block: the decoder layer.
        anatomy: of its family.
        rate: learning rate of the scales' logarithms; 0 trains nothing.
        clips: train the shares of dynamic ones by bounded factors instead (repair/clip.py).
    """

    def __init__(self, block: nn.Module, anatomy: Anatomy, rate: float, clips: bool = False):
        self.rate = rate
        self.sites: list[tuple[list[tuple[nn.Module, RoundInput]], Trained | Clip]] = []
        self.attention = block.get_submodule(ATTENTION)
        self.kv: dict[str, Trained | Clip] = {}
        if rate == 0:
            return
        for site in SITES:
            linears = [block.get_submodule(x.name) for x in anatomy.at(site)]
            pairs = [(m, hook) for m in linears if (hook := rounding(m)) is not None]
            if pairs:
                trained = _trained(pairs[0][0].get_buffer(SCALE), clips and not pairs[0][1].grid.static)
                self.sites.append((pairs, trained))
                once = Once(len(pairs)) if len(pairs) > 1 else None
                for _, hook in pairs:
                    hook.trained, hook.once = trained, once
        grid: KvGrid | None = getattr(self.attention, "kv_grid", None)
        if grid is not None:
            bounded = clips and not grid.static
            self.kv = {name: _trained(self.attention.get_buffer(name), bounded) for name in (KEY_SCALE, VALUE_SCALE)}
            self._train_kv(self.kv)

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer."""
        members = [t.parameter for _, t in self.sites] + [t.parameter for t in self.kv.values()]
        return [{"params": members, "lr": self.rate}] if members else []

    def collect(self) -> None:
        """After the backward pass: nothing to do."""

    def settle(self) -> None:
        """After an optimizer step: nothing to do."""

    @torch.no_grad()
    def fold(self) -> dict[str, Rounded]:
        """Make the trained values the modules' own; no linear's weight changes."""
        self._give(lambda trained: trained().detach())
        return {}

    def undo(self) -> None:
        """After :meth:`fold`: put the first values back."""
        self._give(lambda trained: trained.first)

    def _train_kv(self, scales: dict[str, Trained | Clip]) -> None:
        attention: Any = self.attention
        attention.trained_scales = scales

    def _give(self, value: Any) -> None:
        for pairs, trained in self.sites:
            for linear, hook in pairs:
                hook.trained = hook.once = None
                linear.register_buffer(SCALE, value(trained).clone())
        for name, trained in self.kv.items():
            self._train_kv({})
            self.attention.register_buffer(name, value(trained).clone())
