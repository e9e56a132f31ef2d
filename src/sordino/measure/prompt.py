"""Other keys and values for a protected prefix: the controls that tell what protecting it is good for (BiSup, spec 7.6).

A system prompt alone changes a model, and so does the attention sink at its beginning. So beside a prompt that full precision
made and nothing rounded, the same tokens are to be measured with keys and values that the quantized model made, stored as it
stores any other or in full width. Shapes: P tokens, K key heads, d head size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sordino.errors import InputError
from sordino.runtime.prefix import KEY, VALUE, prefix_length, quantization_of
from sordino.walk.attention import NAME as WINDOW_ATTENTION
from sordino.walk.attention import watched


@torch.no_grad()
def prefix_made_by(model: Any, ids: Sequence[int], rounded: bool) -> dict[str, Tensor]:
    """Keys (at the positions -P … -1) and values that a model makes of some tokens, in its own basis.

    Args:
        model: as :func:`sordino.load` gives it, without a prefix. A checkpoint with all its blocks in full precision makes
            what ``sordino quantize`` does, unless smoothing is trained, which divides the values of a prefix.
        ids: P tokens.
        rounded: whether keys and values are rounded as those of any text, where they are attended to as well.

    Returns:
        By the names that a checkpoint has for them, [1, K, P, d] each.

    Raises:
        InputError: if the model has a prefix already.
    """
    if prefix_length(model):
        raise InputError("the model has a prefix already")
    modules = {n: m for n, m in model.named_modules() if hasattr(m, "k_proj")}
    model.set_attn_implementation(WINDOW_ATTENTION)
    with ExitStack() as stack:
        if not rounded:
            stack.enter_context(_unrounded(list(modules.values())))
        seen = {name: stack.enter_context(watched(module)) for name, module in modules.items()}
        places = torch.arange(-len(ids), 0)[None]
        model.get_decoder()(input_ids=torch.tensor([list(ids)]), position_ids=places, use_cache=False)
    made: dict[str, Tensor] = {}
    for name, [(_, key, value)] in seen.items():
        made |= {f"{name}.{KEY}": key.contiguous(), f"{name}.{VALUE}": value.contiguous()}
    return made


@contextmanager
def _unrounded(modules: list[Any]) -> Iterator[None]:
    """Let attention modules leave keys and values as they are for a while."""
    grids = [getattr(m, "kv_grid", None) for m in modules]
    for module in modules:
        module.kv_grid = None
    try:
        yield
    finally:
        for module, grid in zip(modules, grids, strict=True):
            module.kv_grid = grid


def put_prefix(checkpoint: Path, out: Path, ids: Sequence[int], tensors: dict[str, Tensor]) -> Path:
    """Copy a checkpoint without a prefix and give the copy one, to be measured; its manifest stays that of the original.

    Args:
        checkpoint: that ``sordino quantize`` made.
        out: folder of the copy, which must not be there yet.
        ids: tokens of the prefix.
        tensors: as :func:`prefix_made_by` gives them.

    Returns:
        ``out``.

    Raises:
        InputError: if it has a prefix already.
    """
    if quantization_of(checkpoint).get("prefix"):
        raise InputError(f"{checkpoint} has a prefix already")
    first = min(checkpoint.glob("*.safetensors")).name  # of several shards, one takes it all
    shutil.copytree(checkpoint, out, ignore=shutil.ignore_patterns(first))
    save_file(load_file(checkpoint / first) | tensors, out / first, metadata={"format": "pt"})
    _edit(out / "config.json", "quantization_config", {"prefix": list(ids)})
    if (index := out / "model.safetensors.index.json").is_file():
        _edit(index, "weight_map", dict.fromkeys(tensors, first))
    return out


def _edit(file: Path, key: str, entries: dict[str, Any]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    content[key] |= entries
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
