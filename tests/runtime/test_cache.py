"""The packed cache: it holds codes, and what it gives is what attention without a cache simulates."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import sordino
from sordino.errors import InputError
from sordino.recipe import Recipe, load_recipe
from sordino.runtime.cache import PackedLayer
from tiny import make_tiny

SMALL: dict[str, Any] = {"windows": 8, "seqlen": 48}


def kv_only(bits: int = 4, mode: str = "dynamic", symmetric: bool = False, moves: str = "moves=[]") -> Recipe:
    kv = f'format.kv={{bits={bits}, mode="{mode}", symmetric={str(symmetric).lower()}}}'
    return load_recipe("rtn-w4", ["format.weights.bits=16", kv, moves, "guard=off"])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2"])
@pytest.mark.parametrize(("mode", "symmetric"), [("dynamic", False), ("dynamic", True), ("static", True)])
def test_with_and_without_a_cache_the_logits_are_equal(family: str, mode: str, symmetric: bool, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", family)
    made = kv_only(4, mode, symmetric, 'moves=[{move="rotate-inner"}]')
    sordino.quantize(str(model), made, tmp_path / "out", **SMALL)
    ours, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("out", "model"))
    ids = torch.randint(2, 300, (2, 60))
    with torch.no_grad():
        whole = ours(ids, use_cache=False).logits
        first = ours(ids[:, :37], use_cache=True)
        cache = first.past_key_values
        assert all(isinstance(layer, PackedLayer) for layer in cache.layers) and cache.get_seq_length() == 37
        parts = [first.logits] + [ours(ids[:, i : i + 1], past_key_values=cache).logits for i in range(37, 60)]
        exact = plain(ids).logits
    joined = torch.cat(parts, 1)
    # Sums in another order may let a code at a tie fall the other way, which shows in the tokens behind it.
    apart = (joined - whole).norm(dim=-1) / whole.norm(dim=-1)
    assert float(apart.max()) <= 5e-2 and float(apart.median()) <= 1e-4
    assert 1e-3 * exact.norm() < (whole - exact).norm() < 0.7 * exact.norm()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bytes_in_memory_are_those_of_codes(bits: int, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", head_dim=32)
    sordino.quantize(str(model), kv_only(bits), tmp_path / "out", **SMALL)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        cache = ours(torch.randint(2, 300, (1, 100)), use_cache=True).past_key_values
    for layer in cache.layers:
        for rows in (layer.keys, layer.values):
            assert rows.untyped_storage().nbytes() == 2 * 100 * (32 * bits // 8 + 3)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_generation_in_batches_equals_one_at_a_time(options: dict[str, Any], tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model")
    sordino.quantize(str(model), kv_only(4, moves='moves=[{move="rotate-inner"}]'), tmp_path / "out", **SMALL)
    ours, tokenizer = sordino.load(tmp_path / "out")
    texts = ["one", "and two of them", "the third text is a longer one", "four!"]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    fixed: dict[str, Any] = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 1, "eos_token_id": None} | options
    together = ours.generate(**batch, **fixed)[:, batch.input_ids.shape[1] :]
    uncached = ours.generate(**batch, **fixed, use_cache=False)[:, batch.input_ids.shape[1] :]
    assert torch.equal(together, uncached)
    for i, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt").input_ids
        alone = ours.generate(ids, attention_mask=torch.ones_like(ids), **fixed)[0, ids.shape[1] :]
        assert torch.equal(alone, together[i])


REPEATED = {
    "packed, R3": ("quarot-w4a4kv4", ["guard=off"]),
    "packed, means off": ("quarot-w4a4kv4", ["guard=off", 'moves=[{move="center"}, {move="rotate-inner"}]']),
    "plain": ("rtn-w4", []),
}


@pytest.fixture(scope="module", params=REPEATED)
def model_and_ids(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, torch.Tensor]:
    folder = tmp_path_factory.mktemp("made")
    sordino.quantize(str(make_tiny(folder / "model")), load_recipe(*REPEATED[request.param]), folder / "out", **SMALL)
    return AutoModelForCausalLM.from_pretrained(folder / "out"), torch.randint(2, 300, (1, 24))


def test_a_copied_cache_goes_on_by_itself(model_and_ids: tuple[Any, torch.Tensor]) -> None:
    """The way of transformers' documentation to say one beginning many times."""
    model, ids = model_and_ids
    fixed: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    with torch.no_grad():
        begun = model(ids[:, :20], use_cache=True).past_key_values
        told = [model.generate(ids, past_key_values=copy.deepcopy(begun), **fixed) for _ in range(2)]
        assert begun.get_seq_length() == 20
        told.append(model.generate(ids, past_key_values=begun, **fixed))
    assert torch.equal(told[0], told[1]) and torch.equal(told[0], told[2])


