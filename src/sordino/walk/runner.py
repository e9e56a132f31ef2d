"""Runs one decoder block over a stream and hands out the inputs of its linears, without computing anything twice.

The block is transformers' own layer. To see the input of a site, a hook on its first linear stops the forward there.
What attention and the MLP feed to their last linear is kept (if it fits the budget), so that later passes start from
it: one quantized block costs little more than one forward, although every site is looked at separately.
Shapes: N windows, B windows of a batch, L tokens, D hidden size, C input features of a site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sordino.anatomy import SITES, Anatomy, Site, hidden_states
from sordino.runtime.inputs import turned


class _Reached(Exception):
    """Carries the input of a site out of a forward that need not go on."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value


class Runner:
    """One block on one stream.

    Attributes:
        layer: the decoder layer.
        x: stream [N, L, D].
        batch: windows of a batch.
        kept: inputs of "o" and "down" that later passes start from, [N', L, C] for the first N' windows, before any
            online rotation.
        attended: what attention adds to the stream, by first window of a batch; only beside a kept input of "o".
    """

    def __init__(self, layer: nn.Module, x: Tensor, call: dict[str, Any], anatomy: Anatomy, batch: int, budget: int):
        self.layer, self.x, self.call, self.anatomy, self.batch = layer, x, call, anatomy, batch
        self.budget = budget
        self.kept: dict[Site, Tensor] = {}
        self.attended: dict[int, Tensor] = {}

    def touch(self, site: Site) -> None:
        """Forget what depends on a linear of ``site``."""
        late = SITES[SITES.index(site) + 1 :]
        self.kept = {s: t for s, t in self.kept.items() if s not in late}
        if site in ("qkv", "o"):
            self.attended = {}

    @torch.no_grad()
    def inputs(self, site: Site, start: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
        """Inputs of a site for the windows ``start … stop``: (windows, [B, L, C]) batch by batch."""
        first = self.layer.get_submodule(self.anatomy.at(site)[0].name)
        if self._covers(site, start, stop):
            for span in self._spans(start, stop):
                yield span, turned(first, self.kept[site][span])
            return
        keep = self._keep(site, start, stop)
        for span in self._spans(start, stop):
            value = self._until(first, site, span)
            if keep is not None:
                keep[span] = value
            yield span, turned(first, value)
        if keep is not None:
            self.kept[site] = keep

    def hold(self, site: Site) -> None:
        """Keep the inputs of "o" or "down" of all windows, if there is room: later passes start from them."""
        if self._keep(site, 0, len(self.x)) is not None:
            for _ in self.inputs(site, 0, len(self.x)):
                pass

    @torch.no_grad()
    def outputs(self, start: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
        """Outputs of the block: (windows, [B, L, D]) batch by batch."""
        for span in self._spans(start, stop):
            yield span, self._forward(span)

    def _spans(self, start: int, stop: int) -> Iterator[slice]:
        return (slice(i, min(i + self.batch, stop)) for i in range(start, stop, self.batch))

    def _covers(self, site: Site, start: int, stop: int) -> bool:
        return site in self.kept and start >= 0 and stop <= self.kept[site].shape[0]

    def _keep(self, site: Site, start: int, stop: int) -> Tensor | None:
        if site not in ("o", "down") or start != 0:
            return None
        shape = (stop, self.x.shape[1], self.anatomy.at(site)[0].in_features)
        used = sum(t.nbytes for s, t in self.kept.items() if s != site)
        if used + shape[0] * shape[1] * shape[2] * self.x.element_size() > self.budget:
            return None
        return torch.empty(shape, dtype=self.x.dtype)

    def _until(self, module: nn.Module, site: Site, span: slice) -> Tensor:
        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Reached(args[0])

        hook = module.register_forward_pre_hook(stop, prepend=True)  # before the input is turned and rounded
        try:
            self._forward(span, SITES.index(site))
        except _Reached as reached:
            return reached.value
        finally:
            hook.remove()
        raise RuntimeError("the block never called the linear that was waited for")

    def _forward(self, span: slice, until: int = len(SITES)) -> Tensor:
        with self._shortcuts(span, until):
            return hidden_states(self.layer(self.x[span], **self.call))

    @contextmanager
    def _shortcuts(self, span: slice, until: int) -> Iterator[None]:
        """Let attention and MLP start from what was kept of their last linear's input.

        Only for sites before number ``until``: a shortcut leaves out every linear before its own.
        """
        replaced = []
        for site, parent, tail in (("o", "self_attn", lambda y: (y, None)), ("down", "mlp", lambda y: y)):
            if SITES.index(site) >= until or not self._covers(site, span.start, span.stop):  # type: ignore[arg-type]
                continue
            module = self.layer.get_submodule(parent)
            module.forward = self._tail(site, span, tail)  # type: ignore[arg-type]
            replaced.append(module)
        try:
            yield
        finally:
            for module in replaced:
                del module.forward

    def _tail(self, site: Site, span: slice, shape: Callable[[Tensor], Any]) -> Callable[..., Any]:
        linear = self.layer.get_submodule(self.anatomy.at(site)[0].name)

        def tail(*_: Any, **__: Any) -> Any:
            if site != "o":
                return shape(linear(self.kept[site][span]))
            known = self.attended.get(span.start)
            if known is None or known.shape[0] != span.stop - span.start:
                known = self.attended[span.start] = linear(self.kept[site][span])
            return shape(known)

        return tail
