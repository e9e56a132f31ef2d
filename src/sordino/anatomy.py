"""Anatomy: where things are in a decoder family.

Derived from the transformers module tree: a skeleton of the model is built on the meta device (no memory), its list of
blocks found, and the linears of a block sorted into the four sites whose members share one input. A small table names
the families whose paths are tested; anything else is refused rather than guessed at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from sordino.errors import InputError

Site = Literal["qkv", "o", "gate_up", "down"]
SITES: tuple[Site, ...] = ("qkv", "o", "gate_up", "down")

# Families that the test suite runs through every path. The value says whether input_layernorm and
# post_attention_layernorm feed qkv and gate_up (pre-norm), or the norms follow the sublayers (no norm to absorb into).
FAMILIES = {"llama": True, "mistral": True, "qwen2": True, "qwen3": True, "smollm3": True, "olmo2": False}

_SITE_OF = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "o_proj": "o",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "down_proj": "down",
}


@dataclass(frozen=True)
class Linear:
    """One linear of a block.

    Attributes:
        name: path inside the block, e.g. ``self_attn.q_proj``.
        site: which shared input feeds it.
        in_features: columns of the weight.
        out_features: rows of the weight.
        bias: whether it has one.
    """

    name: str
    site: Site
    in_features: int
    out_features: int
    bias: bool


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a decoder are, by module path.

    Attributes:
        model_type: transformers' name of the family.
        blocks: path of the list of decoder layers; ``{blocks}.{i}`` is a block.
        n_blocks: how many.
        linears: the linears of a block, in site order (every block of these families is alike).
        norms: path inside a block of the norm that feeds a site, where there is one.
        final_norm: path of the norm before the head.
        embeddings: path of the token embedding.
        head: path of the output projection.
        tied: embedding and head share one table.
        key_heads: heads of keys and values in a block.
    """

    model_type: str
    blocks: str
    n_blocks: int
    linears: tuple[Linear, ...]
    norms: dict[Site, str]
    final_norm: str
    embeddings: str
    head: str
    tied: bool
    key_heads: int

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.at("qkv")[0].in_features

    def at(self, site: Site) -> tuple[Linear, ...]:
        """Linears that share the input of ``site``."""
        return tuple(x for x in self.linears if x.site == site)

    def full_name(self, block: int, linear: str) -> str:
        """Module path of a linear in the whole model."""
        return f"{self.blocks}.{block}.{linear}"

    def absorbable(self) -> dict[str, str]:
        """Pairs ``down -> up``: a positive scale on the input columns of the first can move to the rows of the second.

        down_proj's input is ``act(gate) * up``, linear in up_proj. (o_proj's input is a mixture of v_proj's outputs, but
        there the columns of all query heads of a group would have to share a scale.)
        """
        return {"mlp.down_proj": "mlp.up_proj"}


def skeleton(config: PretrainedConfig, attention: str = "sdpa") -> nn.Module:
    """The transformers model of a config on the meta device: structure without memory.

    Args:
        config: of a known family.
        attention: name of the attention function that its layers call.

    Raises:
        InputError: if the family is unknown, naming those that are.
    """
    if config.model_type not in FAMILIES:
        raise InputError(f"unknown architecture '{config.model_type}'; known: {', '.join(sorted(FAMILIES))}")
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.eval()


def anatomy_of(model: nn.Module) -> Anatomy:
    """Read the anatomy off a transformers causal language model (any device, meta included).

    Raises:
        InputError: if a block holds a linear that no site explains.
    """
    config: Any = model.config
    if config.model_type not in FAMILIES:
        raise InputError(f"unknown architecture '{config.model_type}'; known: {', '.join(sorted(FAMILIES))}")
    path, blocks = next(
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    )
    backbone = path.rpartition(".")[0]
    linears = [_linear(name, m) for name, m in blocks[0].named_modules() if isinstance(m, nn.Linear)]
    linears.sort(key=lambda x: SITES.index(x.site))
    prenorm = FAMILIES[config.model_type]
    return Anatomy(
        model_type=config.model_type,
        blocks=path,
        n_blocks=len(blocks),
        linears=tuple(linears),
        norms={"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"} if prenorm else {},
        final_norm=f"{backbone}.norm",
        embeddings=f"{backbone}.embed_tokens",
        head="lm_head",
        tied=bool(config.tie_word_embeddings),
        key_heads=int(config.num_key_value_heads),
    )


def _linear(name: str, module: nn.Linear) -> Linear:
    site = _SITE_OF.get(name.rpartition(".")[2])
    if site is None:
        raise InputError(f"block linear '{name}' fits no known site; known: {', '.join(_SITE_OF)}")
    return Linear(name, site, module.in_features, module.out_features, module.bias is not None)  # type: ignore[arg-type]


def hidden_states(out: Any) -> Tensor:
    """What a decoder layer hands on, [B, L, D]: some families return it alone, some first in a tuple."""
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


_WIDEST = 576  # whole rows of the model that `wide` was measured on


def group_size(group: str | int, linear: Linear, name: str) -> int:
    """Number of input columns that share a scale.

    Args:
        group: ``channel`` (one group a row), ``auto`` (the largest of 128, 64, 32 that divides, else channel), ``wide`` (the
            largest multiple of 32 up to 576 that divides, likewise), or a number.
        linear: the linear.
        name: its full name, for the message.

    Raises:
        InputError: if a number does not divide the input features, or the word is no weight group.
    """
    n = linear.in_features
    if group == "channel":
        return n
    if group == "auto":
        return next((g for g in (128, 64, 32) if n % g == 0), n)
    if group == "wide":
        return max((g for g in range(32, _WIDEST + 1, 32) if n % g == 0), default=n)
    if isinstance(group, int):
        if n % group:
            fits = [g for g in (128, 64, 32, 16, 8) if n % g == 0]
            remedy = f"--set format.weights.group={fits[0]}" if fits else "--set format.weights.group=channel"
            raise InputError(f"{name}: group {group} does not divide in_features {n}; try {remedy} or group=auto")
        return group
    raise InputError(f"group '{group}' is no weight group: use channel, auto, wide or a number")
