"""The plan of a run: everything decided before any work, and the refusals that can be made in seconds.

``sordino doctor`` shows it; ``sordino quantize`` starts from it. Sizes come from the config and the safetensors
headers, so nothing is loaded. Shapes: N windows of L tokens, D hidden size.
"""

from __future__ import annotations

import fnmatch
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import nn

from sordino.anatomy import Anatomy, anatomy_of, skeleton
from sordino.contract import Move, having
from sordino.errors import InputError, SordinoError, nearest, reason
from sordino.moves import build_moves
from sordino.numerics.basis import Basis, Dense
from sordino.numerics.machine import fast
from sordino.recipe import Recipe
from sordino.runtime.modules import input_groups
from sordino.runtime.prefix import check_rotary
from sordino.walk.linears import LinearPlan, make_solver, plan_block
from sordino.walk.source import Source

# Tokens of one forward: enough to keep the matmuls busy, few enough for activations to stay near the caches. Wide models
# take as many as they are wide, because every forward also adds to sums of that size squared.
_BATCH_TOKENS = 1024
_RTN_WINDOWS = 4  # held-out windows on which the whole model rounded by RTN is followed, for the final guard


@dataclass(frozen=True)
class Plan:
    """What will be done.

    Attributes:
        recipe: the recipe.
        anatomy: where things are.
        moves: the recipe's moves, instantiated.
        blocks: first and last-plus-one block to quantize.
        linears: per block, the linears in site order.
        dtype: compute dtype of forwards.
        stored: dtype of what is not rounded.
        batch: windows of a forward.
        budget: bytes that a runner may keep of inputs.
        heldout: number of held-out windows (0: no guard).
        extra: calibration windows beyond the recipe's that the finish stage asks for.
        q_calib, fp_calib: whether that stream is computed on the calibration windows.
        basis: of the residual stream inside the blocks, None for the model's own.
        inner: spaces inside the blocks that moves turn.
        targets: whether moves train towards the full-precision stream, up to its end.
        lean: whether the finish stage saves memory: no values of rounded weights, and blocks computed twice a step.
        memory: estimated peak bytes.
        disk: bytes written under OUT.
    """

    recipe: Recipe
    anatomy: Anatomy
    moves: tuple[Move, ...]
    blocks: tuple[int, int]
    linears: tuple[tuple[LinearPlan, ...], ...]
    dtype: torch.dtype
    stored: torch.dtype
    batch: int
    budget: int
    heldout: int
    extra: int
    q_calib: bool
    fp_calib: bool
    targets: bool
    lean: bool
    basis: Basis | Dense | None
    inner: tuple[str, ...]
    memory: int
    disk: int

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is looked at at all."""
        return self.q_calib or self.fp_calib or self.heldout > 0

    @property
    def finishing(self) -> list[Move]:
        """The moves that have something to do at the end."""
        return having(self.moves, "finish")

    @property
    def rtn_windows(self) -> int:
        """Held-out windows on which a whole RTN model is followed."""
        return min(_RTN_WINDOWS, self.heldout)

    def quantized(self) -> Iterator[LinearPlan]:
        """All linears that are rounded, in order."""
        return (x for block in self.linears for x in block if x.group is not None)

    @property
    def final_bias(self) -> bool:
        """Whether a move gives the final norm a bias, beside the last block."""
        return self.blocks[1] == self.anatomy.n_blocks and any(m.final_bias for m in self.moves)

    def coverage(self) -> str:
        """One line: how many of the block linears are quantized, at which groups, and which are not."""
        every = [x for block in self.linears for x in block]
        kinds = Counter(f"{x.format.bits} bits group {_group_word(x)}" for x in every if x.group is not None)
        rest = [x.name for x in every if x.group is None]
        line = f"{len(every) - len(rest)} of {len(every)} block linears quantized"
        if kinds:
            line += ": " + ", ".join(f"{n} at {kind}" for kind, n in kinds.items())
        if rest:
            line += f"; left in full precision: {', '.join(rest[:4])}" + (f" and {len(rest) - 4} more" if rest[4:] else "")
        return line

    def bits_per_weight(self, prefix: int = 0) -> float:
        """Stored bits of the quantized linears, and of the keys and values of a prefix, over the linears' parameters."""
        chosen = list(self.quantized())
        if not chosen:
            return 16.0
        item = 8 * self.stored.itemsize
        caches = 2 * next(x.out_features for x in self.anatomy.linears if x.name.endswith("v_proj")) * self.anatomy.n_blocks
        side = item * ((self.blocks[1] - self.blocks[0]) * self.added_biases() + prefix * caches)
        side += item * self.anatomy.hidden * self.final_bias
        side += item * ("key-means" in self.inner) * caches // 2  # one token's keys
        side += 32 * self.anatomy.hidden**2 * isinstance(self.basis, Dense)
        if self.recipe.format.activations.rounded:
            side += 32 * sum(input_groups(x.linear.in_features, x.inputs) for x in chosen)
        side += item * 2 * self.anatomy.key_heads * self.recipe.format.kv.rounded * (self.blocks[1] - self.blocks[0])
        return (sum(x.bits_stored for x in chosen) + side) / sum(x.linear.in_features * x.linear.out_features for x in chosen)

    def added_biases(self) -> int:
        """Numbers in the biases that moves add to a block."""
        sizes = {x.name: x.out_features for x in self.anatomy.linears} | dict.fromkeys(
            self.anatomy.norms.values(), self.anatomy.hidden
        )
        return sum(sizes[name] for name in {n for m in self.moves for n in m.biases(self.anatomy)})


