"""The preflight as a command: what a run will make and need, and which engines could load it. Seconds, no work."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sordino.contract import having
from sordino.errors import InputError
from sordino.recipe import load_recipe
from sordino.runtime.kernels import status
from sordino.walk.plan import Plan, gib, make_plan
from sordino.walk.prompt import prompt_of
from sordino.walk.source import open_source


def examine(
    model: str,
    recipe: str,
    overrides: tuple[str, ...] = (),
    engines: tuple[str, ...] = (),
    system_prompt: str | None = None,
) -> list[tuple[str, str]]:
    """Findings as (check, finding) pairs.

    Raises:
        InputError: for the first thing that will not work, with the remedy.
    """
    unknown = [e for e in engines if e not in ENGINES]
    if unknown:
        raise InputError(f"--for {unknown[0]}: engines known are {', '.join(ENGINES)}")
    source = open_source(model)
    plan = make_plan(source, load_recipe(recipe, overrides), None, None)
    if plan.needs_text:
        source.tokenizer()  # a folder without one fails here and not when the run begins
    anatomy, c = plan.anatomy, plan.recipe.calibration
    dtype = str(plan.dtype).removeprefix("torch.")
    text = f"{c.windows} windows of {c.seqlen}, {plan.heldout} more held out" if plan.needs_text else "none needed"
    prompt = None if system_prompt is None else prompt_of(system_prompt, source, plan)
    findings = [
        ("model", f"{anatomy.model_type}, {anatomy.n_blocks} blocks, {str(source.dtype).removeprefix('torch.')}"
                  f", {'tied' if anatomy.tied else 'untied'} embeddings"),
        ("coverage", plan.coverage()),
        ("bits per quantized weight", f"{plan.bits_per_weight(len(prompt.ids) if prompt else 0):.3f}"),
        ("calibration", text),
        ("forwards", f"{dtype}, {plan.batch} windows at a time, {torch.get_num_threads()} threads"),
        ("memory", f"about {gib(plan.memory)}" + ("; training the whole model saves memory and takes longer" * plan.lean)),
        ("disk while running", f"about {gib(plan.disk)}"),
        ("kernels here", status()),
    ]  # fmt: skip
    if prompt:
        findings.insert(2, ("system prompt", f"{len(prompt.ids)} tokens before every text"))
    for engine in engines:
        if prompt:
            raise InputError(f"{engine}: a protected system prompt runs in Sordino only; leave out --system-prompt")
        ENGINES[engine](plan)
        findings.append((engine, "the stored format can be carried over exactly"))
    return findings


def _for_vllm(plan: Plan) -> None:
    """compressed-tensors pack-quantized in vLLM: affine groups of 32 columns or more, plain embeddings and head."""
    _plain_ends(plan, "vllm")
    _affine(plan, "vllm")
    for p in plan.quantized():
        if p.linear.in_features % 32 or p.linear.out_features % 32:
            raise InputError(f"vllm: {p.name} is {p.linear.out_features} x {p.linear.in_features}, not multiples of 32; "
                             "add it to format.weights.ignore")  # fmt: skip
        if p.group not in (32, 64, 128, p.linear.in_features):
            raise InputError(f"vllm: {p.name}: group {p.group} has no kernel; --set format.weights.group=auto")


def _affine(plan: Plan, engine: str) -> None:
    if plan.recipe.format.activations.rounded:
        raise InputError(f"{engine}: rounded inputs run in Sordino only so far; set format.activations.bits=16")
    if plan.recipe.format.kv.rounded:
        raise InputError(f"{engine}: a cache of packed codes runs in Sordino only; set format.kv.bits=16")
    if {"keys", "down"} & set(plan.inner):
        raise InputError(f"{engine}: online rotations run in Sordino only; leave out the move, or its keys and down")
    if "key-means" in plan.inner:
        raise InputError(f"{engine}: keys without their mean run in Sordino only; set keys=false of the move 'center'")
    if "channels" in plan.inner:
        raise InputError(f"{engine}: channels in order run in Sordino only; leave out the move 'channels'")
    if any(p.side for p in plan.quantized()):
        raise InputError(f"{engine}: a low-rank pair beside a linear runs in Sordino only; set side=false, which merges it")
    if having(plan.moves, "prefix"):
        raise InputError(f"{engine}: keys and values of a prefix run in Sordino only; leave out the move")
    for p in plan.quantized():
        if p.column:
            raise InputError(f"{engine}: {p.name}: a stored column scale runs in Sordino only; set column_scale=false there")
        if p.format.grid != "affine":
            raise InputError(f"{engine}: {p.name}: {p.format.grid} grids run in Sordino only; use an affine recipe, "
                             "e.g. d2quant-paper-w3 instead of d2quant-w3")  # fmt: skip
    norms = set(plan.anatomy.norms.values())
    shifted = [m.name for m in plan.moves if m.final_bias or norms & set(m.biases(plan.anatomy))]
    if shifted:
        raise InputError(f"{engine}: move '{shifted[0]}' gives norms a bias, which {engine} does not know; "
                         "store it in the linears (mean-shift: form = \"linear\", final = false) or leave it out")  # fmt: skip
    if plan.basis is not None and plan.anatomy.tied:
        raise InputError(f"{engine}: a rotated model with one table for embeddings and head runs in Sordino only; "
                         "leave the move 'rotate' out")  # fmt: skip


def _for_gguf(plan: Plan) -> None:
    """GGUF blocks are 32 columns wide; an integer grid fits one of its types exactly if groups are made of blocks."""
    _affine(plan, "gguf")
    for p in plan.quantized():
        if p.format.bits == 8 and not p.format.symmetric:
            raise InputError(f"gguf: {p.name}: 8 bits asymmetric fit no block type; --set format.weights.symmetric=true")
        if p.group is None or p.group % 32:
            smaller = "" if p.linear.in_features % 32 else "--set format.weights.group=32, or "
            raise InputError(f"gguf: {p.name}: group {p.group} is no multiple of 32; "
                             f"{smaller}add it to format.weights.ignore")  # fmt: skip


def _plain_ends(plan: Plan, engine: str) -> None:
    fmt = plan.recipe.format
    if fmt.embeddings != 16 or fmt.head != 16:
        raise InputError(f"{engine}: embeddings and head must stay at 16 bits; --set format.embeddings=16 --set format.head=16")


ENGINES: dict[str, Callable[[Plan], None]] = {"vllm": _for_vllm, "gguf": _for_gguf}
