"""Text for calibration and evaluation, and the windows cut from it.

A text file is one string; the rows of a jsonl file are joined by a blank line. The text is tokenized once, without
added special tokens, and cut into non-overlapping windows. Shapes: N windows of L tokens.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib.util
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sordino.errors import InputError

DEFAULT_TEXT = "builtin:pydoc"  # to calibrate
EVAL_TEXT = "builtin:docstrings"  # to evaluate: never the calibration text

_KEPT = 4
_TOKENIZED: dict[tuple[Any, ...], Tensor] = {}  # texts tokenized last: several checkpoints are measured on the same


@dataclass(frozen=True)
class Text:
    """A text and what it is called.

    Attributes:
        spec: what the user named.
        content: the text.
        digest: 16 hex digits of its sha256.
    """

    spec: str
    content: str
    digest: str


def load_text(spec: str | Path | Text) -> Text:
    """Read a text; one that has been read already comes back as it is.

    Args:
        spec: a text or ``.jsonl`` file (``.gz`` too), ``builtin:pydoc`` (CPython's help topics, to calibrate),
            ``builtin:docstrings`` (of the standard library, to evaluate), or ``hub:NAME[:CONFIG[:SPLIT]]``.

    Raises:
        InputError: if it is missing, not UTF-8 or empty.
    """
    if isinstance(spec, Text):
        return spec
    spec = str(spec)
    if spec.startswith("builtin:"):
        if spec not in _BUILTIN:
            raise InputError(f"no built-in text '{spec}'; there are {', '.join(_BUILTIN)}")
        content = _BUILTIN[spec]()
    elif spec.startswith("hub:"):
        content = _from_hub(spec[4:])
    else:
        content = _from_file(Path(spec))
    if not content.strip():
        raise InputError(f"text {spec} is empty")
    try:
        raw = content.encode()
    except UnicodeEncodeError as error:  # JSON escapes can spell half a surrogate pair
        raise InputError(f"text {spec} is not UTF-8: {error}") from None
    return Text(spec, content, hashlib.sha256(raw).hexdigest()[:16])


def tokenize(text: Text, tokenizer: Any) -> Tensor:
    """Token ids of the whole text, int64 [T], without added special tokens; not to be written to."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    key = (text.digest, type(tokenizer), None if backend is None else hashlib.sha256(backend.to_str().encode()).digest())
    if backend is not None and key in _TOKENIZED:
        return _TOKENIZED[key]
    # Tokenizers warn that the text is longer than the model's context; windows are cut from it, so that is no news.
    ids = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    found = torch.tensor(ids, dtype=torch.int64)
    if backend is not None:
        while len(_TOKENIZED) >= _KEPT:
            del _TOKENIZED[next(iter(_TOKENIZED))]
        _TOKENIZED[key] = found
    return found


def eval_windows(ids: Tensor, seqlen: int, windows: int | None) -> Tensor:
    """The first ``windows`` non-overlapping windows (all if None), int64 [N, L].

    Raises:
        InputError: if the text is shorter than one window.
    """
    if seqlen < 2 or (windows is not None and windows < 1):
        raise InputError(f"{windows} windows of {seqlen} tokens: at least one of two is needed")
    have = len(ids) // seqlen
    if have == 0:
        raise InputError(f"the text has {len(ids)} tokens, less than one window of {seqlen}; give more text or --seqlen")
    n = have if windows is None else min(windows, have)
    return ids[: n * seqlen].view(n, seqlen)


def calibration_windows(ids: Tensor, seqlen: int, windows: int, heldout: int, seed: int, extra: int = 0) -> Tensor:
    """Draw calibration and held-out windows, without overlap, by a seeded permutation of the text's windows.

    Returns:
        int64 [windows + heldout + extra, L] in this order; fewer extra ones if the text ends before.

    Raises:
        InputError: if the text is too short, with the numbers.
    """
    have, want = len(ids) // seqlen, windows + heldout
    if have < want:
        most = have - max(4, (have + 1) // 9) if heldout else have  # an eighth as many are held out, at least four
        hint = f"--windows {most}" if most > 0 else f"a shorter --seqlen than {seqlen}"
        raise InputError(
            f"the calibration text has {len(ids)} tokens = {have} windows of {seqlen}, but {want} are needed "
            f"({windows} to calibrate, {heldout} held out); give more text or {hint}"
        )
    order = torch.randperm(have, generator=torch.Generator().manual_seed(seed))[: want + extra]
    return ids[: have * seqlen].view(have, seqlen)[order]


@cache
def _pydoc() -> str:
    from pydoc_data.topics import topics  # type: ignore[import-untyped, unused-ignore]

    return "\n\n".join(topics[name] for name in sorted(topics))


# Modules with much prose in their docstrings, in every CPython; another text than pydoc's topics.
_PROSE = "argparse ast calendar codecs concurrent.futures configparser datetime decimal difflib doctest email.message enum "
_PROSE += "fractions functools heapq inspect io ipaddress logging mailbox optparse pathlib pickle random shutil statistics "
_PROSE += "string subprocess tarfile textwrap threading tokenize traceback turtle typing unittest.case unittest.mock zipfile"


@cache  # parsing takes a second
def _docstrings() -> str:
    parts = []
    for name in _PROSE.split():
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        parts += [d for node in ast.walk(tree) if isinstance(node, kinds) and (d := ast.get_docstring(node))]
    return "\n\n".join(parts)


_BUILTIN: dict[str, Callable[[], str]] = {"builtin:pydoc": _pydoc, "builtin:docstrings": _docstrings}


def _from_file(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        content = raw.decode("utf-8-sig")  # editors on Windows put a byte order mark first
    except FileNotFoundError:
        raise InputError(f"text {path} is missing") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:  # a ValueError: not UTF-8, or no path at all
        raise InputError(f"text {path} cannot be read: {error}") from None
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        # Not splitlines(): JSON strings may hold other line separators, such as U+2028.
        return "\n\n".join(_row(line, path, n) for n, line in enumerate(content.split("\n"), 1) if line.strip())
    return content


def _row(line: str, path: Path, number: int) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"text {path} line {number} is not JSON: {error}") from None
    text = row.get("text") if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise InputError(f"text {path} line {number} has no 'text' string")
    return text


def _from_hub(name: str) -> str:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise InputError(f"text hub:{name} needs the datasets library: pip install datasets") from None
    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = load_dataset(path, config or None, split=split or "train", streaming=not os.environ.get("HF_HUB_OFFLINE"))
        texts, size = [], 0
        for row in rows:
            texts.append(row["text"])
            size += len(row["text"])
            if size > 16_000_000:  # far more than any calibration draws; streaming stops here
                break
    except Exception as error:
        raise InputError(f"text hub:{name} cannot be had: {next(iter(str(error).splitlines()), error)}") from None
    return "\n\n".join(texts)
