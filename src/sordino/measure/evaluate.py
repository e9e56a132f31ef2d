"""Quality against full precision: perplexity, KL divergence, top-1 agreement, zero-shot tasks, honest bits.

PPL = exp(mean NLL) over non-overlapping windows of L tokens, tokenized once without added specials; positions
1 … L-1 of each window are scored. Standard errors treat windows as the independent unit: tokens of one window are not.
Shapes: N windows of L tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sordino.api import load
from sordino.contract import Progress
from sordino.corpus import EVAL_TEXT, Text, eval_windows, load_text, tokenize
from sordino.errors import InputError
from sordino.measure.size import size_of
from sordino.measure.tasks import Tasks, TaskScores, tasks_asked_for
from sordino.numerics.divergence import token_kl
from sordino.report.notebook import table
from sordino.runtime.attention import attach
from sordino.runtime.prefix import prefix_ids, prefix_length, prompt_ids, quantization_of
from sordino.walk.attention import NAME as WINDOW_ATTENTION
from sordino.walk.source import locate

_ROWS = 256  # positions whose logits are looked at in fp32 at once


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model; what was not asked for is None.

    Attributes:
        ppl: perplexity, with standard error; None if only tasks were asked for.
        kl: mean KL to the reference in nats per token, with standard error.
        top1_agreement: share of positions where both models prefer the same token, with standard error.
        bits_per_weight: stored bits of the quantized linears over their parameters.
        bits_per_parameter: stored bits of the whole checkpoint over all parameters.
        bytes: of the checkpoint's safetensors.
        windows: how many windows were scored; None without text.
        seqlen: tokens of a window.
        seconds: wall time of the model's own forward passes, without the reference's.
        tasks: scores on tasks.
        tasks_against: the reference's scores on them.
        bits_per_input: mean width of rounded inputs of the quantized linears; None if none are.
        bits_per_kv: bits of a packed cache for a number of a key or value, scales included; likewise.
    """

    ppl: float | None
    ppl_stderr: float | None
    kl: float | None
    kl_stderr: float | None
    top1_agreement: float | None
    top1_agreement_stderr: float | None
    bits_per_weight: float
    bits_per_parameter: float
    bytes: int
    windows: int | None
    seqlen: int | None
    seconds: float
    tasks: TaskScores | None = None
    tasks_against: TaskScores | None = None
    bits_per_input: float | None = None
    bits_per_kv: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As written by ``sordino eval --json``; differences on tasks come with the ends of their 95 % intervals."""
        row = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("tasks")}
        tasks, other = self.tasks, self.tasks_against
        means = {} if tasks is None else {"tasks_mean": tasks.mean_to_json(other)}
        return row | {"tasks": None if tasks is None else tasks.to_json(other)} | means

    def lines(self) -> list[tuple[str, str]]:
        """What was asked for, as (figure, value), with standard errors; then tasks, with their paired differences."""
        return [*_pretty(self.to_json()), *_task_lines(self)]

    def _repr_html_(self) -> str:
        return table(self.lines())


def _pretty(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Figures with their standard errors, leaving out what was not asked for."""
    lines = []
    for name, value in row.items():
        if value is None or name.endswith("_stderr") or isinstance(value, dict):
            continue
        error = row.get(f"{name}_stderr")
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        lines.append((name, shown if error is None else f"{shown} ± {error:.4f}"))
    return lines


_COUNTS = ("samples", "contexts_cut")


def _task_lines(result: Evaluation) -> list[tuple[str, str]]:
    """A line for every figure on tasks, with the paired difference where there is one."""
    if result.tasks is None:
        return []
    rows = result.to_json()
    lines = []
    for task, row in (*rows["tasks"].items(), ("tasks", rows["tasks_mean"])):
        if "contexts_cut" in row:
            lines.append((f"{task}: contexts too long, cut on the left", str(row["contexts_cut"])))
        for metric, value in _pretty({k: v for k, v in row.items() if k not in _COUNTS and "_difference" not in k}):
            lines.append((f"{task}: {metric}", value))
            ends = [row.get(f"{metric}_difference{end}") for end in ("", "_low", "_high")]
            if ends[0] is not None:
                p = row.get(f"{metric}_difference_p")
                shown = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*ends) + ("" if p is None else f", McNemar p {p:.3f}")
                lines.append(("  to the reference, 95 %", shown))
    return lines


@dataclass(frozen=True)
class Windows:
    """Evaluation text and how it is cut.

    Attributes:
        text: the text.
        seqlen: tokens of a window.
        count: how many windows from the start; None for all.
    """

    text: Text
    seqlen: int
    count: int | None

    def of(self, tokenizer: Any, model: Any, name: str | Path) -> Tensor:
        """The windows as a model reads them, [N, L]."""
        ids = eval_windows(tokenize(self.text, tokenizer), self.seqlen, self.count)
        _check_fits(ids, model, name)
        return ids


