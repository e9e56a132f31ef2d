"""A few words of both models for the report: what figures cannot tell a reader, and no measure of anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sordino.api import load
from sordino.errors import reason
from sordino.runtime.generate import answer

TOKENS = 40
LARGEST = 1 << 31  # bytes of a full-precision model that is loaded for this
_QUESTIONS = ("Why is the sky blue?", "Write a short letter to a friend.")
_BEGINNINGS = ("The capital of France is", "Once upon a time")


@dataclass(frozen=True)
class Sample:
    """What both models make of a prompt, greedily."""

    prompt: str
    exact: str
    ours: str


def samples(model: str, checkpoint: Path, size: int) -> list[Sample] | str:
    """Let both models speak, one after the other in memory.

    Args:
        model: full precision, as :func:`sordino.load` takes it.
        checkpoint: what was made of it.
        size: bytes of the full-precision model.

    Returns:
        The samples, or in words why there are none.
    """
    if size > LARGEST:
        return f"the model has {size / 2**30:.1f} GiB in full precision, and a run of that size is not lengthened by them"
    try:
        answers = []
        for name in (model, checkpoint):
            loaded, tokenizer = load(name)
            chat = bool(getattr(tokenizer, "chat_template", None))
            prompts = _QUESTIONS if chat else _BEGINNINGS
            answers.append([answer(loaded, tokenizer, p, TOKENS, chat).removeprefix(p).strip() for p in prompts])
            del loaded
    except Exception as error:  # whatever a model's own code raises: the run is done, and its result is good
        return f"generating failed ({type(error).__name__}: {reason(error)})"
    return [Sample(*row) for row in zip(prompts, *answers, strict=True)]
