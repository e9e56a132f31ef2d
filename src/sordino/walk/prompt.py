"""The system prompt of a run: what was given, as the model reads it."""

from __future__ import annotations

from sordino.protect.prompt import Prompt, read_prompt, tokenize_prompt
from sordino.runtime.prefix import check_rotary
from sordino.walk.plan import Plan
from sordino.walk.source import Source


def prompt_of(spec: str, source: Source, plan: Plan) -> Prompt:
    """The system prompt as the model reads it; it must leave room for a calibration window."""
    check_rotary(source.config)
    text, vocabulary = read_prompt(spec), source.shape(f"{plan.anatomy.embeddings}.weight")[0]
    limit = getattr(source.config, "max_position_embeddings", None) or 1 << 30
    room = plan.recipe.calibration.seqlen if plan.needs_text else 1
    return tokenize_prompt(text, source.tokenizer(), vocabulary, limit - room)