@dataclass(frozen=True)
class Reference:
    """What a reference model says, so that several models can be held against it; what was not asked for is None.

    Attributes:
        name: of the model.
        ids: the windows it read, [N, L].
        hidden: its final hidden states, [N, L, D].
        head: its output projection.
        tasks: its scores on tasks.
        dtype: what it was loaded in.
        behind: ids of the tokens that stood before every text.
        suite: the tasks of those scores.
    """

    name: str | Path
    ids: Tensor | None
    hidden: Tensor | None
    head: Any
    tasks: TaskScores | None
    dtype: torch.dtype | str
    behind: tuple[int, ...] = ()
    suite: Tasks | None = None


def reference(
    model: str | Path,
    *,
    text: str | Path | Text | None = EVAL_TEXT,
    seqlen: int = 2048,
    windows: int | None = None,
    tasks: Tasks | None = None,
    dtype: torch.dtype | str = "auto",
    behind: tuple[int, ...] = (),
    progress: Progress | None = None,
) -> Reference:
    """Run a reference model once; see :func:`evaluate` for the arguments and errors. A text of None reads none.

    ``behind`` are ids of tokens before every text, as a system prompt: what a checkpoint that holds one is to be held against.
    """
    cut = None if text is None else Windows(load_text(text), seqlen, windows)
    exact, tokenizer = load(model, dtype=dtype)
    if behind:
        attach(exact, list(behind))
    ids = None if cut is None else cut.of(tokenizer, exact, model)
    scores = None if tasks is None else tasks.run(exact, tokenizer, progress)
    if ids is None:
        return Reference(model, None, None, None, scores, dtype, behind, tasks)
    exact.set_attn_implementation(WINDOW_ATTENTION)
    hidden = [final_states(exact, w) for w in in_turn(ids, progress, "reference")]
    return Reference(model, ids, torch.stack(hidden), exact.lm_head, scores, dtype, behind, tasks)


