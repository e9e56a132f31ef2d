"""Moves, and what they see (DESIGN section 4); what is rounded and by whom is in rounding.py.

``walk/`` implements the contexts; moves live one file each in ``protect/``, ``reshape/`` and ``repair/``. Nobody here
knows a file or a model. Shapes: C = in_features, L = window length, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from sordino.anatomy import Anatomy, Site
from sordino.numerics.basis import Basis
from sordino.recipe import Format
from sordino.rounding import Rounded, Stats

StreamName = Literal["fp", "q"]
SiteInputs = Callable[[Site], Iterator[tuple[slice, Tensor]]]  # as BlockContext.inputs gives them
Split = Literal["calib", "heldout"]
Progress = Callable[[str, int, int], None]  # told (what, done, total)


class ParameterSpace(Protocol):
    """A set of parameters of a block (or model) that can be trained; attached when made, at step 0 without effect."""

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for a torch optimizer."""
        ...

    def collect(self) -> None:
        """Called between the backward pass and the optimizer step."""
        ...

    def settle(self) -> None:
        """Called after every optimizer step."""
        ...

    def fold(self) -> dict[str, Rounded]:
        """End training: leave the block as it was made up before, return the linears that changed."""
        ...


class BlockContext(Protocol):
    """What a move sees of the block that is being quantized."""

    index: int
    anatomy: Anatomy
    artifacts: dict[str, Any]  # what the surveys found, by the moves' titles
    fp: nn.Module  # the reshaped full-precision twin, read-only
    q: nn.Module  # the transformers layer being quantized
    solved: dict[str, Rounded]  # what the solver made of each linear, by name inside the block
    notes: dict[str, Any]  # what moves want to have said in the block's report, by the moves' titles
    stored: torch.dtype  # dtype that the checkpoint has for what is not rounded
    call: dict[str, Any]  # keyword arguments (masks, rotary angles) of the block for these windows
    norm: nn.Module | None  # the final norm, beside the last block only

    def rng(self, move: str) -> torch.Generator:
        """Random numbers that depend on (seed, block, move) only."""
        ...

    def run(self, which: StreamName, stream: StreamName, split: Split = "calib") -> Iterator[tuple[slice, Tensor]]:
        """Run the fp or the q block on a stream; yields (windows, output [B, L, D]) batch by batch."""
        ...

    def inputs(
        self, which: StreamName, site: Site, split: Split = "calib", stream: StreamName | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Inputs of a site of a block as it is now, on its own stream or a given one; [B, L, C] batch by batch."""
        ...

    def stats(self, site: Site, kinds: frozenset[str], cap: float | None = None) -> Stats:
        """Sums over the calibration tokens, of the block as it is now; see :attr:`sordino.rounding.Solver.cap`."""
        ...

    def stream(self, name: StreamName, split: Split = "calib") -> Tensor:
        """What enters the block on a stream, [N, L, D]."""
        ...

    def target(self, split: Split = "calib") -> Tensor:
        """Output of the full-precision block on the full-precision stream, [N, L, D]; only in :meth:`Move.close`."""
        ...

    def commit(self, linear: str, rounded: Rounded) -> None:
        """Put a rounded weight into the q block."""
        ...

    def shift(self, module: str, bias: Tensor) -> None:
        """Add [out] to the bias of a norm or linear of the q block, which gets one if it has none."""
        ...

    def unshift(self, module: str) -> None:
        """Take the bias of a norm or linear of the q block away."""
        ...

    def shift_final(self, bias: Tensor) -> None:
        """Add [D] to the bias of the final norm, which gets one if it has none; only beside the last block."""
        ...

    def touch(self, site: Site) -> None:
        """Say that something at or before ``site`` changed by other means than :meth:`commit`."""
        ...

    def error(self, split: Split = "heldout", exact: StreamName = "fp") -> float:
        """Median over windows of the relative block error against the full-precision block on the stream ``exact``."""
        ...

    def snapshot(self) -> Any:
        """State of the q block, for :meth:`restore`."""
        ...

    def restore(self, state: Any) -> None:
        """Put back what :meth:`snapshot` took."""
        ...


class FinishContext(Protocol):
    """What a move sees of the whole rounded model after the walk. It may be trained in place, and must be put back."""

    anatomy: Anatomy
    artifacts: dict[str, Any]
    blocks: list[nn.Module]  # decoder layers holding the rounded values; where memory is short, meta tensors in their place
    solved: list[dict[str, Rounded]]  # per block, the rounded linears by name inside it
    norm: nn.Module  # the final norm
    exact_norm: nn.Module  # the full-precision model's, which stays as it is
    stored: torch.dtype  # dtype that the checkpoint has for what is not rounded
    calib: int  # how many windows the walk calibrated on; they come first
    train: Tensor  # numbers of the windows to train on: the walk's, then those that moves asked for beyond them
    heldout: Tensor  # numbers of the windows to judge by
    targets: Tensor  # final hidden states of the full-precision model, [N, L, D]
    notes: dict[str, Any]

    def progress(self, what: str, done: int, total: int) -> None:
        """Say how far work has come that takes longer than seconds."""
        ...

    def rng(self, move: str) -> torch.Generator:
        """Random numbers that depend on (seed, move) only."""
        ...

    def hidden(self, windows: Tensor) -> Tensor:
        """What the rounded model hands to its final norm, for window numbers [B] -> [B, L, D]."""
        ...

    def heads(self) -> tuple[Tensor, Tensor]:
        """Output tables [V, D] in the compute dtype: the rounded model's, and the full-precision one."""
        ...

    def commit(self, block: int, linear: str, rounded: Rounded) -> None:
        """Put a rounded weight into a block."""
        ...


class LearnContext(Protocol):
    """What a move sees of the full-precision model before the walk: all of it, reshaped by the moves that stand before."""

    anatomy: Anatomy
    format: Format
    blocks: list[nn.Module]  # frozen decoder layers, the move's to hang hooks on
    rounded: range  # numbers of the blocks that will be rounded
    groups: dict[Site, int | None]  # channels of a site's input that share a scale, None for all of a token
    train: Tensor  # token ids of the calibration windows, [N, L]
    heldout: Tensor  # of the held-out ones, likewise; empty where guards are off
    notes: dict[str, Any]

    def progress(self, what: str, done: int, total: int) -> None:
        """Say how far work has come."""
        ...

    def rng(self, move: str) -> torch.Generator:
        """Random numbers that depend on (seed, move) only."""
        ...

    def loss(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy of token ids [B, L], in nats a token, with gradients where they are on."""
        ...


class Move:
    """A move: every hook is optional, so the base class does nothing.

    Hooks run in the order of the methods below; inside one hook, moves run in recipe order.
    """

    name = "move"
    turn = 1  # which of the recipe's moves of this name it is
    needs_fp_stream = False  # ask for the full-precision stream on the calibration windows
    needs_latent = False  # ask the solvers to keep what they rounded

    @property
    def title(self) -> str:
        """What its notes stand under: its name, numbered from the second one of a recipe."""
        return self.name if self.turn == 1 else f"{self.name} {self.turn}"

    def bytes_per_weight(self, lean: bool) -> int:
        """Memory that finish takes for every block weight of the whole model, in bytes; 0 if it does not load it.

        ``lean``: blocks have no values of their rounded weights, and what the backward pass needs is computed twice.
        """
        return 0

    survey_windows: int | None = None  # calibration windows that the survey is content with; None looks at all
    reshapes_first = False  # what its survey found is of blocks that no move before it has reshaped
    survey_keys = False  # wants the means of keys: artifacts["keys"], fp64 [K, d], of the block that is seen
    before_inner = False  # reshape wants channels inside the blocks as the model has them, not yet turned
    reshapes_alone = False  # what its survey found is of blocks that no other move reshapes
    kept = 0  # input channels of every rounded linear, its last ones, that stay at 8 bits
    side = 0  # rank of a pair beside every rounded linear
    smooths = False  # changes the size of input channels of rounded linears, which a pair beside them would not follow
    final_bias = False  # gives the final norm a bias

    def check(self, fmt: Format, anatomy: Anatomy, target: str | None) -> None:
        """Preflight: raise InputError where the format or the export target cannot carry this move."""

    def survey(self, index: int, block: nn.Module, inputs: SiteInputs, artifacts: dict[str, Any]) -> None:
        """See one full-precision block in a pass before the walk, which is made if a move has this hook.

        Findings go into ``artifacts``, whose "ids" are the windows [N, L].
        """

    def prefix(self, artifacts: dict[str, Any], first: int | None) -> tuple[int, ...]:
        """Tokens whose keys and values stand before every text in full precision; after the survey.

        ``first`` is the token that begins a text, if the model has one.
        """
        return ()

    @property
    def learn_tokens(self) -> int:
        """Tokens of one step of :meth:`learn`, whose activations are in memory together with the whole model."""
        return 0

    def learn(self, ctx: LearnContext) -> dict[str, Tensor]:
        """Before the walk, on the whole model: what :meth:`reshape` will find in the artifacts under the move's name.

        A "basis", float64 [D, D], turns the residual stream further; a move before this one must have turned it already.
        An empty result leaves everything as it is.
        """
        return {}

    def basis(self, hidden: int) -> Basis | None:
        """Orthogonal basis of the residual stream that :meth:`reshape` moves the blocks to, or None to leave it."""
        return None

    def inner(self) -> tuple[str, ...]:
        """What :meth:`reshape` has done inside a block: turns of "values", "keys", "down"; "key-means"; "channels" in order."""
        return ()

    def biases(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Modules of a block that get a bias which the family does not have."""
        return ()

    def reshape(self, block: nn.Module, index: int, anatomy: Anatomy, artifacts: dict[str, Any]) -> None:
        """Edit a freshly loaded block without changing its function; twin and block alike."""

    def open(self, ctx: BlockContext) -> None:
        """Before the first site."""

    def before(self, ctx: BlockContext, site: Site) -> None:
        """Before the linears of a site are rounded."""

    def after(self, ctx: BlockContext, site: Site) -> None:
        """After the linears of a site were rounded."""

    def close(self, ctx: BlockContext) -> None:
        """After the last site, before the guard."""

    def finish_windows(self, calib: int) -> int:
        """Calibration windows that finish wants where the walk has ``calib`` and the text so many; 0 is content with those."""
        return 0

    def finish(self, ctx: FinishContext) -> None:
        """After the walk: may train the whole rounded model, or edit what surrounds the blocks."""


def having(moves: Iterable[Move], hook: str) -> list[Move]:
    """The moves that have something to do at a hook: those that do not leave it as :class:`Move` has it."""
    return [m for m in moves if getattr(type(m), hook) is not getattr(Move, hook)]
