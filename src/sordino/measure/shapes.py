"""Random checkpoints by the shape of a known model, for speed alone: nothing is downloaded, nothing is quantized.

What a recipe stores is decided by the same plan that `quantize` follows; then every tensor gets random content in memory.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from sordino.anatomy import skeleton
from sordino.errors import InputError, nearest
from sordino.numerics.machine import fast
from sordino.recipe import load_recipe
from sordino.runtime.plugin import SordinoConfig, quantize_skeleton
from sordino.walk.assemble import storage_config
from sordino.walk.plan import draft_plan
from sordino.walk.source import Source

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 128256, "rope_theta": 500000.0}
_QWEN2 = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768}


def _of(base: dict[str, Any], width: int, ffn: int, layers: int, heads: int, key_heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers}
    return {**base, **sizes, "num_attention_heads": heads, "num_key_value_heads": key_heads, **more}


# Sizes as in the published configs. Long-context scaling of rotary angles is left out, it costs no time.
SHAPES = {
    "smollm2-135m": _of(_LLAMA, 576, 1536, 30, 9, 3, vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=8192),
    "llama-3.2-1b": _of(
        _LLAMA, 2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True, max_position_embeddings=131072
    ),
    "llama-3.2-3b": _of(
        _LLAMA, 3072, 8192, 28, 24, 8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=131072
    ),
    "llama-3-8b": _of(_LLAMA, 4096, 14336, 32, 32, 8, tie_word_embeddings=False, max_position_embeddings=8192),
    "mistral-7b": _of(
        {"model_type": "mistral", "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None},
        4096, 14336, 32, 32, 8, vocab_size=32768, tie_word_embeddings=False, max_position_embeddings=32768,
    ),
    "qwen2.5-0.5b": _of(_QWEN2, 896, 4864, 24, 14, 2, vocab_size=151936, tie_word_embeddings=True),
    "qwen2.5-7b": _of(_QWEN2, 3584, 18944, 28, 28, 4, vocab_size=152064, tie_word_embeddings=False),
    "qwen3-0.6b": _of(
        {"model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 40960},
        1024, 3072, 28, 16, 8, head_dim=128, vocab_size=151936, tie_word_embeddings=True,
    ),
}  # fmt: skip


def shape(name: str) -> dict[str, Any]:
    """The config of a known shape.

    Raises:
        InputError: if it is unknown, naming those that are.
    """
    if name not in SHAPES:
        hint = nearest(name, SHAPES, f"known: {', '.join(SHAPES)}")
        raise InputError(f"unknown shape '{name}'{hint}")
    return SHAPES[name]


def stored(config: dict[str, Any], recipe: str) -> dict[str, Any]:
    """The ``quantization_config`` that a model of some config has after a recipe.

    Raises:
        InputError: as `sordino quantize` would.
    """
    chosen = load_recipe(recipe)
    with tempfile.TemporaryDirectory() as folder:
        plan = draft_plan(_hollow(Path(folder), config), chosen, None)
    prefix = [0, 1] if any(m.name == "prefix" for m in plan.moves) else []
    return storage_config(plan, prefix).to_dict()


def random_checkpoint(config: dict[str, Any], storage: dict[str, Any]) -> nn.Module:
    """A model with random codes in memory, as `from_pretrained` would give it."""
    made = config_of(config)
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(made, dtype=fast(torch.bfloat16))
    quantize_skeleton(model, SordinoConfig(**storage))
    for name, module in [(n, m) for n, m in model.named_modules() if hasattr(m, "inv_freq")]:
        model.set_submodule(name, type(module)(config=made))
    filled: dict[int, Tensor] = {}  # tied tables stay one
    for module in model.modules():
        for key, held in [*module._parameters.items(), *module._buffers.items()]:
            if held is not None and held.is_meta:
                if id(held) not in filled:
                    fresh = _content(key, held)
                    # As loading leaves them: a frozen one takes another, slower way through torch's matmul.
                    kept = nn.Parameter(fresh, requires_grad=fresh.is_floating_point())
                    filled[id(held)] = kept if key in module._parameters else fresh
                setattr(module, key, filled[id(held)])
    result: nn.Module = model.eval()
    return result


def _content(key: str, held: Tensor) -> Tensor:
    """Random content for a tensor, of a size that keeps activations tame."""
    if not held.dtype.is_floating_point:
        return torch.randint(-(2**31), 2**31 - 1, held.shape, dtype=held.dtype)
    if key in ("input_scale", "key_scale", "value_scale"):
        return torch.full(held.shape, 0.5, dtype=held.dtype)
    if key == "weight_scale":
        return torch.full(held.shape, 0.002, dtype=held.dtype)
    if held.dim() == 1:
        return torch.ones(held.shape, dtype=held.dtype)
    return torch.randn(held.shape, dtype=held.dtype) * 0.02


def config_of(config: dict[str, Any]) -> Any:
    """Transformers' config of a ``config.json``."""
    rest = dict(config)
    return transformers.AutoConfig.for_model(rest.pop("model_type"), **rest)


def _hollow(folder: Path, config: dict[str, Any]) -> Source:
    """A model directory whose weights take no room: a header in front of a hole."""
    made = config_of(config)
    made.save_pretrained(folder)
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in skeleton(made).state_dict().items():
        if not (made.tie_word_embeddings and name.startswith("lm_head.")):
            start, end = end, end + 2 * tensor.numel()
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    words = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as f:
        f.write(len(words).to_bytes(8, "little") + words)
        f.truncate(8 + len(words) + end)
    return Source(folder)
