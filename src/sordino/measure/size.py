"""Bits, honestly: every stored bit that serves the quantized linears over their parameters, and the whole file."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from sordino.numerics.kept import BITS as KEPT_BITS
from sordino.runtime.attention import KEY_MEAN, KEY_SCALE, VALUE_SCALE
from sordino.runtime.modules import BASIS, QuantEmbedding, QuantLinear
from sordino.runtime.prefix import KEY, VALUE


@dataclass(frozen=True)
class Size:
    """Sizes of a loaded model.

    Attributes:
        bits_per_weight: codes, scales and zeros of the quantized block linears, and a prefix, over their weights;
            of a model without any, the width of its block linears.
        bits_per_parameter: the whole checkpoint over all parameters of the original model.
        bytes: of the safetensors files.
        bits_per_input: mean width of the codes that inputs of the quantized block linears are rounded to; None if they are not.
        bits_per_kv: bits of a packed cache for a number of a key or value, scales and zero points included; likewise.
    """

    bits_per_weight: float
    bits_per_parameter: float
    bytes: int
    bits_per_input: float | None = None
    bits_per_kv: float | None = None


def size_of(model: Any, folder: Path) -> Size:
    """Measure a checkpoint.

    Args:
        model: the loaded transformers model, which says what belongs to what.
        folder: the checkpoint, whose safetensors headers say what is stored, whatever dtype the model was loaded in.
    """
    files = sorted(folder.glob("*.safetensors"))
    stored: dict[str, int] = {}
    for file in files:
        with safe_open(file, framework="pt") as f:
            stored |= {name: _nbytes(f.get_slice(name)) for name in f.keys()}  # noqa: SIM118
    head = model.get_output_embeddings()
    bits = weights = parameters = 0
    for name, module in model.named_modules():
        bits += 8 * stored.get(f"{name}.{BASIS}", 0)
        if isinstance(module, QuantLinear):
            n = module.in_features * module.out_features
            added = _added(model, name)
            parameters += n + (0 if module.bias is None or added else module.bias.numel())
            if module is not head:
                weights += n
                bits += 8 * sum(stored.get(f"{name}.{b}", 0) for b, _ in module.named_buffers(recurse=False))
                bits += 8 * stored.get(f"{name}.bias", 0) * added
        elif isinstance(module, QuantEmbedding):
            parameters += module.num_embeddings * module.embedding_dim
        elif hasattr(module, "k_proj"):
            bits += 8 * sum(stored.get(f"{name}.{b}", 0) for b in (KEY, VALUE, KEY_SCALE, VALUE_SCALE, KEY_MEAN))
        elif _added(model, name):  # a norm
            bits += 8 * stored.get(f"{name}.bias", 0)
    parameters += sum(p.numel() for n, p in model.named_parameters() if not _counted(model, n))
    size = sum(file.stat().st_size for file in files)
    per_weight = bits / weights if weights else _plain_bits(model, head, stored)
    return Size(per_weight, 8 * size / parameters, size, _input_bits(model, head), _kv_bits(model))


def _input_bits(model: Any, head: Any) -> float | None:
    rounded = [m for m in model.modules() if isinstance(m, QuantLinear) and m is not head and m.inputs is not None]
    bits = sum(m.inputs.bits * (m.in_features - m.kept) + KEPT_BITS * m.kept for m in rounded if m.inputs is not None)
    return bits / sum(m.in_features for m in rounded) if rounded else None


def _kv_bits(model: Any) -> float | None:
    found = [(grid, m.head_dim) for m in model.modules() if (grid := getattr(m, "kv_grid", None)) is not None]
    return sum(8 * grid.row_bytes(d) / d for grid, d in found) / len(found) if found else None


def _added(model: Any, module: str) -> bool:
    """Whether the quantization gave a module a bias that its family does not have."""
    config = getattr(model.config, "quantization_config", None)
    return any(fnmatch.fnmatch(module, pattern) for pattern in getattr(config, "biases", []))


def _nbytes(part: Any) -> int:
    width = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}.get(part.get_dtype(), 1)
    return width * math.prod(map(int, part.get_shape()))


def _counted(model: Any, parameter: str) -> bool:
    """Whether a parameter is a bias that was counted with its linear already, or that the original does not have."""
    module, _, leaf = parameter.rpartition(".")
    return leaf == "bias" and (isinstance(model.get_submodule(module), QuantLinear) or _added(model, module))


def _plain_bits(model: Any, head: Any, stored: dict[str, int]) -> float:
    """Stored width of a model without quantized linears, read off its first block linear (or first tensor)."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head and f"{n}.weight" in stored]
    name = f"{names[0]}.weight" if names else next(n for n, _ in model.named_parameters() if n in stored)
    return 8.0 * stored[name] / int(model.get_parameter(name).numel())


def stored_split(folder: Path) -> dict[str, int]:
    """Bytes of a checkpoint's tensors by what they are, largest first; read from the safetensors headers alone.

    Of the blocks: codes, scales, zero points, biases (the family's own too), linears that were not rounded, norms; around
    them: embeddings and head; and the prefix. Headers of the files are left out.
    """
    split: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118
                part = f.get_slice(name)
                kind = _kind(name, len(part.get_shape()))
                split[kind] = split.get(kind, 0) + _nbytes(part)
    return dict(sorted(split.items(), key=lambda item: -item[1]))


_KINDS = {
    "weight_packed": "codes of weights",
    "weight_scale": "scales",
    "weight_zero_point": "zero points",
    "input_scale": "scales of inputs",
    "input_order": "order of channels",
    "kept_packed": "codes of kept channels",
    "kept_scale": "scales",
    "column_scale": "scales",
    "side_a": "low-rank pairs",
    "side_b": "low-rank pairs",
    "bias": "biases",
    KEY_MEAN: "means of keys",
    KEY_SCALE: "scales of keys and values",
    VALUE_SCALE: "scales of keys and values",
    BASIS: "basis of the stream",
    KEY: "prefix",
    VALUE: "prefix",
}


def _kind(name: str, dimensions: int) -> str:
    leaf = name.rpartition(".")[2]
    in_block = any(part.isdecimal() for part in name.split("."))
    if not in_block and leaf != BASIS and (dimensions > 1 or leaf.startswith("weight_")):
        return "embeddings and head"
    return _KINDS.get(leaf, "weights in full precision" if dimensions > 1 else "norms")
