"""Taking the mean off what linears see (ours; like the shift of Outlier Suppression+, 2304.09145, which takes mid-ranges).

A large part of a linear's input is the same for every token: two thirds of the energy of what q_proj sees in smollm2. Rounding
spends its codes on that constant, and a rotation spreads it over all channels. It can move into biases instead, exactly:
a norm gets the bias ``-m``, and the linears that it feeds ``W m``; likewise v_proj gets ``-c`` and o_proj ``W c``, because the
weights of attention sum to one. From keys a constant can be dropped altogether, behind the rotary embedding: it adds the same
to all scores of a query, which softmax does not see. What is left has less energy, and so smaller steps.
Shapes: R = out_features, C = in_features, K key heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sordino.anatomy import Anatomy, Site
from sordino.contract import Move, SiteInputs
from sordino.errors import InputError
from sordino.recipe import Format
from sordino.reshape.quiet import WINDOWS, channel_means
from sordino.reshape.replace import replace
from sordino.runtime.attention import center_keys
from sordino.runtime.inner import ATTENTION
from sordino.runtime.modules import give_bias

_VALUES = f"{ATTENTION}.v_proj"


class Center(Move):
    """Take the mean off the inputs of linears; before every other move that reshapes.

    Args:
        inputs: of the linears behind norms.
        values: of o_proj, and so of the values.
        keys: of the keys, behind the rotary embedding.
    """

    name = "center"
    reshapes_first = True
    survey_windows = WINDOWS

    def __init__(self, inputs: bool = True, values: bool = True, keys: bool = True) -> None:
        self.inputs, self.values, self.survey_keys = inputs, values, keys

    def inner(self) -> tuple[str, ...]:
        """Keys lose theirs at run time."""
        return ("key-means",) if self.survey_keys else ()

    def check(self, fmt: Format, anatomy: Anatomy, target: str | None) -> None:
        """Needs a norm or values to take it off."""
        if self.inputs and not anatomy.norms:
            raise InputError(
                f"move 'center': {anatomy.model_type} has no norms before its linears to give biases to; set inputs=false"
            )
        if not (self.inputs or self.values or self.survey_keys):
            raise InputError("move 'center': inputs, values and keys are all off")

    def biases(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Norms, and the linears behind them and around the values."""
        norms = anatomy.norms if self.inputs else {}
        fed = {*norms, *(["o"] if self.values else [])}
        linears = [x.name for x in anatomy.linears if not x.bias and (x.site in fed or (self.values and x.name == _VALUES))]
        return (*norms.values(), *linears)

    def survey(self, index: int, block: nn.Module, inputs: SiteInputs, artifacts: dict[str, Any]) -> None:
        """Means of one block's inputs and keys."""
        found = artifacts.setdefault(self.name, {})
        sites: list[Site] = [*(("qkv", "gate_up") if self.inputs else ()), *(("o",) if self.values else ())]
        for site in sites:
            found[index, site] = channel_means(inputs(site))
        if self.survey_keys:
            found[index, "keys"] = artifacts["keys"]

    @torch.no_grad()
    def reshape(self, block: nn.Module, index: int, anatomy: Anatomy, artifacts: dict[str, Any]) -> None:
        """Take them off, and give linears the biases that make up for it."""
        found = artifacts[self.name]
        attention: Any = block.get_submodule(ATTENTION)
        if self.survey_keys:
            center_keys(attention, found[index, "keys"].to(attention.k_proj.weight.dtype))
        for site, name in anatomy.norms.items() if self.inputs else ():
            norm: Any = block.get_submodule(name)
            _add(norm, -found[index, site])
            taken = -norm.bias.double()  # as it is stored
            for linear in anatomy.at(site):
                module: Any = block.get_submodule(linear.name)
                _add(module, module.weight.double() @ taken)
        if self.values:
            _shift_values(attention, found[index, "o"], anatomy.key_heads)


def _shift_values(attention: Any, means: Tensor, heads: int) -> None:
    """Take the means [C] of o_proj's input off the values; query heads that share a key head share theirs."""
    v, o = attention.v_proj, attention.o_proj
    before = 0.0 if v.bias is None else v.bias.double()
    _add(v, -means.view(heads, -1, attention.head_dim).mean(1).flatten())
    taken = (before - v.bias.double()).view(heads, 1, -1)  # as it is stored
    _add(o, o.weight.double() @ taken.expand(-1, o.in_features // taken.numel(), -1).flatten())


def _add(module: Any, bias: Tensor) -> None:
    """Add to the bias of a norm or linear, which gets one if it has none."""
    give_bias(module)
    replace(module, module.bias.double() + bias, "bias")
