"""The finish stage: the whole rounded model at once, for moves that train it end to end (contract.FinishContext).

It starts from the stored blocks and ends in a second generation of them, written beside the first; a killed finish
starts again from the first. Shapes: N windows, L tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sordino.anatomy import Anatomy, hidden_states
from sordino.contract import Progress
from sordino.numerics.kv import KvGrid
from sordino.rounding import Rounded
from sordino.runtime.attention import KEY_SCALE, VALUE_SCALE, round_kv
from sordino.runtime.inner import ATTENTION
from sordino.runtime.inputs import round_inputs
from sordino.runtime.modules import ORDER, SCALE, QuantLinear
from sordino.walk.blocks import BlockFactory
from sordino.walk.ends import Ends
from sordino.walk.linears import input_grid
from sordino.walk.plan import Plan
from sordino.walk.seeds import seeded
from sordino.walk.store import Work, pack_block

_OWN = (".weight_", ".kept_", ".side_", ".column_")  # buffers of a quantized linear


@dataclass
class Finish:
    """See :class:`sordino.contract.FinishContext`."""

    anatomy: Anatomy
    artifacts: dict[str, Any]
    seed: int
    blocks: list[nn.Module]
    solved: list[dict[str, Rounded]]
    calls: list[dict[str, Any]]
    around: Ends
    norm: nn.Module
    exact_norm: nn.Module
    stored: torch.dtype
    windows: Tensor
    calib: int
    train: Tensor
    heldout: Tensor
    targets: Tensor
    tell: Progress
    lean: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    def progress(self, what: str, done: int, total: int) -> None:
        """Pass it on."""
        self.tell(what, done, total)

    def rng(self, move: str) -> torch.Generator:
        """Generator seeded by (seed, move)."""
        return seeded(self.seed, "finish", move)

    def hidden(self, windows: Tensor) -> Tensor:
        """What the rounded model hands to its final norm, for window numbers [B] -> [B, L, D]."""
        x = self.around.embed(self.windows[windows], exact=False)
        for block, call in zip(self.blocks, self.calls, strict=True):
            if self.lean and torch.is_grad_enabled():
                x = checkpoint(_through, block, x, call, use_reentrant=False, preserve_rng_state=False)
            else:
                x = _through(block, x, call)
        return x

    def heads(self) -> tuple[Tensor, Tensor]:
        """Output tables [V, D] in the compute dtype: the rounded model's, and the full-precision one."""
        return self.around.heads()

    def commit(self, block: int, linear: str, rounded: Rounded) -> None:
        """Put a rounded weight into a block."""
        module: Any = self.blocks[block].get_submodule(linear)
        self.solved[block][linear] = rounded
        if not module.weight.is_meta:
            module.weight = nn.Parameter(rounded.values().to(module.weight.dtype), requires_grad=False)


def _through(block: nn.Module, x: Tensor, call: dict[str, Any]) -> Tensor:
    return hidden_states(block(x, **call))


