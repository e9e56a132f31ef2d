"""Greedy text generation from a checkpoint, the way any user of transformers would do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sordino.api import load
from sordino.errors import InputError
from sordino.runtime.prefix import already_there, prefix_length


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
    if chat and not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{checkpoint} has no chat template; leave out --chat")
    return answer(model, tokenizer, prompt, max_new_tokens, chat)


def answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, chat: bool) -> str:
    """As :func:`generate`, for a loaded model; ``chat`` needs a chat template."""
    if not chat:
        begins = _system_prompt(model) is None  # else the text goes on behind the system prompt
        inputs = own_inputs(model, tokenizer(prompt, return_tensors="pt", add_special_tokens=begins))
        return str(tokenizer.decode(_run(model, inputs, max_new_tokens), skip_special_tokens=True))
    inputs = chat_inputs(model, tokenizer, [{"role": "user", "content": prompt}])
    ids = _run(model, inputs, max_new_tokens)[inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def chat_inputs(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """Token ids of a conversation for ``model.generate``, without the system prompt that the checkpoint holds already.

    Args:
        model: as loaded.
        tokenizer: its tokenizer, with a chat template.
        messages: the conversation. Without a system message, that of the protected prompt is meant; with another one, the
            conversation is kept as it is, behind the protected prompt.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 [1, L] each.
    """
    known = _system_prompt(model)
    if known and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": known["text"]}, *messages]
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return own_inputs(model, found)


def _run(model: Any, inputs: Any, max_new_tokens: int) -> torch.Tensor:
    limit = getattr(model.config, "max_position_embeddings", None)
    before, given = prefix_length(model), inputs["input_ids"].shape[1]
    if limit is not None and before + given >= limit:
        taken = f", of which its prefix takes {before}" if before else ""
        raise InputError(f"the prompt has {given} tokens, the model {limit} positions{taken}; shorten it")
    out: torch.Tensor = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0]
    return out


def own_inputs(model: Any, inputs: Any) -> dict[str, torch.Tensor]:
    """Inputs without what the model's protected prefix has said already: system prompt, or beginning token.

    Rows of a batch are looked at one by one. What one of them begins with is masked, as padding on the left would be, and
    columns in front that are masked in every row are cut off.

    Args:
        model: as loaded.
        inputs: as tokenizers make them: ``input_ids`` [B, L], and ``attention_mask`` [B, L] if rows are padded.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 [B, L'] each, for ``model.generate``; answers begin at L'.
    """
    ids = inputs["input_ids"]
    mask = inputs["attention_mask"].clone() if "attention_mask" in inputs else torch.ones_like(ids)
    prefix = getattr(getattr(model.config, "quantization_config", None), "prefix", [])
    prompt = (_system_prompt(model) or {}).get("tokens", 0)
    for row, seen in zip(ids, mask, strict=True):
        places = seen.nonzero()[:, 0]
        said = already_there(row[places].tolist(), prefix, prompt, model.config.bos_token_id)
        seen[places[:said]] = 0
    cut = int(mask.any(0).int().argmax())
    return {"input_ids": ids[:, cut:], "attention_mask": mask[:, cut:]}


def _system_prompt(model: Any) -> dict[str, Any] | None:
    """Text and number of tokens of a checkpoint's protected system prompt; None if it has none."""
    found: dict[str, Any] | None = getattr(getattr(model.config, "quantization_config", None), "system_prompt", None)
    return found