def evaluate(
    model: str | Path,
    *,
    text: str | Path | Text | None = None,
    seqlen: int = 2048,
    windows: int | None = None,
    against: str | Path | Reference | None = None,
    prefix_from: str | Path | None = None,
    tasks: Tasks | str | Sequence[str] = (),
    task_data: str | Path | None = None,
    limit: int | None = None,
    dtype: torch.dtype | str = "auto",
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a checkpoint (or a full-precision model) on text, on tasks, or on both.

    Args:
        model: anything that :func:`sordino.load` takes.
        text: evaluation text, see :func:`sordino.corpus.load_text`; None is the built-in one, or none if there are tasks.
        seqlen: tokens of a window.
        windows: how many windows from the start; None for all.
        against: reference for KL, agreement and differences on tasks, usually the full-precision model; of several models
            that are held against the same one, run it once with :func:`reference`. Named, and of full precision, it reads the
            text behind the model's system prompt, if there is one.
        prefix_from: checkpoint whose prefix tokens are put before every text: what they alone do to a full-precision model.
        tasks: names of tasks, or what :func:`sordino.measure.tasks.open_tasks` made of them; its other arguments follow.
        task_data: folder of local task files.
        limit: how many items of each task.
        dtype: compute dtype; "auto" is what :func:`sordino.load` takes.
        progress: called with (what, done, total).

    Raises:
        InputError: if something cannot be loaded, the text is shorter than one window, or a window behind the prefix is longer
            than the model's positions.
    """
    suite = tasks_asked_for(tasks, task_data, limit)
    cut = Windows(load_text(text or EVAL_TEXT), seqlen, windows) if text is not None or suite is None else None
    subject, tokenizer = load(model, dtype=dtype)
    if prefix_from is not None:
        attach(subject, prefix_ids(locate(prefix_from)))
    ids = None if cut is None else cut.of(tokenizer, subject, model)
    if against is not None and not isinstance(against, Reference):
        against = reference(
            against,
            text=None if cut is None else cut.text,
            seqlen=seqlen,
            windows=windows,
            tasks=suite,
            dtype=dtype,
            behind=prompt_beside(model, against),
            progress=progress,
        )
    if against is not None and ids is not None:
        _check_same(model, ids, against.name, against.ids)
    itself = against if prefix_from is None and against is not None and _is_of(against, model, dtype) else None
    known = itself.tasks if itself is not None and itself.suite is suite else None
    scores = None if suite is None else known or suite.run(subject, tokenizer, progress)
    found, seconds = _on_text(subject, ids, against, None if itself is None else itself.hidden, progress)
    figures: dict[str, Any] = found | asdict(size_of(subject, locate(model)))
    return Evaluation(
        **figures,
        windows=None if ids is None else len(ids),
        seqlen=None if ids is None else seqlen,
        tasks=scores,
        tasks_against=None if against is None else against.tasks,
        seconds=round(seconds + (scores.seconds if scores else 0.0), 2),
    )


def prompt_beside(model: str | Path, against: str | Path) -> tuple[int, ...]:
    """The tokens that a reference reads before every text beside a model: its system prompt, unless it is quantized itself."""
    return () if quantization_of(locate(against)) else prompt_ids(locate(model))


def _on_text(
    model: Any, ids: Tensor | None, exact: Reference | None, states: Tensor | None, progress: Progress | None
) -> tuple[dict[str, float | None], float]:
    """Figures on windows [N, L] of text by their names in :class:`Evaluation`, None without windows; and the seconds.

    Its final ``states`` [N, L, D], where they are known, are not made again.
    """
    names = ("ppl", "kl", "top1_agreement")
    figures: dict[str, float | None] = {name + end: None for name in names for end in ("", "_stderr")}
    if ids is None:
        return figures, 0.0
    started = time.time()
    model.set_attn_implementation(WINDOW_ATTENTION)
    scores = [
        _score(model, final_states(model, w) if states is None else states[i], exact, i, w)
        for i, w in enumerate(in_turn(ids, progress, "eval"))
    ]
    nll, kl, agree = (torch.stack([s[i] for s in scores]) for i in range(3))
    ppl = math.exp(min(float(nll.mean()), 700.0))
    figures |= {"ppl": ppl, "ppl_stderr": None if (error := _stderr(nll)) is None else ppl * error}
    for name, values in (("kl", kl), ("top1_agreement", agree)) if exact is not None else ():
        figures |= {name: float(values.mean()), f"{name}_stderr": _stderr(values)}
    return figures, time.time() - started


def _is_of(exact: Reference, model: str | Path, dtype: torch.dtype | str) -> bool:
    """Whether a reference is this very model, in this dtype, with nothing before its texts."""
    return not exact.behind and dtype == exact.dtype and locate(model) == locate(exact.name)


def _check_same(name: str | Path, ids: Tensor, other: str | Path, theirs: Tensor | None) -> None:
    """Refuse to compare models that do not read the same tokens."""
    if theirs is None:
        raise InputError(f"{other} was run on no text; make the reference with one")
    if not torch.equal(ids, theirs):
        raise InputError(f"{name} and {other} tokenize the text differently: their distributions cannot be compared")


def _check_fits(ids: Tensor, model: Any, name: str | Path) -> None:
    """Refuse token ids and windows that the model has no embeddings or positions for."""
    vocabulary, limit = model.config.vocab_size, getattr(model.config, "max_position_embeddings", None)
    if int(ids.max()) >= vocabulary:
        raise InputError(f"{name}: the text has token {int(ids.max())}, the model only {vocabulary} embeddings")
    before = prefix_length(model)
    if limit is not None and before + ids.shape[1] > limit:
        taken = f", of which its prefix takes {before}" if before else ""
        raise InputError(
            f"--seqlen {ids.shape[1]} is longer than the {limit} positions of {name}{taken}; --seqlen {limit - before} fits"
        )


def in_turn(items: Sequence[Any] | Tensor, progress: Progress | None, what: str) -> Iterator[Any]:
    """One item (a row of a tensor) after another, telling progress of each."""
    for i, item in enumerate(items):
        if progress is not None:
            progress(what, i, len(items))
        yield item
    if progress is not None:
        progress(what, len(items), len(items))


@torch.no_grad()
def _score(model: Any, hidden: Tensor, exact: Reference | None, index: int, window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean NLL, KL and agreement of one window [L] with final states [L, D]; the last two are zero without a reference."""
    nll, kl, agree = torch.zeros(3, dtype=torch.float64)
    for rows in torch.arange(len(window) - 1).split(_ROWS):
        logits = model.lm_head(hidden[rows])
        log_q = torch.log_softmax(logits.float(), -1)
        nll -= log_q.gather(-1, window[rows + 1, None]).sum()
        if exact is not None and exact.hidden is not None:
            target = exact.head(exact.hidden[index, rows])
            agree += (target.argmax(-1) == logits.argmax(-1)).sum()
            kl += token_kl(torch.log_softmax(target.float(), -1), log_q).sum()
    return nll / (len(window) - 1), kl / (len(window) - 1), agree / (len(window) - 1)


@torch.no_grad()
def final_states(model: Any, window: Tensor) -> Tensor:
    """Hidden states of one window behind the last norm, [L, D]; logits are made from slices of it, never all at once."""
    out: Tensor = model.get_decoder()(input_ids=window[None], use_cache=False).last_hidden_state[0]
    return out


def _stderr(per_window: Tensor) -> float | None:
    """Standard error of the mean over windows; one window has none."""
    n = len(per_window)
    return float(per_window.double().std() / math.sqrt(n)) if n > 1 else None