def rounded_block(
    factory: BlockFactory, plan: Plan, index: int, stored: dict[str, Tensor], lean: bool = False
) -> tuple[nn.Module, dict[str, Rounded]]:
    """A block as its stored bytes say: plain linears that hold the rounded values, and the rounded form of each.

    ``lean`` leaves out the values that parameter spaces (repair/spaces.py) make of the codes.
    """
    plain = {k: v for k, v in stored.items() if v.is_floating_point() and not any(part in k for part in _OWN)}
    orders = {k: v for k, v in stored.items() if k.endswith(f".{ORDER}")}
    tensors = orders | {k: v if k.endswith(f".{SCALE}") else v.to(plan.dtype) for k, v in plain.items()}
    solved, inputs = {}, plan.recipe.format.activations
    for p in plan.linears[index]:
        if p.group is None:
            continue
        module = QuantLinear(
            p.linear.in_features, p.linear.out_features, False, p.format.bits, p.group, p.format.symmetric, p.format.grid,
            kept=p.kept, side=p.side, column=p.column,
        )  # fmt: skip
        of = tuple(f"{p.linear.name}{part}" for part in _OWN)
        own = {k.rpartition(".")[2]: v for k, v in stored.items() if k.startswith(of)}
        module.load_state_dict(own, assign=True)
        scale, zero = module.weight_scale.float(), module.zeros().float()
        solved[p.linear.name] = Rounded(
            module.codes(), scale, zero, p.format.bits, p.group, module.symmetric, grid=p.format.grid,
            kept=module.kept_columns(), side=module.pair(), column=module.column(),
        )  # fmt: skip
        if lean and p.format.grid == "affine":
            weight = torch.empty(module.out_features, module.in_features, dtype=plan.dtype, device="meta")
        else:
            weight = module.dequantize(plan.dtype)
        tensors[f"{p.linear.name}.weight"] = weight
    block = factory.assemble(index, tensors)
    for p in plan.linears[index]:
        if inputs.rounded and p.group is not None:
            round_inputs(block.get_submodule(p.linear.name), input_grid(inputs, p.inputs), kept=p.kept)
    kv = plan.recipe.format.kv
    if kv.rounded and plan.blocks[0] <= index < plan.blocks[1]:
        attention = block.get_submodule(ATTENTION)
        scales = attention.get_buffer(KEY_SCALE), attention.get_buffer(VALUE_SCALE)
        round_kv(attention, KvGrid(kv.bits, kv.symmetric, kv.static), *scales)
    return block, solved


def open_finish(
    factory: BlockFactory, plan: Plan, work: Work, ends: Ends, windows: Tensor, targets: Tensor, **rest: Any
) -> Finish:
    """Load the whole rounded model from the work folder."""
    blocks, solved = [], []
    for i in range(plan.anatomy.n_blocks):
        block, own = _load(factory, plan, work, i, plan.lean)
        for name, latent in work.load_latents(i).items():
            own[name].latent = latent.float()
        blocks.append(block)
        solved.append(own)
    norm = factory.norm(plan.basis, ends.of(plan.anatomy.final_norm))
    calib, numbers = plan.recipe.calibration.windows, torch.arange(len(windows))
    first, heldout, extra = numbers.tensor_split([calib, calib + plan.heldout])
    return Finish(
        anatomy=plan.anatomy, blocks=blocks, solved=solved, around=ends, norm=norm,
        exact_norm=factory.norm(plan.basis), stored=plan.stored, windows=windows, calib=calib,
        train=torch.cat([first, extra]), heldout=heldout, targets=targets, lean=plan.lean, **rest,
    )  # fmt: skip


def _load(factory: BlockFactory, plan: Plan, work: Work, index: int, lean: bool) -> tuple[nn.Module, dict[str, Rounded]]:
    """A block from the work folder (one that was left alone from the source)."""
    if work.left_alone(index, plan.blocks):
        return factory.load(index), {}
    return rounded_block(factory, plan, index, work.load_block(index), lean)


@torch.no_grad()
def states(factory: BlockFactory, plan: Plan, work: Work, ends: Ends, windows: Tensor, calls: list[dict[str, Any]]) -> Tensor:
    """What the stored model makes of windows [N, L], block by block: [N, L, D] before its final norm."""
    batches = [ends.embed(w, exact=False) for w in windows.split(plan.batch)]
    for i, call in enumerate(calls):
        block = _load(factory, plan, work, i, lean=False)[0]
        batches = [_through(block, x, call) for x in batches]
    return torch.cat(batches)


def store_finish(finish: Finish, plan: Plan, work: Work, stored_dtype: torch.dtype) -> None:
    """Write the second generation, and mark it as the valid one."""
    path = plan.anatomy.final_norm
    for name, parameter in finish.norm.named_parameters():
        finish.around.tensors[f"{path}.{name}"] = parameter.detach().to(stored_dtype)
    for i in range(*plan.blocks):
        work.save_block(i, pack_block(finish.blocks[i], finish.solved[i], stored_dtype), finished=True)
    work.save_ends(finish.around.tensors)
    work.save(finished=finish.notes)
