"""The kernels' forward: the same logits as transformers' own, whatever the recipe, and only where it may."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from decoders import CENTER, RECIPES, tiny_checkpoint
from levels import every_level, needs_kernels
from sordino.errors import InputError
from sordino.runtime import block, kernels
from sordino.runtime.block import one_call
from sordino.runtime.kernels import library

pytestmark = needs_kernels
PROMPT, NEW = 12, 14

wholes: list[int] = []  # an entry for every layer that took many tokens: in layers.py, or one of several in one call


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers that the one call is asked for from now on, one entry a call."""
    native = library.active()
    wholes.clear()
    seen: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(native, name)

        def sordino_decode(self, *args: Any) -> int:
            seen.append(args[2])
            return int(native.sordino_decode(*args))

        def sordino_glu(self, *args: Any) -> int:
            wholes.append(1)
            return int(native.sordino_glu(*args))

        def sordino_prompt(self, *args: Any) -> int:
            done = int(native.sordino_prompt(*args))
            wholes.extend([2] * args[2] if done == 0 else [])
            return done

    monkeypatch.setattr(library._State, "library", Counting())
    return seen


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return counted(monkeypatch)


def quantized(*args: Any, **options: Any) -> Any:
    """A tiny model, quantized and loaded."""
    model = tiny_checkpoint(*args, **options)
    wholes.clear()  # the walk's own blocks ask the kernels too (walk/fused.py)
    return model


@torch.no_grad()
def decoded(model: Any, on: bool, texts: int = 1, seed: int = 0) -> tuple[Tensor, DynamicCache]:
    """Logits [B, NEW, V] of tokens decoded one by one, and the cache."""
    ids = torch.randint(2, 300, (texts, PROMPT + NEW), generator=torch.Generator().manual_seed(seed))
    with one_call(on):
        cache = model(ids[:, :PROMPT], use_cache=True).past_key_values
        parts = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(PROMPT, PROMPT + NEW)]
    return torch.cat(parts, 1), cache


def apart(a: Tensor, b: Tensor) -> Tensor:
    """Relative distance of every token's logits."""
    return ((a - b).float().norm(dim=-1) / b.float().norm(dim=-1)).flatten()


@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_and_cache_equal_those_of_torch(recipe: str, tmp_path: Path, calls: list[int]) -> None:
    model = quantized(tmp_path, *RECIPES[recipe])
    for texts in (1, 3):
        calls.clear()
        ours, cache = decoded(model, True, texts)
        assert calls == [2] * NEW
        theirs, other = decoded(model, False, texts)
        assert len(calls) == NEW
        # A sum in another order may let a code at a tie fall the other way.
        assert float(apart(ours, theirs).median()) <= 1e-5 and float(apart(ours, theirs).max()) <= 2e-2
        assert cache.get_seq_length() == other.get_seq_length() == PROMPT + NEW
        for a, b in zip(cache.layers, other.layers, strict=True):
            near = torch.isclose(a.values.float(), b.values.float(), rtol=1e-3, atol=1e-4)
            assert a.keys.shape == b.keys.shape and float(near.float().mean()) > 0.9


@every_level
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("recipe", ["weights alone", "static, prefix, R3, R4", "dynamic, prefix, R3, R4", "3-bit cache"])
def test_heads_as_wide_as_those_of_real_models(recipe: str, size: int, level: str, tmp_path: Path) -> None:
    """AVX-512's attention is for heads of multiples of 64."""
    model = quantized(tmp_path, *RECIPES[recipe], head_dim=size)
    with kernels.using(level):
        ours, theirs = decoded(model, True)[0], decoded(model, False)[0]
    assert float(apart(ours, theirs).median()) <= 1e-5 and float(apart(ours, theirs).max()) <= 2e-2


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("recipe", ["weights alone", "dynamic, prefix, R3, R4", "no means"])
def test_every_family(family: str, recipe: str, tmp_path: Path, calls: list[int]) -> None:
    model = quantized(tmp_path, *RECIPES[recipe], family=family)
    ours, _ = decoded(model, True)
    # Mistral's window slides: its plain cache forgets, which the kernel leaves to transformers.
    assert bool(calls) == (family != "mistral" or recipe != "weights alone")
    assert float(apart(ours, decoded(model, False)[0]).median()) <= 1e-5