def _group_word(x: LinearPlan) -> str:
    return "channel" if x.group == x.linear.in_features else str(x.group)


def make_plan(source: Source, recipe: Recipe, blocks: tuple[int, int] | None, out: Path | None) -> Plan:
    """Decide everything and refuse what cannot work.

    Args:
        source: the full-precision model; only headers are read.
        recipe: what to do.
        blocks: range of blocks to quantize, or None for all.
        out: where it will be written, for the disk check; None to leave that out.

    Raises:
        InputError: naming the tensor, the number and the remedy.
    """
    return _check_resources(draft_plan(source, recipe, blocks), source, out)


def draft_plan(source: Source, recipe: Recipe, blocks: tuple[int, int] | None) -> Plan:
    """What :func:`make_plan` decides, whether or not there is room for it here."""
    model, anatomy = _structure(source)
    _check_tensors(source, model, anatomy)
    _check_format(recipe, anatomy, source)
    _check_patterns(recipe, anatomy)
    moves = tuple(build_moves(recipe.moves))
    for move in moves:
        move.check(recipe.format, anatomy, None)
    _check_moves(moves, source, anatomy)
    span = _check_blocks(blocks, anatomy)
    kept = max((m.kept for m in moves), default=0)
    side = max((m.side for m in moves), default=0)
    linears = tuple(plan_block(i, anatomy, recipe, span, kept, side) for i in range(anatomy.n_blocks))
    if recipe.format.activations.rounded and not any(x.group for block in linears for x in block):
        raise InputError(
            f"format.activations.bits={recipe.format.activations.bits} without rounded weights: nothing would be rounded; "
            "set format.weights.bits"
        )
    needs = {n for block in linears for x in block if x.group is not None for n in make_solver(x.format).needs}
    fp_moves = any(m.needs_fp_stream for m in moves)
    calibrated = bool(needs) or bool(moves) or recipe.format.activations.searched or recipe.format.kv.searched
    c = recipe.calibration
    return Plan(
        recipe=recipe,
        anatomy=anatomy,
        moves=moves,
        blocks=span,
        linears=linears,
        dtype=fast(source.dtype),
        stored=source.dtype,
        batch=max(1, min(c.windows, max(_BATCH_TOKENS, anatomy.hidden) // c.seqlen)),
        budget=min(1 << 29, psutil.virtual_memory().total // 16),
        heldout=max(4, c.windows // 8) if calibrated and recipe.guard != "off" else 0,
        extra=max([0, *(m.finish_windows(c.windows) - c.windows for m in moves)]),
        q_calib=calibrated,
        fp_calib="D" in needs or fp_moves,
        targets=fp_moves,
        lean=False,
        basis=_basis(moves, anatomy.hidden),
        inner=_inner(moves),
        memory=0,
        disk=0,
    )


def _structure(source: Source) -> tuple[nn.Module, Anatomy]:
    try:
        model = skeleton(source.config)
        return model, anatomy_of(model)
    except SordinoError:
        raise
    except Exception as error:  # whatever transformers' own code meets in a config that makes no sense
        kind = type(error).__name__
        raise InputError(f"{source.path / 'config.json'} describes no model: {kind}: {reason(error)}") from None


def _check_tensors(source: Source, model: nn.Module, anatomy: Anatomy) -> None:
    for name, parameter in model.named_parameters():
        if anatomy.tied and name == f"{anatomy.head}.weight" and name not in source.weight_map:
            continue
        if name not in source.weight_map:
            raise InputError(f"{source.path} lacks tensor '{name}' that its config.json calls for")
        if source.shape(name) != tuple(parameter.shape):
            raise InputError(f"tensor '{name}' is {list(source.shape(name))}, config.json says {list(parameter.shape)}")
    unknown = source.leave_out(set(model.state_dict()), harmless=".rotary_emb.inv_freq")
    if unknown:
        raise InputError(
            f"{source.path}: tensor '{unknown[0]}' is no part of the {anatomy.model_type} that config.json describes"
        )


def _check_format(recipe: Recipe, anatomy: Anatomy, source: Source) -> None:
    fmt = recipe.format
    if fmt.kv.rounded and fmt.kv.static and not fmt.kv.symmetric:
        raise InputError("format.kv: static scales are symmetric; set format.kv.symmetric=true")
    for name, table in (("activations", fmt.activations), ("kv", fmt.kv)):
        if table.static and table.clip not in (1.0, "search"):
            raise InputError(f"format.{name}.clip belongs to mode=dynamic; a static scale is searched")
    if fmt.activations.static and fmt.activations.group != "token":
        raise InputError("format.activations.group belongs to mode=dynamic; a static scale is one number a site")
    if fmt.activations.static and not fmt.activations.symmetric:
        raise InputError("format.activations.symmetric=false belongs to mode=dynamic; static scales are symmetric")
    if anatomy.tied and fmt.head not in (16, fmt.embeddings):
        raise InputError(
            f"format.head={fmt.head}: embedding and head of this model are one table, stored once; "
            f"set format.embeddings (now {fmt.embeddings}) and leave format.head at 16"
        )
    limit = getattr(source.config, "max_position_embeddings", None)
    if limit is not None and recipe.calibration.seqlen > limit:
        raise InputError(
            f"--seqlen {recipe.calibration.seqlen} is longer than the model's {limit} positions; --seqlen {limit} fits"
        )


def _check_patterns(recipe: Recipe, anatomy: Anatomy) -> None:
    """Refuse patterns that no linear has the name of: most likely they are mistyped."""
    weights = recipe.format.weights
    names = [anatomy.full_name(i, x.name) for i in range(anatomy.n_blocks) for x in anatomy.linears]
    patterns = [("override", o.match) for o in weights.override] + [("ignore", p) for p in weights.ignore]
    for key, pattern in patterns:
        if not fnmatch.filter(names, pattern):
            meant = nearest(pattern.removeprefix("*."), [f"*.{x.name.rpartition('.')[2]}" for x in anatomy.linears])
            raise InputError(f"format.weights.{key}: '{pattern}' matches none of the block linears{meant}, e.g. '{names[0]}'")


def _check_blocks(blocks: tuple[int, int] | None, anatomy: Anatomy) -> tuple[int, int]:
    first, last = blocks or (0, anatomy.n_blocks)
    if not 0 <= first < last <= anatomy.n_blocks:
        raise InputError(f"--blocks {first}:{last}: this model has blocks 0:{anatomy.n_blocks}")
    return first, last


def _check_moves(moves: tuple[Move, ...], source: Source, anatomy: Anatomy) -> None:
    names = [m.name for m in having(moves, "survey")]
    if twice := [n for n in names if names.count(n) > 1]:
        raise InputError(f"the move '{twice[0]}' stands there twice; keep one of them")
    for place, move in enumerate(moves):
        if move.reshapes_first and (earlier := having(moves[:place], "reshape")):
            raise InputError(f"move '{move.name}' must stand before '{earlier[0].name}', which changes what it has seen")
        if move.before_inner and (turned := next((m for m in moves[:place] if {*m.inner()} - {"key-means"}), None)):
            raise InputError(f"move '{move.name}' must stand before '{turned.name}', which turns the channels it works on")
    for move in moves:
        if move.reshapes_alone and (other := next((m for m in having(moves, "reshape") if m is not move), None)):
            raise InputError(f"move '{move.name}' orders the channels as the model has them; leave out '{other.name}'")
    for move in having(moves, "learn"):
        others = [m for m in moves if m is not move]
        if any(m.name == move.name for m in others):
            raise InputError(f"the move '{move.name}' stands there twice; keep one of them")
        turning = [m for m in others if m.basis(anatomy.hidden) is not None]
        if not turning:
            raise InputError(f"move '{move.name}' starts from a rotation of the residual stream; put 'rotate' before it")
        if late := [m for m in moves[moves.index(move) :] if m in turning or m.inner()]:
            raise InputError(f"move '{move.name}' must stand behind '{late[0].name}'")
    ranks = {m.side for m in moves} - {0}
    if len(ranks) > 1:
        raise InputError(
            f"pairs at the side of linears (side) are of one rank in all moves, not of {min(ranks)} and {max(ranks)}"
        )
    if ranks and any(m.smooths for m in moves):
        raise InputError("smooth and pairs at the side of linears (side) do not go together; leave one out")
    if having(moves, "prefix"):
        check_rotary(source.config)


def _basis(moves: tuple[Move, ...], hidden: int) -> Basis | None:
    found = [b for m in moves if (b := m.basis(hidden)) is not None]
    if len(found) > 1:
        raise InputError("more than one move rotates the residual stream; keep one of them")
    return found[0] if found else None


def _inner(moves: tuple[Move, ...]) -> tuple[str, ...]:
    found = [name for m in moves for name in m.inner()]
    if len(set(found)) < len(found):
        raise InputError("more than one move rotates the inside of the blocks; keep one of them")
    return tuple(found)


def _check_resources(plan: Plan, source: Source, out: Path | None) -> Plan:
    memory, disk = _memory(plan, source), _disk(plan, source)
    available = psutil.virtual_memory().available
    whole = [m.name for m in plan.moves if m.bytes_per_weight(lean=False)]
    if memory > available and whole:
        plan = replace(plan, lean=True)
        memory = _memory(plan, source)
    if memory > available:
        hint = f", or leave out the move '{whole[0]}', which holds the whole model" if whole else ""
        raise InputError(
            f"about {gib(memory)} of memory are needed and {gib(available)} are free; "
            f"use fewer --windows or a shorter --seqlen{hint}"
        )
    if out is not None:
        anchor = next(p for p in (out, *out.absolute().parents) if p.exists())
        free = shutil.disk_usage(anchor).free
        if disk > free:
            raise InputError(f"about {gib(disk)} of disk are needed at {out} and {gib(free)} are free; choose another folder")
    return replace(plan, memory=memory, disk=disk)


def _stream_windows(plan: Plan) -> int:
    n = plan.recipe.calibration.windows
    return (n * (plan.q_calib + plan.fp_calib)) + 2 * plan.heldout + plan.rtn_windows + plan.extra


def _memory(plan: Plan, source: Source) -> int:
    """Rough peak: one block and its twin, one site's solve, two generations of streams, what the runners keep."""
    c, item = plan.recipe.calibration, plan.dtype.itemsize
    block = sum(x.in_features * x.out_features for x in plan.anatomy.linears)
    widest = max(x.in_features for x in plan.anatomy.linears)
    tallest = max(sum(x.out_features * x.in_features for x in plan.anatomy.at(s)) for s in ("qkv", "o", "gate_up", "down"))
    hessian = widest * widest * (8 * 2 + 4 if widest <= 8192 else 4 * 3) if plan.q_calib else 0
    streams = 2 * _stream_windows(plan) * c.seqlen * plan.anatomy.hidden * item
    kept = min(plan.budget, plan.q_calib * c.windows * c.seqlen * 2 * widest * item) * (1 + plan.fp_calib)
    forward = plan.needs_text * plan.batch * c.seqlen * widest * 4 * 4
    ends = sum(_bytes(source, n) for n in source.names if not n.startswith(plan.anatomy.blocks + "."))
    walking = block * item * (3 if plan.heldout else 2) + max(hessian, min(tallest, 1 << 25) * 16) + kept + forward
    # The tables around the blocks are in memory before and after the walk, twice where they are rounded.
    finishing = _finishing(plan, block, c.seqlen * (12 * plan.anatomy.hidden + 6 * widest), ends)
    learning = max(
        (_learning(plan, source, block, widest, ends, m.learn_tokens) for m in having(plan.moves, "learn")), default=0
    )
    return int(600e6) + max(streams + max(walking, finishing), learning)


def _finishing(plan: Plan, block: int, graph: int, ends: int) -> int:
    """Of moves that train the whole model: its weights, and ``graph`` numbers a block and window for the backward pass."""
    item, n = plan.dtype.itemsize, plan.anatomy.n_blocks
    per_weight = max((m.bytes_per_weight(plan.lean) for m in plan.moves), default=0)
    if not per_weight:
        return 0
    if not plan.lean:
        return n * (block * per_weight + plan.batch * graph * item) + 2 * ends
    between = plan.batch * plan.recipe.calibration.seqlen * plan.anatomy.hidden
    return n * (block * per_weight + between * item) + (2 * block + plan.batch * graph) * item + 2 * ends


def _learning(plan: Plan, source: Source, block: int, widest: int, ends: int, tokens: int) -> int:
    """Of a move that learns before the walk: the whole model, and what the backward pass needs of a step's tokens."""
    item = plan.dtype.itemsize
    graph = tokens * (24 * plan.anatomy.hidden * item + 6 * widest * (item + 4))  # rounding works in fp32
    return plan.anatomy.n_blocks * (block * item + graph) + 2 * ends + 48 * plan.anatomy.hidden**2


def _disk(plan: Plan, source: Source) -> int:
    c = plan.recipe.calibration
    # Rounded blocks are written to the work folder and then into shards, everything else into shards only.
    rounded = sum(x.bits_stored // 8 for x in plan.quantized())
    kept = sum(_bytes(source, n) for n in source.names) - sum(
        x.linear.in_features * x.linear.out_features * source.dtype.itemsize for x in plan.quantized()
    )
    streams = 2 * _stream_windows(plan) * c.seqlen * plan.anatomy.hidden * plan.dtype.itemsize
    return 2 * rounded + kept + streams


def _bytes(source: Source, name: str) -> int:
    return math.prod(source.shape(name)) * source.dtype.itemsize


def gib(size: float) -> str:
    """A size in words a person reads."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
