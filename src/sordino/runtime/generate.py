"""Greedy text generation from a checkpoint, the way any user of transformers would do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sordino.api import load
from sordino.errors import InputError


def generate(checkpoint: str | Path, prompt: str, max_new_tokens: int = 64, chat: bool = False) -> str:
    """Continue a prompt greedily.

    Args:
        checkpoint: anything that :func:`sordino.load` takes.
        prompt: the text to continue.
        max_new_tokens: how many tokens at most.
        chat: wrap the prompt in the model's chat template and return the answer only.

    Returns:
        Prompt and continuation, without special tokens (with ``chat``, the answer alone).

    Raises:
        InputError: if it cannot be loaded, the prompt is empty, or there is no chat template.
    """
    if not prompt:
        raise InputError("the prompt is empty")
    model, tokenizer = load(checkpoint)
    if not chat:
        inputs = _begin_once(model, tokenizer(prompt, return_tensors="pt"))
        return str(tokenizer.decode(_run(model, inputs, max_new_tokens), skip_special_tokens=True))
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{checkpoint} has no chat template; leave out --chat")
    messages = [{"role": "user", "content": prompt}]
    chatted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = _begin_once(model, chatted)
    ids = _run(model, inputs, max_new_tokens)[inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _run(model: Any, inputs: Any, max_new_tokens: int) -> torch.Tensor:
    out: torch.Tensor = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0]
    return out


def _begin_once(model: Any, inputs: Any) -> dict[str, torch.Tensor]:
    """Leave out the token that begins a text where the model's prefix has begun it already."""
    kept = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    prefix = getattr(getattr(model.config, "quantization_config", None), "prefix", [])
    ids = kept["input_ids"][0]
    begun = bool(prefix) and len(ids) > 1 and int(ids[0]) == prefix[-1] == model.config.bos_token_id
    return {k: v[:, 1:] for k, v in kept.items()} if begun else kept
