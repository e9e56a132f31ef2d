"""The runner's shortcuts change nothing: inputs and outputs equal those of plain hooks on a plain forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sordino.anatomy import FAMILIES, SITES, anatomy_of
from sordino.walk.blocks import BlockFactory
from sordino.walk.runner import Runner
from sordino.walk.source import Source
from tiny import make_tiny


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_inputs_and_outputs_equal_a_plain_forward(tmp_path: Path, family: str, budget: int) -> None:
    source = Source(make_tiny(tmp_path / "model", family, layers=2))
    factory = BlockFactory(source, anatomy_of_source(source), torch.float32)
    layer, call = factory.load(1), factory.calls(16)[1]
    x = torch.randn(5, 16, 64, generator=torch.Generator().manual_seed(0))
    runner = Runner(layer, x, call, factory.anatomy, batch=2, budget=budget)
    want: dict[str, Any] = {}
    for site in SITES:
        first = layer.get_submodule(factory.anatomy.at(site)[0].name)
        first.register_forward_pre_hook(lambda _, args, site=site: want.setdefault(site, []).append(args[0]))
    with torch.no_grad():
        outputs = [layer(x[i : i + 2], **call) for i in (0, 2, 4)]
    outputs = [o[0] if isinstance(o, tuple) else o for o in outputs]
    expected = {site: torch.cat(want[site][:3]) for site in SITES}
    for _ in range(2):  # the second time from what was kept
        for site in SITES:
            assert torch.equal(torch.cat([v for _, v in runner.inputs(site, 0, 5)]), expected[site])
        assert torch.equal(torch.cat([v for _, v in runner.outputs(0, 5)]), torch.cat(outputs))
    assert set(runner.kept) == ({"o", "down"} if budget else set())


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_what_is_held_is_not_computed_again(tmp_path: Path, budget: int) -> None:
    source = Source(make_tiny(tmp_path / "model", "llama", layers=1))
    factory = BlockFactory(source, anatomy_of_source(source), torch.float32)
    layer: Any = factory.load(0)
    x = torch.randn(5, 16, 64, generator=torch.Generator().manual_seed(0))
    runner = Runner(layer, x, factory.calls(16)[0], factory.anatomy, batch=2, budget=budget)
    own = layer.mlp.forward
    calls: list[int] = []
    layer.self_attn.q_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    runner.hold("o")
    assert len(calls) == (3 if budget else 0) and set(runner.kept) == ({"o"} if budget else set())
    found = torch.cat([v for _, v in runner.inputs("down", 0, 5)])
    outputs = torch.cat([v for _, v in runner.outputs(0, 5)])
    assert len(calls) == (3 if budget else 6)
    assert layer.mlp.forward == own and "forward" not in layer.self_attn.__dict__  # the shortcuts are gone
    plain = Runner(layer, x, factory.calls(16)[0], factory.anatomy, batch=2, budget=0)
    assert torch.equal(found, torch.cat([v for _, v in plain.inputs("down", 0, 5)]))
    assert torch.equal(outputs, torch.cat([v for _, v in plain.outputs(0, 5)]))


def test_whole_decoder_equals_block_by_block(tmp_path: Path) -> None:
    """What the factory passes to the blocks is what the model itself passes."""
    from transformers import AutoModel

    source = Source(make_tiny(tmp_path / "model", "qwen3", layers=3))
    factory = BlockFactory(source, anatomy_of_source(source), torch.float32)
    ids = torch.arange(20)[None]
    x = torch.nn.functional.embedding(ids, source.tensor("model.embed_tokens.weight"))
    with torch.no_grad():
        for i, call in enumerate(factory.calls(20)):
            x = factory.load(i)(x, **call)
        want = AutoModel.from_pretrained(source.path)(ids).last_hidden_state
        assert torch.allclose(factory.norm()(x), want, atol=1e-5)


def anatomy_of_source(source: Source) -> Any:
    from sordino.anatomy import skeleton

    return anatomy_of(skeleton(source.config))
