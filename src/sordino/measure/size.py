"""Bits, honestly: every stored bit that serves the quantized linears over their parameters, and the whole file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from sordino.runtime.modules import QuantEmbedding, QuantLinear, TiedHead


@dataclass(frozen=True)
class Size:
    """Sizes of a loaded model.

    Attributes:
        bits_per_weight: codes, scales, zeros and added biases of the quantized block linears over their parameters;
            of a model without any, the width of its block linears.
        bits_per_parameter: the whole checkpoint over all parameters of the original model.
        bytes: of the stored tensors.
    """

    bits_per_weight: float
    bits_per_parameter: float
    bytes: int


def size_of(model: Any) -> Size:
    """Measure a loaded transformers model."""
    head = model.get_output_embeddings()
    stored, parameters, bits, weights = 0, 0, 0, 0
    seen: set[int] = set()
    for module in model.modules():
        own = [t for t in (*module._parameters.values(), *_persistent(module)) if t is not None and id(t) not in seen]
        seen |= {id(t) for t in own}
        stored += sum(t.nbytes for t in own)
        if isinstance(module, QuantLinear):
            n = module.in_features * module.out_features
            parameters += n + (0 if module.bias is None else module.bias.numel())
            if module is not head:
                bits, weights = bits + 8 * sum(t.nbytes for t in own), weights + n
        elif isinstance(module, QuantEmbedding):
            parameters += module.num_embeddings * module.embedding_dim
        elif not isinstance(module, TiedHead):
            parameters += sum(t.numel() for t in own)
    per_weight = bits / weights if weights else _plain_bits(model, head)
    return Size(per_weight, 8 * stored / parameters, stored)


def _persistent(module: nn.Module) -> list[Any]:
    return [b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set]


def _plain_bits(model: Any, head: Any) -> float:
    plain = (8 * m.weight.element_size() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    return float(next(plain, 8 * next(model.parameters()).element_size()))