def test_a_cache_that_was_reset_holds_nothing(model_and_ids: tuple[Any, torch.Tensor]) -> None:
    model, ids = model_and_ids
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        parts = [model(ids[:, :9].flip(1), past_key_values=cache).logits]
        parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in (3, 1)]
        fresh = DynamicCache()
        expected = [model(ids[:, :9].flip(1), past_key_values=fresh).logits]
        expected += [model(ids[:, i : i + 1], past_key_values=fresh).logits for i in (3, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), torch.cat(expected, 1))


def test_caches_that_cannot_hold_codes_are_refused(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    sordino.quantize(str(model), kv_only(), tmp_path / "out", **SMALL)
    ours, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("out", "model"))
    ids = torch.randint(2, 300, (1, 9))
    with torch.no_grad():
        filled = plain(ids, use_cache=True).past_key_values
        with pytest.raises(InputError, match="filled by another model"):
            ours(ids, past_key_values=filled)
        with pytest.raises(InputError, match="empty DynamicCache"):
            ours.generate(ids, max_new_tokens=4, cache_implementation="static", pad_token_id=1)
        assert torch.isfinite(ours(ids, past_key_values=DynamicCache()).logits).all()


def test_static_scales_are_the_best_of_their_candidates(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=1)
    manifest = sordino.quantize(str(model), kv_only(3, "static", True), tmp_path / "out", **SMALL).manifest
    note = manifest["blocks"][0]["kv"]
    ours, _ = sordino.load(tmp_path / "out")
    attention = ours.model.layers[0].self_attn
    assert attention.key_scale.tolist() == pytest.approx(note["key_scales"], abs=1e-6)
    assert attention.value_scale.tolist() == pytest.approx(note["value_scales"], abs=1e-6)
    from sordino.corpus import DEFAULT_TEXT, calibration_windows, load_text, tokenize

    _, tokenizer = sordino.load(tmp_path / "out")
    windows = calibration_windows(tokenize(load_text(DEFAULT_TEXT), tokenizer), 48, 8, 0, 0)
    plain = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        values: list[torch.Tensor] = []
        hook = plain.model.layers[0].self_attn.v_proj.register_forward_hook(lambda _, __, y: values.append(y))
        plain(windows)
        hook.remove()
        v = values[0].unflatten(-1, (2, -1)).transpose(1, 2)
        for head in range(2):
            errors = {}
            for factor in (0.5, 0.9, 1.0, 1.1, 2.0):
                share = attention.value_scale.clone() * factor
                errors[factor] = float((attention.kv_grid.fake(v, share) - v)[:, head].square().sum())
            assert errors[1.0] <= min(errors[0.5], errors[2.0]) and errors[1.0] <= 1.05 * min(errors.values())


def test_unrounded_blocks_of_a_sliding_model_share_the_cache(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", "mistral")
    sordino.quantize(str(model), kv_only(8), tmp_path / "out", blocks=(0, 2), **SMALL)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(2, 300, (1, 30))
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    assert torch.equal(ours.generate(ids, **options), ours.generate(ids, **options, use_cache=False))


def test_a_cache_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    for bits in (4, 8):
        sordino.quantize(str(model), kv_only(bits), tmp_path / str(bits), **SMALL)
    four, eight = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("4", "8"))
    ids = torch.randint(2, 300, (1, 9))
    with torch.no_grad():
        cache = four(ids, use_cache=True).past_key_values
        with pytest.raises(InputError, match="another checkpoint"):
            eight(ids, past_key_values=cache)
        assert four(ids, past_key_values=cache).past_key_values.get_seq_length() == 18


@pytest.mark.parametrize("recipe", [kv_only(), "prefixquant-w4a4kv4-dynamic"])
def test_a_cache_of_other_shapes_is_refused(recipe: Recipe | str, tmp_path: Path) -> None:
    """Rows of dynamic grids tell nothing of their width: nothing may be written where they do not fit."""
    ours = []
    for size in (32, 64):
        model = make_tiny(tmp_path / f"model{size}", layers=2, head_dim=size)
        given = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, ["moves=[]", "guard=off"])
        sordino.quantize(str(model), given, tmp_path / str(size), **SMALL)
        ours.append(AutoModelForCausalLM.from_pretrained(tmp_path / str(size)))
    ids = torch.randint(2, 300, (3, 20))
    with torch.no_grad():
        cache = ours[0](ids[:1], use_cache=True).past_key_values
        for tokens in (20, 2, 1):
            with pytest.raises(InputError, match="another checkpoint"):
                ours[1](ids[:1, :tokens], past_key_values=cache)
            with pytest.raises(InputError, match="holds 1 texts, and 3"):
                ours[0](ids[:, :tokens], past_key_values=cache)
        assert ours[0](ids[:1], past_key_values=cache).past_key_values.get_seq_length() == 40
