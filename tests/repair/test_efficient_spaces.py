"""All parameter-efficient spaces at once, on blocks of both hosts (spec section 11, points 1, 4 and 7)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sordino
from sordino.anatomy import hidden_states
from sordino.contract import BlockContext
from sordino.moves import MOVES
from sordino.recipe import load_recipe
from sordino.repair.tune import Tune
from tiny import make_tiny

HOSTS = {
    "quarot-w3a3": '{move="rotate", size="full"}, {move="rotate-inner"}',
    "atom-w3a3": '{move="channels", count=4}',
}
EVERYTHING: dict[str, Any] = {
    "weights": 0.0,
    "scales": 0.0,
    "inputs": 0.0,
    "gains": 0.0,
    "clips": 0.01,
    "rank": 4,
    "smooth": 0.01,
}
seen: list[dict[str, Any]] = []


class Look(Tune):
    """Attaches all spaces, moves every parameter, folds: instead of training."""

    name = "look"

    def close(self, ctx: BlockContext) -> None:
        x = ctx.stream("q")[:2]

        def output() -> torch.Tensor:
            return hidden_states(ctx.q(x, **ctx.call))

        before = output().detach()
        spaces = self._spaces(ctx)
        with torch.enable_grad():
            start = output()
            (start * torch.randn(start.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        for space in spaces:
            space.collect()
        parameters = [p for space in spaces for group in space.groups() for p in group["params"]]
        reached = sum(p.grad is not None and bool(p.grad.any()) for p in parameters)
        rng = torch.Generator().manual_seed(2)
        for p in parameters:
            p.data += 0.05 * torch.randn(p.shape, generator=rng)
        for space in spaces:
            space.settle()
        trained = output().detach()
        for space in spaces:
            for linear, rounded in space.fold().items():
                ctx.commit(linear, rounded)
        ctx.touch("qkv")
        note = {"before": before, "start": start.detach(), "trained": trained, "folded": output().detach()}
        seen.append(note | {"reached": reached, "parameters": len(parameters)})


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("family", "start"), [("llama", "error"), ("qwen2", "error"), ("llama", "random")])
def test_step_0_is_the_host_and_what_is_folded_is_what_was_trained(
    host: str, family: str, start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MOVES, "look", Look)
    seen.clear()
    model = make_tiny(tmp_path / "model", family, layers=2)
    options = ", ".join(f"{k}={v}" for k, v in EVERYTHING.items()) + f', start="{start}"'
    made = load_recipe(host, [f'moves=[{HOSTS[host]}, {{move="look", {options}}}]', "guard=off"])
    sordino.quantize(str(model), made, tmp_path / "out", windows=8, seqlen=32)
    assert len(seen) == 2
    for note in seen:
        size = float(note["before"].norm())
        assert float((note["start"] - note["before"]).norm()) <= 1e-5 * size
        assert float((note["trained"] - note["before"]).norm()) > 1e-3 * size
        # A code at a tie may fall the other way where a product is summed in another order.
        assert float((note["folded"] - note["trained"]).abs().median()) <= 1e-5 * size / note["before"].numel() ** 0.5
        assert float((note["folded"] - note["trained"]).norm()) <= 2e-2 * size
        # All but A, which B = 0 keeps from any: seven of the low-rank pairs.
        assert note["reached"] == note["parameters"] - 7
