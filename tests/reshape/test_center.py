"""Taking means off keeps the function on every family, and takes them off."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import sordino
from sordino.corpus import DEFAULT_TEXT, load_text, tokenize
from sordino.errors import InputError
from sordino.moves import MOVES
from sordino.recipe import Recipe, load_recipe
from sordino.reshape.quiet import channel_means
from sordino.runtime.prefix import prefix_length
from tiny import FAMILIES, Fixed, assert_same_function, make_tiny

SMALL: dict[str, Any] = {"windows": 4, "seqlen": 32}
ALONE = '{move="center"}'
INPUTS = '{move="center", values=false, keys=false}'
KEYS = '{move="center", inputs=false, values=false}'
FIRST = '{move="center"}, {move="smooth"}, {move="rotate", size="full"}, {move="rotate-inner"}'
UNTURNED = '{move="center"}, {move="smooth"}, {move="rotate-inner"}'


def recipe(moves: str) -> Recipe:
    return load_recipe("rtn-w4", ["format.weights.bits=16", "guard=off", f"moves=[{moves}]"])


def uneven(folder: Path) -> None:
    """Give a model means to take off, and a norm a channel without a gain."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.get_input_embeddings().weight += 0.03 * torch.randn(model.config.hidden_size, generator=rng)
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(4)
            if hasattr(layer, "input_layernorm"):
                layer.input_layernorm.weight[3] = 0
    model.save_pretrained(folder)


@pytest.mark.parametrize("moves", [ALONE, INPUTS, KEYS, UNTURNED, FIRST])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_unchanged(family: str, moves: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", family, layers=2)
    uneven(model)
    if family == "olmo2" and moves != KEYS:  # its norms stand behind the linears
        with pytest.raises(InputError, match="no norms"):
            sordino.quantize(str(model), recipe(moves), tmp_path / "out", **SMALL)
        return
    sordino.quantize(str(model), recipe(moves), tmp_path / "out", **SMALL)
    _, ours, _ = assert_same_function(model, tmp_path / "out", ["model.layers.1.self_attn.o_proj"] if "smooth" in moves else [])
    layer = ours.model.layers[1]
    assert (layer.self_attn.o_proj.bias is not None) == (moves not in (INPUTS, KEYS))
    assert hasattr(layer.self_attn, "key_mean") == (moves != INPUTS)
    if moves != KEYS:
        assert all(float(m.bias.detach().abs().max()) > 0 for m in (layer.input_layernorm, layer.mlp.gate_proj))


def test_what_linears_see_has_no_mean(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    uneven(model)
    sordino.quantize(str(model), recipe(FIRST), tmp_path / "out", windows=16, seqlen=32)
    shares = []
    for folder in (model, tmp_path / "out"):
        ours, tokenizer = sordino.load(folder)
        seen: dict[str, torch.Tensor] = {}
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj"):
            linear = ours.model.layers[1].get_submodule(name)
            linear.register_forward_pre_hook(partial(_see, seen, name))
        ids = tokenize(load_text(DEFAULT_TEXT), tokenizer)[:512].view(16, 32)
        with torch.no_grad():
            ours(ids)
        shares.append([float(x.mean((0, 1)).square().sum() / x.square().sum(-1).mean()) for x in seen.values()])
    before, after = shares
    assert all(b > 0.1 for b in before)
    assert all(a < 0.35 * b for a, b in zip(after, before, strict=True))


def test_keys_lose_what_they_share(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    uneven(model)
    sordino.quantize(str(model), recipe(KEYS), tmp_path / "out", windows=16, seqlen=32)
    ours, tokenizer = sordino.load(tmp_path / "out", dtype=torch.float32)
    ids = tokenize(load_text(DEFAULT_TEXT), tokenizer)[:512].view(16, 32)
    with torch.no_grad():
        keys = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).past_key_values.layers[1].keys
    energy = keys.square().sum(-1).mean()
    mean = ours.model.layers[1].self_attn.key_mean
    assert float((keys - mean[:, None]).square().sum(-1).mean()) < 0.9 * float(energy)
    assert float((keys.mean((0, 2)) - mean).square().sum(-1).mean()) < 0.5 * float(mean.square().sum(-1).mean())


def test_a_prefix_loses_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its keys would stand out among the others'."""
    model = make_tiny(tmp_path / "model", layers=2)
    uneven(model)
    monkeypatch.setitem(MOVES, "prefix", Fixed)
    logits = []
    for moves in ("", f"{KEYS}, ", f"{ALONE}, "):
        made = recipe(moves + '{move="prefix"}')
        sordino.quantize(str(model), made, tmp_path / f"out{len(logits)}", **SMALL)
        ours, tokenizer = sordino.load(tmp_path / f"out{len(logits)}", dtype=torch.float32)
        assert prefix_length(ours) == 3
        with torch.no_grad():
            logits.append(ours(tokenizer("the function stays", return_tensors="pt").input_ids).logits)
    plain = logits[0]
    assert all(float((x - plain).norm()) <= 1e-4 * float(plain.norm()) for x in logits[1:])


def _see(seen: dict[str, torch.Tensor], name: str, _: Any, args: tuple[Any, ...]) -> None:
    seen[name] = args[0].float()


def test_means_leave_out_massive_tokens() -> None:
    x = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0)) + 1
    loud = x.clone()
    loud[0, 0] = 1e4
    torch.testing.assert_close(channel_means([(slice(0, 2), loud)]), x.flatten(0, 1)[1:].double().mean(0))


@pytest.mark.parametrize("base", ["rtn-w4", "w4a4kv4", "d2quant-paper-w3"])
def test_rounded_models_ship_as_calibrated(base: str, tmp_path: Path) -> None:
    """Biases are stored and counted, also behind other moves, and where some blocks are left as they are."""
    model = make_tiny(tmp_path / "model", layers=3)
    uneven(model)
    own = load_recipe(base)
    made = own if base == "w4a4kv4" else own.model_copy(update={"moves": (*recipe(ALONE).moves, *own.moves)})
    manifest = sordino.quantize(str(model), made, tmp_path / "out", **SMALL).manifest
    figures = sordino.evaluate(tmp_path / "out", windows=2, seqlen=32, against=model)
    assert figures.bits_per_weight == pytest.approx(manifest["bits_per_weight"])
    assert figures.kl is not None and figures.kl < 1
    sordino.quantize(str(model), made, tmp_path / "part", blocks=(1, 2), **SMALL)
    part = sordino.evaluate(tmp_path / "part", windows=2, seqlen=32, against=model)
    assert part.kl is not None and part.kl < figures.kl


def test_it_stands_first(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=1)
    for other in ("rotate", "smooth", "rotate-inner"):
        with pytest.raises(InputError, match=f"must stand before '{other}'"):
            sordino.quantize(str(model), recipe(f'{{move="{other}"}}, {ALONE}'), tmp_path / "out", **SMALL)
