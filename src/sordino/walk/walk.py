"""The block walker (DESIGN section 4): streams, order, guards, resume.

    survey -> learn -> embeddings -> for each block: load; reshape; open; for each site: before, the one solver, after; close;
    guard; store; advance -> finish -> assemble

Two streams at most: the quantized one, which every block sees its own rounding through, and the full-precision one,
which is the target. A stream that nothing needs is not computed. Shapes: N windows, L tokens, D hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sordino.anatomy import SITES, Site, hidden_states
from sordino.contract import Progress, StreamName, having
from sordino.errors import SordinoError
from sordino.protect.prompt import join_prompt
from sordino.runtime.attention import KEY_MEAN
from sordino.runtime.inner import ATTENTION
from sordino.runtime.prefix import give_prefix
from sordino.walk.baseline import rtn_layer
from sordino.walk.blocks import BlockFactory
from sordino.walk.clock import Clock
from sordino.walk.context import Context, Stream, relative_error
from sordino.walk.ends import Ends
from sordino.walk.finish import open_finish, rounded_block, states, store_finish
from sordino.walk.inputs import round_site
from sordino.walk.kv import round_block_kv
from sordino.walk.learn import learn
from sordino.walk.plan import Plan
from sordino.walk.prefix import PrefixStream
from sordino.walk.solve import commit, solve_site
from sordino.walk.source import Source
from sordino.walk.store import Work, pack_block
from sordino.walk.survey import survey

# A block may be this much worse than RTN before RTN takes its place (guard a).
_GUARD = 1.01


@dataclass
class Walk:
    """One run over the blocks.

    Attributes:
        source: the full-precision model.
        plan: what to do.
        work: the work folder.
        windows: int64 [N, L], calibration windows first; None if nothing needs text.
        seed: of the moves' random numbers.
        progress: told (what, done, total).
        prompt: tokens of a system prompt, protected behind those that the moves ask for.
    """

    source: Source
    plan: Plan
    work: Work
    windows: Tensor | None
    seed: int
    progress: Progress
    prompt: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.factory = BlockFactory(self.source, self.plan.anatomy, self.plan.dtype, self.plan.inner)
        self.calls: list[dict[str, Any]] = []
        self.artifacts: dict[str, Any] = {}
        self.streams: dict[str, Stream] = {}
        self.prefix: PrefixStream | None = None
        self.clock = Clock(self.work.state.setdefault("spent", {}))

    def run(self) -> Ends:
        """Do (or continue) the walk; returns what surrounds the blocks, with the final guard's figures.

        Raises:
            SordinoError: if activations stop being finite, naming block and site.
        """
        first, last = self.plan.blocks
        if self.plan.needs_text and self.windows is not None:
            self.calls = self.factory.calls(self.windows.shape[1])
        self._prepare()
        if self.calls:
            self._open_streams(self.work.done)
        for index in range(self.work.done, last):
            self.progress("block", index, last)
            report = self._block(index) if index >= first else self._pass_through(index)
            self.work.save(done=index + 1, reports=[*self.work.state["reports"], report])
            self.work.drop_streams(index + 1)
            self.source.close()  # pages of a mapped file count as this process's memory until it is unmapped
        self.progress("block", last, last)
        for index in range(last, self.plan.anatomy.n_blocks if self._changed else last):
            self._keep(index, self._full(index))  # no stream goes through these
        ends = Ends(self.source, self.plan)  # not before: its tables would sit in memory through the whole walk
        ends.tensors |= self.work.load_final_norm()
        whole = last == self.plan.anatomy.n_blocks
        if self.plan.finishing and whole:
            self._finish(ends)
        if self.plan.heldout and whole:
            ids = self._heldout_ids()
            if self.plan.finishing:
                hidden = states(self.factory, self.plan, self.work, ends, ids, self.calls)
            else:
                hidden = self.streams["q"].x[-self.plan.heldout :]
            q_norm = self.factory.norm(self.plan.basis, ends.of(self.plan.anatomy.final_norm))
            ends.final_guard(
                self.streams["fp"].x[-self.plan.heldout :], hidden, self.streams["rtn"].x, ids,
                self.factory.norm(self.plan.basis), q_norm,
            )  # fmt: skip
        return ends

    def _finish(self, ends: Ends) -> None:
        """Let moves work on the whole rounded model, unless an interrupted run has them done."""
        assert self.windows is not None
        if self.work.finished is None:
            targets = torch.cat([self.streams["fp"].x, *self._extra_targets(ends)])
            finish = open_finish(
                self.factory, self.plan, self.work, ends, self.windows, targets,
                calls=self.calls, artifacts=self.artifacts, seed=self.seed, tell=self.progress,
            )  # fmt: skip
            for move in self.plan.finishing:
                with self.clock.on(move.name):
                    move.finish(finish)
            store_finish(finish, self.plan, self.work, self.source.dtype)
        ends.tensors |= self.work.load_ends()

    def _heldout_ids(self) -> Tensor:
        """Token ids of the held-out windows that the RTN model is followed on."""
        assert self.windows is not None
        first = self.plan.recipe.calibration.windows
        return self.windows[first : first + self.plan.rtn_windows]

    def _prepare(self) -> None:
        """Let moves survey the full-precision model and learn from it, and open the prefix that they ask for."""
        tokens: tuple[int, ...] = ()
        if having(self.plan.moves, "survey"):
            assert self.windows is not None
            ends, windows = Ends(self.source, self.plan), self.windows[: self.plan.recipe.calibration.windows]
            with self.clock.on("surveys"):
                tokens = survey(self.source, self.plan, self.factory, ends, windows, self.calls, self.artifacts, self.progress)
        if self.windows is not None and having(self.plan.moves, "learn"):
            rest = (self.work, self.windows, self.artifacts, self.seed, self.progress)
            with self.clock.on("learning"):
                self.plan = learn(self.source, self.plan, self.factory, *rest)
        if tokens := join_prompt(tokens, self.prompt):
            self.prefix = PrefixStream(tokens, self.factory, self.work, Ends(self.source, self.plan), self.source.dtype)

    @property
    def _changed(self) -> bool:
        """Whether blocks that are not rounded differ from the source's all the same."""
        return self.prefix is not None or bool(having(self.plan.moves, "reshape"))

    def _keep(self, index: int, layer: nn.Module) -> None:
        """Store a block that is not rounded, where it is not the source's own."""
        if self._changed:
            self.work.save_block(index, pack_block(layer, {}, self.source.dtype))

    def _extra_targets(self, ends: Ends) -> list[Tensor]:
        """Final full-precision hidden states of the windows that only the finish stage looks at, or nothing."""
        assert self.windows is not None
        windows = self.windows[self.plan.recipe.calibration.windows + self.plan.heldout :]
        if not len(windows):
            return []
        shape = (*windows.shape, self._shape("fp")[2])
        x = self.work.create("extra", self.plan.anatomy.n_blocks, shape, self.plan.dtype)
        spans = [slice(i, i + self.plan.batch) for i in range(0, len(windows), self.plan.batch)]
        self._embed(x, windows, ends, exact=True)
        for index in range(self.plan.anatomy.n_blocks):
            self.progress("targets", index, self.plan.anatomy.n_blocks)
            layer = self._full(index)
            with torch.no_grad():
                for span in spans:
                    x[span] = hidden_states(layer(x[span], **self.calls[index]))
            self.source.close()
        return [x]

    def _full(self, index: int) -> nn.Module:
        """A block in full precision, reshaped as the moves want it."""
        layer = self.factory.load(index)
        for move in self.plan.moves:
            move.reshape(layer, index, self.plan.anatomy, self.artifacts)
        if self.source.dtype != self.plan.dtype:  # what is not rounded is stored in the former
            means = [b for name, b in layer.named_buffers() if name.endswith(KEY_MEAN)]
            for kept in (*layer.parameters(), *means):
                kept.data = kept.data.to(self.source.dtype).to(self.plan.dtype)
        if self.prefix is not None:
            give_prefix(layer.get_submodule(ATTENTION), *self.prefix.at(index, layer))
        return layer

    # Streams

    def _layout(self) -> dict[str, tuple[int, int]]:
        """Stream name -> (calibration windows, all windows)."""
        n, plan = self.plan.recipe.calibration.windows, self.plan
        layout = {}
        if plan.q_calib or plan.heldout:
            layout["q"] = (n * plan.q_calib, n * plan.q_calib + plan.heldout)
        if plan.fp_calib or plan.heldout:
            layout["fp"] = (n * plan.fp_calib, n * plan.fp_calib + plan.heldout)
        if plan.rtn_windows:
            layout["rtn"] = (0, plan.rtn_windows)
        return layout

    def _shape(self, name: str) -> tuple[int, int, int]:
        assert self.windows is not None
        config: Any = self.source.config
        return self._layout()[name][1], self.windows.shape[1], config.hidden_size

    def _open_streams(self, index: int) -> None:
        """Open what enters block ``index``; at block 0 it is made from the embeddings."""
        assert self.windows is not None
        ends = None if index else Ends(self.source, self.plan)
        for name, (calib, total) in self._layout().items():
            if ends is None:
                x = self.work.open(name, index, self._shape(name), self.plan.dtype)
            else:
                x = self.work.create(name, 0, self._shape(name), self.plan.dtype)
                heldout = self.windows[self.plan.recipe.calibration.windows :]  # total counts the first ones of them
                ids = torch.cat([self.windows[:calib], heldout[: total - calib]])
                self._embed(x, ids, ends, exact=name == "fp")
            self.streams[name] = Stream(x, calib)

    def _embed(self, x: Tensor, ids: Tensor, ends: Ends, exact: bool) -> None:
        """Fill a stream [N, L, D] with the embeddings of token ids [N, L]."""
        for i in range(0, len(ids), self.plan.batch):
            x[i : i + self.plan.batch] = ends.embed(ids[i : i + self.plan.batch], exact)

    def _next(self, name: str, index: int) -> Tensor:
        return self.work.create(name, index + 1, self._shape(name), self.plan.dtype)

    # One block

    def _pass_through(self, index: int) -> dict[str, Any]:
        """A block before the chosen range: streams go through it in full precision."""
        layer = self._full(index)
        self._keep(index, layer)
        context = self._context(index, layer, layer)
        for name in list(self.streams):
            self._advance(context, name, layer)
        return {"block": index, "left": "full precision"}

    def _context(self, index: int, fp: nn.Module, q: nn.Module) -> Context:
        names: tuple[StreamName, ...] = ("fp", "q")
        plan, last = self.plan, index == self.plan.anatomy.n_blocks - 1
        return Context(
            index=index,
            last=last,
            anatomy=plan.anatomy,
            artifacts=self.artifacts,
            fp=fp,
            q=q,
            streams={n: self.streams[n] for n in names if n in self.streams},
            call=self.calls[index] if self.calls else {},
            batch=plan.batch,
            budget=plan.budget,
            seed=self.seed,
            stored=self.source.dtype,
            norm=self.factory.norm(plan.basis) if last and plan.final_bias else None,
        )

    def _block(self, index: int) -> dict[str, Any]:
        """Round one block, guard it, store it, and send the streams through it."""
        q = self._full(index)
        # Twin and block share their tensors (nothing edits them in place) unless a move might.
        fp = self._full(index) if self.plan.moves else self.factory.assemble(index, dict(q.state_dict()))
        ctx = self._context(index, fp, q)
        report: dict[str, Any] = {"block": index, "linears": {}}
        self._hooks("open", ctx)
        for site in SITES:
            with self.clock.on("rounding"):
                if site == "o" and self.plan.recipe.format.kv.rounded:
                    report |= {"kv": note} if (note := round_block_kv(ctx, self.plan.recipe.format.kv)) else {}
                self._round_inputs(ctx, site, report)
            self._hooks("before", ctx, site)
            with self.clock.on("rounding"):
                solve_site(ctx, self.plan, site, report["linears"])
            self._hooks("after", ctx, site)
        if "fp" in self.streams:
            self._advance(ctx, "fp", fp)
            ctx.following = self.streams["fp"].x
        ctx.keep_scales()
        self._hooks("close", ctx)
        following = self._next("q", index) if "q" in self.streams else None
        if self.plan.heldout and following is not None:
            with self.clock.on("guards"):
                report |= self._guard(ctx, following)
        report |= {"refused_moves" if "fallback" in report else "moves": ctx.notes} if ctx.notes else {}
        self._store(ctx)
        if following is not None:
            if not ctx.last:  # after the last block only the held-out windows are looked at
                for span, y in ctx.run("q", "q", "calib"):
                    following[span] = y
            self._step("q", following, index)
        return report

    def _hooks(self, hook: Literal["open", "before", "after", "close"], *args: Any) -> None:
        """One hook of every move, in recipe order."""
        for move in self.plan.moves:
            with self.clock.on(move.name):
                getattr(move, hook)(*args)

    def _round_inputs(self, ctx: Context, site: Site, report: dict[str, Any]) -> None:
        """Let the rounded linears of a site round their input, if the format says so."""
        fmt = self.plan.recipe.format.activations
        linears = [p for p in self.plan.linears[ctx.index] if p.linear.site == site and p.group is not None]
        if fmt.rounded and linears:
            note = round_site(ctx, site, [p.linear.name for p in linears], fmt, linears[0].inputs, linears[0].kept)
            report.setdefault("inputs", {}).update({site: note} if note else {})

    # Guard and storage

    def _guard(self, ctx: Context, following: Tensor) -> dict[str, Any]:
        """Guard (a): the block's held-out error against the same block rounded by RTN; also follow the RTN model.

        The full-precision stream is already past this block; the held-out part of the quantized one is filled here.
        """
        x, (start, stop) = ctx.streams["q"].x, ctx.streams["q"].span("heldout")
        target = self.streams["fp"].x[self.streams["fp"].calib :]

        def error_of(layer: nn.Module, out: Tensor | None) -> float:
            errors = []
            for i in range(start, stop, ctx.batch):
                y = self._forward(ctx, layer, x[i : min(i + ctx.batch, stop)])
                errors.append(relative_error(y, target[i - start : i - start + y.shape[0]]))
                if out is not None:
                    out[i : i + y.shape[0]] = y
            return float(torch.cat(errors).median())

        ours = error_of(ctx.q, following)
        rtn, layer = rtn_layer(self.factory, self.plan, ctx)
        report: dict[str, Any] = {"error": ours, "rtn_error": error_of(layer, None)}
        worse = not ours <= _GUARD * report["rtn_error"]  # written so that a NaN falls back too
        if worse and self.plan.recipe.guard == "on":
            ctx.reset()
            report["linears"] = {name: commit(ctx, name, rounded) for name, rounded in rtn.items()}
            report |= {"fallback": "rtn", "error": error_of(ctx.q, following), "refused_error": ours}
        self._advance(ctx, "rtn", layer)
        return report

    def _store(self, ctx: Context) -> None:
        """Write the block, read it back, and make sure that the stored bytes are the block that calibration saw."""
        self.work.save_block(ctx.index, pack_block(ctx.q, ctx.solved, self.source.dtype))
        if ctx.norm is not None:
            path = self.plan.anatomy.final_norm
            self.work.save_final_norm({f"{path}.{n}": p.detach().to(self.source.dtype) for n, p in ctx.norm.named_parameters()})
        if any(m.needs_latent for m in self.plan.finishing):
            self.work.save_latents(ctx.index, ctx.solved)
        back, _ = rounded_block(self.factory, self.plan, ctx.index, self.work.load_block(ctx.index))
        stored = back.state_dict()
        for name, tensor in ctx.q.state_dict().items():
            if not torch.equal(stored[name].to(tensor.dtype), tensor):
                name = self.plan.anatomy.full_name(ctx.index, name)
                raise SordinoError(f"{name}: the stored bytes are not what was calibrated")

    def _advance(self, ctx: Context, name: str, layer: nn.Module) -> None:
        """Send a whole stream through a block, into a new file."""
        stream, following = self.streams[name], self._next(name, ctx.index)
        start = self._first_used(name, ctx.index)
        for i in range(start, stream.x.shape[0], ctx.batch):
            span = slice(i, min(i + ctx.batch, stream.x.shape[0]))
            following[span] = self._output(ctx, name, layer, span)
        self._step(name, following, ctx.index)

    def _first_used(self, name: str, index: int) -> int:
        """First window that anything still looks at after a block: after the last one, the held-out ones and targets."""
        last = index == self.plan.anatomy.n_blocks - 1
        return self.streams[name].calib if last and not (name == "fp" and self.plan.targets) else 0

    def _output(self, ctx: Context, name: str, layer: nn.Module, span: slice) -> Tensor:
        """Output of a layer for some windows; the full-precision block starts from what its runner kept."""
        if name == "fp" and layer is ctx.fp and "fp" in ctx.streams:
            return next(ctx.runner("fp", "fp").outputs(span.start, span.stop))[1]
        return self._forward(ctx, layer, self.streams[name].x[span])

    def _forward(self, ctx: Context, layer: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            return hidden_states(layer(x, **ctx.call))

    def _step(self, name: str, following: Tensor, index: int) -> None:
        """Make ``following`` the stream, once it is known to be finite."""
        stream, start = self.streams[name], self._first_used(name, index)
        # A sum (kept in fp32 inside) is not finite exactly where an entry is not, and costs one pass.
        if not math.isfinite(float(following[start:].sum())):
            raise SordinoError(f"block {index}: the {name} stream is not finite after it")
        self.streams[name] = Stream(following, stream.calib)
