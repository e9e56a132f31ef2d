"""Quality against full precision: perplexity, KL divergence, top-1 agreement, honest bits.

PPL = exp(mean NLL) over non-overlapping windows of L tokens, tokenized once without added specials; positions
1 … L-1 of each window are scored. Standard errors treat windows as the independent unit: tokens of one window are not.
Shapes: N windows of L tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sordino.api import load
from sordino.corpus import EVAL_TEXT, Text, eval_windows, load_text, tokenize
from sordino.errors import InputError
from sordino.measure.size import Size, size_of
from sordino.numerics.divergence import token_kl
from sordino.runtime.attention import attach
from sordino.runtime.prefix import read_prefix
from sordino.walk.attention import NAME as WINDOW_ATTENTION
from sordino.walk.source import locate

Progress = Callable[[str, int, int], None]
_ROWS = 256  # positions whose logits are looked at in fp32 at once


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model; what was not asked for is None.

    Attributes:
        ppl: perplexity, with standard error.
        kl: mean KL to the reference in nats per token, with standard error.
        top1_agreement: share of positions where both models prefer the same token, with standard error.
        bits_per_weight: stored bits of the quantized linears over their parameters.
        bits_per_parameter: stored bits of the whole checkpoint over all parameters.
        bytes: of the checkpoint's safetensors.
        windows: how many windows were scored.
        seqlen: tokens of a window.
        seconds: wall time of the model's own forward passes, without the reference's.
    """

    ppl: float
    ppl_stderr: float | None
    kl: float | None
    kl_stderr: float | None
    top1_agreement: float | None
    top1_agreement_stderr: float | None
    bits_per_weight: float
    bits_per_parameter: float
    bytes: int
    windows: int
    seqlen: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As written by ``sordino eval --json``."""
        return asdict(self) | {"tasks": None}


@dataclass(frozen=True)
class Reference:
    """What a reference model says about some windows, so that several models can be held against it.

    Attributes:
        name: of the model.
        ids: the windows it read, [N, L].
        hidden: its final hidden states, [N, L, D].
        head: its output projection.
    """

    name: str | Path
    ids: Tensor
    hidden: Tensor
    head: Any


def reference(
    model: str | Path,
    *,
    text: str | Text = EVAL_TEXT,
    seqlen: int = 2048,
    windows: int | None = None,
    dtype: torch.dtype | str = "auto",
    progress: Progress | None = None,
) -> Reference:
    """Run a reference model once; see :func:`evaluate` for the arguments and errors."""
    return _read(model, *_open(model, load_text(text), seqlen, windows, dtype), progress)


def evaluate(
    model: str | Path,
    *,
    text: str | Text = EVAL_TEXT,
    seqlen: int = 2048,
    windows: int | None = None,
    against: str | Path | Reference | None = None,
    prefix_from: str | Path | None = None,
    dtype: torch.dtype | str = "auto",
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a checkpoint (or a full-precision model) on text.

    Args:
        model: anything that :func:`sordino.load` takes.
        text: evaluation text, see :func:`sordino.corpus.load_text`.
        seqlen: tokens of a window.
        windows: how many windows from the start; None for all.
        against: reference for KL and agreement, usually the full-precision model; of several models that are held
            against the same one, run it once with :func:`reference`.
        prefix_from: checkpoint whose prefix is put before every window: what the prefix alone does to a model.
        dtype: compute dtype; "auto" is the model's own.
        progress: called with (what, done, total).

    Raises:
        InputError: if something cannot be loaded or the text is shorter than one window.
    """
    content = load_text(text)
    subject, ids = _open(model, content, seqlen, windows, dtype)
    if prefix_from is not None:
        attach(subject, read_prefix(locate(prefix_from)))
        subject.set_attn_implementation(WINDOW_ATTENTION)
    if isinstance(against, Reference):
        _check_same(model, ids, against.name, against.ids)
    elif against is not None:
        exact, theirs = _open(against, content, seqlen, windows, dtype)
        _check_same(model, ids, against, theirs)
        against = _read(against, exact, theirs, progress)
        del exact  # its head is all that is still wanted
    started = time.time()
    scores = [_score(subject, against, i, w) for i, w in enumerate(_watched(ids, progress, "eval"))]
    seconds = time.time() - started
    nll, kl, agree = (torch.stack([s[i] for s in scores]) for i in range(3))
    size: Size = size_of(subject, locate(model))
    ppl = math.exp(min(float(nll.mean()), 700.0))
    return Evaluation(
        ppl=ppl,
        ppl_stderr=None if (error := _stderr(nll)) is None else ppl * error,
        kl=float(kl.mean()) if against is not None else None,
        kl_stderr=_stderr(kl) if against is not None else None,
        top1_agreement=float(agree.mean()) if against is not None else None,
        top1_agreement_stderr=_stderr(agree) if against is not None else None,
        bits_per_weight=size.bits_per_weight,
        bits_per_parameter=size.bits_per_parameter,
        bytes=size.bytes,
        windows=len(ids),
        seqlen=seqlen,
        seconds=round(seconds, 2),
    )


