"""A system prompt whose keys and values stay in full precision (BiSup reconstruction, specs/bisup.md section 7).

Its tokens join the protected prefix, behind outlier tokens if the recipe looks for them. What the user sends must then not
hold the prompt a second time. Shapes: P prompt tokens, L tokens of a request.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from sordino.errors import InputError, reason
from sordino.runtime.prefix import begins

LARGEST = 1 << 20  # bytes of a prompt


@dataclass(frozen=True)
class Prompt:
    """A system prompt and how the model reads it.

    Attributes:
        text: as given.
        ids: of its tokens, with what the chat template puts around it.
    """

    text: str
    ids: tuple[int, ...]


def read_prompt(spec: str) -> str:
    """The text of a system prompt.

    Args:
        spec: the text itself, or ``@FILE``.

    Raises:
        InputError: if the file cannot be read, or the text is empty, not UTF-8 or beyond 1 MiB.
    """
    if not spec.startswith("@"):
        raw = spec.encode(errors="surrogateescape")  # the way Python reads arguments that are not UTF-8
    else:
        try:
            with open(Path(spec[1:]), "rb") as f:
                raw = f.read(LARGEST + 1)
        except (OSError, ValueError) as error:
            raise InputError(f"--system-prompt {spec}: the file cannot be read: {reason(error)}") from None
    if len(raw) > LARGEST:
        raise InputError("--system-prompt: the text is longer than 1 MiB")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"--system-prompt: the text is not UTF-8: {error}") from None
    if not text.strip():
        raise InputError("--system-prompt: the text is empty")
    return text


def tokenize_prompt(text: str, tokenizer: Any, vocabulary: int, places: int) -> Prompt:
    """Turn a system prompt into the tokens with which a conversation or text begins.

    Args:
        text: the prompt.
        tokenizer: the model's; with a chat template, the prompt is its system message.
        vocabulary: embeddings of the model.
        places: positions that are free for the prompt.

    Raises:
        InputError: if the template has no place for a system message, or the prompt does not fit the model.
    """
    if getattr(tokenizer, "chat_template", None):
        ids = _templated(text, tokenizer)
    else:
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        first = tokenizer.bos_token_id  # the sink of attention must be among what is protected
        ids = ids if first is None or ids[:1] == [first] else [first, *ids]
    if not ids:
        raise InputError("--system-prompt: the tokenizer makes no token of the text")
    if max(ids) >= vocabulary:
        raise InputError(f"--system-prompt: the tokenizer has token {max(ids)}, the model only {vocabulary} embeddings")
    if len(ids) > places:
        raise InputError(
            f"--system-prompt: {len(ids)} tokens do not fit the {max(places, 0)} positions the model has left for it "
            "(calibration windows of fewer tokens, --seqlen, leave more)"
        )
    return Prompt(text, tuple(ids))


def _templated(text: str, tokenizer: Any) -> list[int]:
    """What every conversation with this system message begins with.

    Templates that write the message inside the user's turn have no end of it; there, it is what two conversations share.
    """
    system = {"role": "system", "content": text}
    try:
        long = [_ids(tokenizer, [system, {"role": "user", "content": word}]) for word in ("A", "9")]
    except Exception as error:  # templates raise what they like
        raise InputError(f"--system-prompt: the chat template takes no system message: {reason(error)}") from None
    try:
        alone = _ids(tokenizer, [system])
    except Exception:  # a conversation without a user is refused by some
        alone = []
    if not alone or any(begins(ids, alone) is False for ids in long):
        alone = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*long, strict=False))]
    if text.strip() not in tokenizer.decode(alone, clean_up_tokenization_spaces=False):
        raise InputError("--system-prompt: the chat template leaves the system message out or changes it")
    return alone


def _ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])


def join_prompt(outliers: tuple[int, ...], prompt: tuple[int, ...]) -> tuple[int, ...]:
    """Outlier tokens, then the prompt; a token that ends the former and begins the latter stands once."""
    return outliers + (prompt[1:] if outliers and prompt and outliers[-1] == prompt[0] else prompt)