@every_level
@pytest.mark.parametrize(
    "recipe",
    ["norms with a bias", "static, prefix, R3, R4", "groups of channels", "groups of channels, zero points", "no means"],
)
def test_every_instruction_set_and_half_precision(
    recipe: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = quantized(tmp_path, *RECIPES[recipe])
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    with kernels.using(level):
        truth, torchs = decoded(exact, False)[0], decoded(half, False)[0]
        seen = counted(monkeypatch)
        assert float(apart(decoded(exact, True)[0], truth).median()) <= 1e-5
        ours = decoded(half, True)[0]
        assert len(seen) == 2 * NEW
    assert float(apart(ours, truth).mean()) <= 1.3 * float(apart(torchs, truth).mean())


def test_long_texts_and_threads(tmp_path: Path, calls: list[int]) -> None:
    model = quantized(tmp_path, *RECIPES["3-bit cache"])
    ids = torch.randint(2, 300, (2, 400), generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with torch.no_grad():
            outs, cache = [], model(ids, use_cache=True).past_key_values
            for on in (True, False):
                with one_call(on):
                    outs.append(model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits)
    finally:
        torch.set_num_threads(before)
    assert calls == [2] and float(apart(*outs).max()) <= 1e-5


OTHERS = {
    "8-bit columns": ("atom-w4a4", []),
    "side branches": ("bisup-quarot-w4a4", []),
    "R3, no means, prefix, plain cache": ("rtn-w4", [f"moves=[{CENTER}, {{move='rotate-inner'}}, {{move='prefix'}}]"]),
}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("recipe", RECIPES | OTHERS)
def test_prompts(recipe: str, family: str, tmp_path: Path, calls: list[int]) -> None:
    """With and without a cache, filled and empty, with and without padding, and in inference mode."""
    if family != "llama" and recipe not in ("norms with a bias", "dynamic, prefix, R3, R4"):
        return
    model = quantized(tmp_path, *(RECIPES | OTHERS)[recipe], family=family)
    ids = torch.randint(2, 300, (3, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def run(on: bool) -> list[Tensor]:
        with one_call(on):
            cache = model(ids[:, :10], attention_mask=mask[:, :10], use_cache=True).past_key_values
            rest = model(ids[:, 10:], attention_mask=mask, past_key_values=cache)
            outs = [rest, model(ids, use_cache=False), model(ids[:1, :2], use_cache=False)]
            with torch.inference_mode():
                outs.append(model(ids))
            assert rest.past_key_values.get_seq_length() == 24 and outs[1].past_key_values is None
            return [out.logits for out in outs]

    ours = run(True)
    assert len(wholes) == 2 * 5 and not calls
    for a, b in zip(ours, run(False), strict=True):
        # A sum in another order may let a code at a tie fall the other way. What padding sees is nobody's business.
        assert float(apart(a, b).median()) <= 1e-5 and (len(a) == 1 or float(apart(a[1:], b[1:]).max()) <= 5e-2)
    assert len(wholes) == 2 * 5


@every_level
@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("recipe", ["static, prefix, R3, R4", "dynamic, prefix, R3, R4"])
def test_one_call_for_a_prompt_is_bit_equal(
    recipe: str, family: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To layer after layer: several texts, padded, behind others, longer than what goes through the layers at once."""
    exact = quantized(tmp_path, *RECIPES[recipe], family=family)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    ids = torch.randint(2, 300, (3, 700), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with kernels.using(level):
        counted(monkeypatch)
        for model in (exact, half):
            outs = []
            for one in (True, False):
                wholes.clear()
                with monkeypatch.context() as patched:
                    if not one:
                        patched.setattr(block, "_prompt", lambda *_: None)
                    first = model(ids[:, :600], attention_mask=mask[:, :600], use_cache=True)
                    more = model(ids[:, 600:], attention_mask=mask, past_key_values=first.past_key_values)
                    alone = model(ids[:1, :9], use_cache=False)
                # The portable kernels leave products of many rows to torch.
                assert wholes == [2] * 6 if one and level != "portable" else wholes == [1] * 6
                held = [x for layer in more.past_key_values.layers for x in (layer.keys, layer.values)]
                outs.append([first.logits, more.logits, alone.logits, *held])
            assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["static, prefix, R3, R4", "R3, plain cache"])
def test_masks_and_positions_of_several_texts_in_a_row(recipe: str, tmp_path: Path, calls: list[int]) -> None:
    model = quantized(tmp_path, *RECIPES[recipe])
    ids = torch.randint(2, 300, (1, 24), generator=torch.Generator().manual_seed(4))
    holes = torch.ones_like(ids)
    holes[0, 5:8] = 0
    for given in ({"position_ids": torch.cat([torch.arange(9), torch.arange(15)])[None]}, {"attention_mask": holes}):
        outs = []
        for on in (True, False):
            with one_call(on):
                outs.append(model(ids, use_cache=False, **given).logits[:, 8:])
        alone = model(ids, use_cache=False).logits[:, 8:]
        assert float(apart(*outs).median()) <= 1e-5 and float(apart(outs[0], alone).median()) > 1e-3
    assert wholes


@torch.no_grad()
def test_prompts_in_half_precision_are_as_near_to_exact(tmp_path: Path, calls: list[int]) -> None:
    exact = quantized(tmp_path, *RECIPES["norms with a bias"])
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    ids = torch.randint(2, 300, (2, 60), generator=torch.Generator().manual_seed(2))
    with one_call(False):
        truth, torchs = exact(ids).logits, half(ids).logits
    ours = half(ids).logits
    assert len(wholes) == 2
    assert float(apart(ours, truth).mean()) <= 1.3 * float(apart(torchs, truth).mean())


def test_generate_batches_and_beams(tmp_path: Path, calls: list[int]) -> None:
    model = quantized(tmp_path, *RECIPES["dynamic, prefix, R3, R4"])
    ids = torch.randint(2, 300, (2, 9))
    fixed: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    padded = torch.ones_like(ids)
    padded[0, :4] = 0
    for options in ({}, {"num_beams": 2}, {"num_beams": 3}):
        for mask in (torch.ones_like(ids), padded):
            calls.clear()
            with one_call(True):
                ours = model.generate(ids, attention_mask=mask, **fixed, **options)
            used = len(calls)
            with one_call(False):
                assert torch.equal(ours, model.generate(ids, attention_mask=mask, **fixed, **options))
            assert used == (15 if options != {"num_beams": 3} else 0)  # more than four texts at once are not for the one call


def test_a_cropped_cache_goes_on(tmp_path: Path, calls: list[int]) -> None:
    model = quantized(tmp_path, *RECIPES["3-bit cache"])
    outs = []
    for on in (True, False):
        _, cache = decoded(model, on)
        with torch.no_grad(), one_call(on):
            cache.crop(-5)
            assert cache.get_seq_length() == PROMPT + NEW - 5
            model(torch.tensor([[7, 8, 9]]), past_key_values=cache)
            outs.append(model(torch.tensor([[10]]), past_key_values=cache).logits)
            assert cache.get_seq_length() == PROMPT + NEW - 1
    assert float(apart(*outs).max()) <= 1e-5


def _hook(model: Any) -> None:
    model.get_decoder().layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)


def _adapter(model: Any) -> None:
    mlp = model.get_decoder().layers[0].mlp
    mlp.down_proj = nn.Sequential(mlp.down_proj)


def _patch(model: Any) -> None:
    norm = model.get_decoder().layers[0].input_layernorm
    norm.forward = lambda x: type(norm).forward(norm, x) * 2


@pytest.mark.parametrize(("change", "whole"), [(_hook, False), (_adapter, True), (_patch, False)])
def test_what_others_put_into_a_layer_is_left_to_torch(change: Any, whole: bool, tmp_path: Path, calls: list[int]) -> None:
    model = quantized(tmp_path, *RECIPES["weights alone"])
    decoded(model, True)
    assert len(calls) == NEW
    wholes.clear()
    change(model)
    ours, theirs = decoded(model, True)[0], decoded(model, False)[0]
    assert len(calls) == NEW and float(apart(ours, theirs).max()) <= 1e-5
    assert bool(wholes) == whole


def test_pickled_models_and_signatures(tmp_path: Path) -> None:
    model = quantized(tmp_path, *RECIPES["weights alone"])
    decoder = model.get_decoder()
    assert signature(decoder.forward) == signature(MethodType(type(decoder).forward, decoder))
    first = decoded(model, True)[0]
    other = pickle.loads(pickle.dumps(model))
    assert float(apart(decoded(other, True)[0], first).max()) <= 1e-5


def test_moved_and_copied_models(tmp_path: Path, calls: list[int]) -> None:
    model = quantized(tmp_path, *RECIPES["weights alone"])
    first = decoded(model, True)[0]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_decoder().layers[0].input_layernorm.weight.mul_(2)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    assert torch.equal(decoded(model, True)[0], first) and len(calls) == 2 * NEW
    changed = decoded(other, True)[0]
    assert len(calls) == 3 * NEW
    assert not torch.equal(changed, first) and float(apart(changed, decoded(other, False)[0]).max()) <= 1e-5


@pytest.mark.parametrize("recipe", ["atom-w3a3", "atom-w4a4"])
def test_formats_without_a_kernel_are_looked_at_once_a_text(
    recipe: str, tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized(tmp_path, recipe, [])
    looks: list[int] = []
    monkeypatch.setattr(block, "_begin", lambda *given, begin=block._begin: looks.append(1) or begin(*given))
    ours = decoded(model, True)[0]
    assert float(apart(ours, decoded(model, False)[0]).median()) <= 1e-5 and not calls and len(looks) == 1


def test_texts_side_by_side(tmp_path: Path, calls: list[int]) -> None:
    model = quantized(tmp_path, *RECIPES["3-bit cache"])
    alone = [decoded(model, True, seed=i)[0] for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: decoded(model, True, seed=i)[0], range(4)))
    assert len(calls) == 8 * NEW
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_hidden_states_and_attentions_are_transformers_own(tmp_path: Path, calls: list[int]) -> None:
    model = quantized(tmp_path, *RECIPES["weights alone"])
    with torch.no_grad():
        cache = model(torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
        out = model(torch.tensor([[6]]), past_key_values=cache, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and not calls and len(wholes) == 2


def test_gradients_go_through_torch(tmp_path: Path, calls: list[int]) -> None:
    model = quantized(tmp_path, *RECIPES["weights alone"])
    gain = model.get_decoder().layers[0].input_layernorm.weight
    gain.requires_grad_(True)
    cache = model(torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
    model(torch.tensor([[6]]), past_key_values=cache).logits.sum().backward()
    assert gain.grad is not None and not calls and not wholes


def _autocast(model: Any, ids: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return model(ids)


def _early_exit(model: Any, ids: Tensor) -> Any:
    model.config.num_hidden_layers = 1
    try:
        return model(ids)
    finally:
        model.config.num_hidden_layers = 2


def _fewer_layers(model: Any, ids: Tensor) -> Any:
    decoder, model_layers = model.get_decoder(), model.get_decoder().layers
    decoder.layers = nn.ModuleList(reversed(list(model_layers)))
    try:
        return model(ids)
    finally:
        decoder.layers = model_layers


REQUESTS: dict[str, Any] = {
    "autocast": _autocast,
    "not causal": lambda model, ids: model(ids, is_causal=False),
    "one place for all": lambda model, ids: model(ids, position_ids=torch.tensor([[3]])),
    "some of the layers": _early_exit,
    "other layers": _fewer_layers,
    "a cache that is not to be used": lambda model, ids: model(ids, past_key_values=DynamicCache(), use_cache=False),
    "a tuple": lambda model, ids: model.get_decoder()(ids, return_dict=False)[0],
}


@torch.no_grad()
@pytest.mark.parametrize("request_", REQUESTS)
def test_requests_that_are_for_transformers(request_: str, tmp_path: Path, calls: list[int]) -> None:
    model = quantized(tmp_path, *RECIPES["weights alone"])
    ids = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    model(ids)
    assert len(wholes) == 2
    outs = []
    for on in (True, False):
        with one_call(on):
            outs.append(REQUESTS[request_](model, ids))
    a, b = (o if isinstance(o, Tensor) else o.logits for o in outs)
    same = request_ == "other layers"  # these are as good as the first ones, if they are looked at again
    assert torch.allclose(a, b, atol=1e-4) if same else torch.equal(a, b)
    assert len(wholes) == (4 if same else 2)


def test_another_attention_function_is_refused(tmp_path: Path, calls: list[int]) -> None:
    model = quantized(tmp_path, *RECIPES["static, prefix, R3, R4"])
    model.config._attn_implementation = "sdpa"
    with torch.no_grad(), pytest.raises(InputError, match="keep attn_implementation"):
        model(torch.tensor([[3, 4, 5]]))


def test_a_steering_vector_gets_its_gradient(tmp_path: Path, calls: list[int]) -> None:
    model = quantized(tmp_path, *RECIPES["weights alone"])
    vector = torch.zeros(model.config.hidden_size, requires_grad=True)
    model.get_decoder().layers[0].mlp.down_proj.register_forward_hook(lambda *given: given[2] + vector)
    model(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    assert vector.grad is not None and bool(vector.grad.ne(0).any()) and not wholes