def _open(name: str | Path, content: Text, seqlen: int, windows: int | None, dtype: torch.dtype | str) -> tuple[Any, Tensor]:
    """A model that reads whole windows, and the text as its token ids [N, L]."""
    model, tokenizer = load(name, dtype=dtype)
    ids = eval_windows(tokenize(content, tokenizer), seqlen, windows)
    _check_fits(ids, model, name)
    model.set_attn_implementation(WINDOW_ATTENTION)
    return model, ids


def _read(name: str | Path, model: Any, ids: Tensor, progress: Progress | None) -> Reference:
    """Let an open model read its windows [N, L]."""
    hidden = [_hidden(model, w) for w in _watched(ids, progress, "reference")]
    return Reference(name, ids, torch.stack(hidden), model.lm_head)


def _check_same(name: str | Path, ids: Tensor, other: str | Path, theirs: Tensor) -> None:
    """Refuse to compare models that do not read the same tokens."""
    if not torch.equal(ids, theirs):
        raise InputError(f"{name} and {other} tokenize the text differently: their distributions cannot be compared")


def _check_fits(ids: Tensor, model: Any, name: str | Path) -> None:
    """Refuse token ids and windows that the model has no embeddings or positions for."""
    vocabulary, limit = model.config.vocab_size, getattr(model.config, "max_position_embeddings", None)
    if int(ids.max()) >= vocabulary:
        raise InputError(f"{name}: the text has token {int(ids.max())}, the model only {vocabulary} embeddings")
    if limit is not None and ids.shape[1] > limit:
        raise InputError(f"--seqlen {ids.shape[1]} is longer than the {limit} positions of {name}")


def _watched(ids: Tensor, progress: Progress | None, what: str) -> Any:
    for i, window in enumerate(ids):
        if progress is not None:
            progress(what, i, len(ids))
        yield window
    if progress is not None:
        progress(what, len(ids), len(ids))


@torch.no_grad()
def _score(model: Any, exact: Reference | None, index: int, window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean NLL, KL and agreement of one window [L]; the last two are zero without a reference."""
    hidden = _hidden(model, window)
    nll, kl, agree = torch.zeros(3, dtype=torch.float64)
    for rows in torch.arange(len(window) - 1).split(_ROWS):
        logits = model.lm_head(hidden[rows])
        log_q = torch.log_softmax(logits.float(), -1)
        nll -= log_q.gather(-1, window[rows + 1, None]).sum()
        if exact is not None:
            target = exact.head(exact.hidden[index, rows])
            agree += (target.argmax(-1) == logits.argmax(-1)).sum()
            kl += token_kl(torch.log_softmax(target.float(), -1), log_q).sum()
    return nll / (len(window) - 1), kl / (len(window) - 1), agree / (len(window) - 1)


@torch.no_grad()
def _hidden(model: Any, window: Tensor) -> Tensor:
    """Final hidden states of one window, [L, D]; logits are made from slices of it, never all at once."""
    out: Tensor = model.get_decoder()(input_ids=window[None], use_cache=False).last_hidden_state[0]
    return out


def _stderr(per_window: Tensor) -> float | None:
    """Standard error of the mean over windows; one window has none."""
    n = len(per_window)
    return float(per_window.double().std() / math.sqrt(n)) if n > 1 else None
