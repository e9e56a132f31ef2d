"""What a run is about, found out before anything is written; and the run itself, from the walk to the manifest."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from sordino.contract import Progress
from sordino.corpus import Text, calibration_windows, load_text, tokenize
from sordino.errors import InputError
from sordino.heap import peak_memory
from sordino.protect.prompt import Prompt
from sordino.recipe import Recipe
from sordino.version import __version__, source_digest
from sordino.walk.assemble import assemble
from sordino.walk.plan import Plan, make_plan
from sordino.walk.prompt import prompt_of
from sordino.walk.source import Source, open_source
from sordino.walk.store import Work
from sordino.walk.walk import Walk


@dataclass(frozen=True)
class Job:
    """What a run is about.

    Attributes:
        model: what the user called it.
        source: its files.
        plan: what the recipe makes of it.
        text: calibration text; None if the plan needs none.
        prompt: protected system prompt; None without one.
        seed: of the windows' choice and the moves' random numbers.
        fingerprint: all that decides the checkpoint's bytes; an interrupted run goes on if it is the same.
    """

    model: str
    source: Source
    plan: Plan
    text: Text | None
    prompt: Prompt | None
    seed: int
    fingerprint: dict[str, Any]


def make_job(
    model: str,
    recipe: Recipe,
    out: Path,
    text: str | Path,
    seed: int,
    blocks: tuple[int, int] | None,
    system_prompt: str | None,
) -> Job:
    """Look at everything given, as :func:`sordino.quantize` describes it; nothing is written.

    Raises:
        InputError: for the first thing that cannot be used.
    """
    source = open_source(model)
    plan = make_plan(source, recipe, blocks, out)
    prompt = None if system_prompt is None else prompt_of(system_prompt, source, plan)
    content = load_text(text) if plan.needs_text else None
    return Job(model, source, plan, content, prompt, seed, _fingerprint(source, recipe, content, seed, plan, prompt))


def windows_of(job: Job) -> Tensor | None:
    """Calibration, held-out and extra windows, int64 [N, L]; None if the plan needs no text.

    Raises:
        InputError: if the text is too short, or does not fit the model.
    """
    source, plan, seed = job.source, job.plan, job.seed
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"--seed {seed} does not fit 64 bits")
    if job.text is None:
        return None
    ids = tokenize(job.text, source.tokenizer())
    vocabulary = source.shape(f"{plan.anatomy.embeddings}.weight")[0]
    if len(ids) and int(ids.max()) >= vocabulary:
        raise InputError(f"{source.path}: the tokenizer has token {int(ids.max())}, the model only {vocabulary} embeddings")
    c = plan.recipe.calibration
    return calibration_windows(ids, c.seqlen, c.windows, plan.heldout, seed, plan.extra)


def run_job(job: Job, work: Work, windows: Tensor | None, out: Path, progress: Progress) -> dict[str, Any]:
    """Walk, check the final guard, assemble; returns the manifest.

    Raises:
        InputError: if the model's tensors cannot be used.
    """
    source, seed, prompt = job.source, job.seed, job.prompt
    walk = Walk(source, job.plan, work, windows, seed, progress, prompt.ids if prompt else ())
    ends = walk.run()
    plan = walk.plan  # in the basis that was learned, if one was
    progress("write", 0, 1)
    guard: dict[str, Any] = dict(ends.guard)
    if not guard and plan.heldout:
        guard["not_run"] = f"only blocks {plan.blocks[0]}:{plan.blocks[1]} were quantized"
    # Written so that a NaN fails too; a per cent, or a ten-thousandth of a nat, is within what bf16 rounding moves.
    elif guard and not guard["kl"] <= 1.01 * guard["rtn_kl"] + 1e-4:
        guard["failed"] = True
    manifest = {
        "sordino": __version__,
        "recipe": plan.recipe.name,
        "recipe_digest": plan.recipe.digest,
        "run": work.fingerprint,
        "seed": seed,
        "coverage": plan.coverage(),
        "bits_per_weight": plan.bits_per_weight(len(walk.prefix.ids) if walk.prefix else 0),
        "full_precision_bytes": source.bytes,
        "batch": plan.batch,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "guard": guard,
        "blocks": work.state["reports"],
        **({"learned": work.state["learned"]} if "learned" in work.state else {}),
        **({"finish": work.finished} if work.finished else {}),
        **({"prefix": _prefix_facts(walk, source)} if walk.prefix or "prefix" in walk.artifacts else {}),
        **({"system_prompt": {"text": prompt.text, "tokens": len(prompt.ids)}} if prompt else {}),
    }
    stored = assemble(source, plan, work, ends, out, manifest)
    progress("write", 1, 1)
    return stored


def _prefix_facts(walk: Walk, source: Source) -> dict[str, Any]:
    """The prefix and, where it was searched, how far the outliers stood out without it."""
    ids, found = list(walk.prefix.ids if walk.prefix else ()), walk.artifacts.get("prefix")
    ratios = [round(r, 2) for r in found.ratios] if found else []
    return {"ids": ids, "tokens": source.tokenizer().convert_ids_to_tokens(ids), "outlier_ratios": ratios}


def _fingerprint(
    source: Source, recipe: Recipe, text: Text | None, seed: int, plan: Plan, prompt: Prompt | None
) -> dict[str, Any]:
    return {
        "model": source.fingerprint(),
        "recipe": recipe.digest,
        "text": text.digest if text else None,
        "system_prompt": {"text": prompt.text, "ids": list(prompt.ids)} if prompt else None,
        "seed": seed,
        "blocks": list(plan.blocks),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "versions": {
            "sordino": f"{__version__}+{source_digest()}",
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    }


def run_facts(work: Work, job: Job) -> dict[str, Any]:
    """What ``run.json`` says: what may differ between two runs with the same bytes."""
    return {
        "text": None if job.text is None else job.text.spec,
        "seconds": round(work.seconds, 2),
        "cpu_seconds": round(work.cpu_seconds, 2),
        "peak_memory_bytes": peak_memory(),
        "estimated_memory_bytes": job.plan.memory,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "parts": work.state["spent"],
    }
