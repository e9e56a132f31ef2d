"""Keys and values that stand before every text, in full precision: outlier tokens, a system prompt.

They belong to the attention modules, not to transformers' cache: the user's ids, masks, positions and cache lengths stay
their own. The keys are rotated to the positions -P … -1, and rotary embedding is relative, so this equals a text that
begins with the prefix. Shapes: B batch, K key heads, P prefix tokens, L queries, S keys, d head size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sordino.errors import InputError

KEY, VALUE = "prefix_key", "prefix_value"


def give_prefix(attention: nn.Module, key: Tensor, value: Tensor) -> None:
    """Let an attention module begin with keys and values, [1, K, P, d] each; they become its buffers."""
    attention.register_buffer(KEY, key)
    attention.register_buffer(VALUE, value)


def join(module: nn.Module, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Put a module's prefix, if it has one, before keys and values [B, K, S, d], and let a mask [B, 1, L, S] see it."""
    own: Tensor | None = getattr(module, KEY, None)
    if own is None:
        return key, value, mask
    batch, dtype = key.shape[0], key.dtype
    other: Tensor = getattr(module, VALUE)
    key = torch.cat([own.to(dtype).expand(batch, -1, -1, -1), key], 2)
    value = torch.cat([other.to(dtype).expand(batch, -1, -1, -1), value], 2)
    if mask is not None:
        mask = F.pad(mask, (own.shape[2], 0), value=True if mask.dtype == torch.bool else 0.0)
    return key, value, mask


def check_rotary(config: Any) -> None:
    """Refuse rotary angles that depend on the length of the text: keys made beforehand would not fit them.

    Raises:
        InputError: naming the kind.
    """
    options = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for found in [options, *[o for o in options.values() if isinstance(o, dict)]]:
        kind = found.get("rope_type", found.get("type"))
        if kind in ("dynamic", "longrope"):
            raise InputError(f"a prefix cannot stand before a text whose rotary angles depend on its length ('{kind}')")


def prefix_length(model: nn.Module) -> int:
    """How many tokens stand before every text of a model."""
    return next((m.get_buffer(KEY).shape[2] for m in model.modules() if hasattr(m, KEY)), 0)


def quantization_of(folder: Path) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint; empty for full precision, and where loading will tell what is wrong."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = config.get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def prefix_ids(folder: Path) -> list[int]:
    """The prefix tokens of a checkpoint.

    Raises:
        InputError: if it has none, or one that is no list of token ids.
    """
    found: list[int] = quantization_of(folder).get("prefix") or []
    if not found:
        raise InputError(f"{folder} has no prefix")
    if not isinstance(found, list) or not all(type(i) is int and i >= 0 for i in found):
        raise InputError(f"{folder / 'config.json'}: the prefix is no list of token ids")
    return found


def prompt_ids(folder: Path) -> tuple[int, ...]:
    """The tokens of a checkpoint's protected system prompt; none without one, and where loading will tell why."""
    said = quantization_of(folder).get("system_prompt")
    if not isinstance(said, dict) or type(said.get("tokens")) is not int:
        return ()
    return tuple(prefix_ids(folder)[-said["tokens"] :])


def begins(ids: Sequence[int], start: Sequence[int]) -> bool:
    """Whether ids begin with others."""
    return list(ids[: len(start)]) == list(start)


def opening(prefix: Sequence[int], prompt: int) -> int | None:
    """The token of a prefix that stands where a text would begin: the prompt's first, or the last; None without a prefix."""
    return prefix[len(prefix) - max(prompt, 1)] if prefix else None


def already_there(ids: Sequence[int], prefix: Sequence[int], prompt: int, first: int | None) -> int:
    """How many leading tokens of a request the protected prefix has said already.

    Behind a system prompt a lone beginning token stays: in some chat templates (SmolLM2's) it begins every turn.

    Args:
        ids: of the request, [L].
        prefix: of the checkpoint.
        prompt: how many of its last tokens are the system prompt.
        first: the token that begins a text; None if there is none.

    Returns:
        The prompt's length, with or without its beginning token; where there is no prompt, 1 for a beginning token that ends
        the prefix; else 0. Never the whole request.
    """
    said = list(prefix[-max(prompt, 1) :])
    begun = first is not None and opening(prefix, prompt) == first
    if not prompt and not begun:
        return 0
    starts = [said, said[1:]] if begun else [said]
    return next((len(s) for s in starts if s and len(ids) > len(s) and begins(ids, s)), 0)
