"""Rotation keeps the function on every family that has norms to fuse, through the whole path: quantize, save, load."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sordino
from sordino.errors import InputError
from sordino.recipe import MoveSpec, load_recipe
from tiny import assert_same_function, make_tiny

PLAIN = ["format.weights.bits=16", "guard=off"]


def rotated(name: str, *overrides: str) -> sordino.Recipe:
    return load_recipe(load_recipe(name).model_copy(update={"moves": (MoveSpec(move="rotate"),)}), overrides)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_unchanged(family: str, tied: bool, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", family, tied=tied, layers=2, hidden_size=96, num_attention_heads=6, ffn=172)
    sordino.quantize(str(model), rotated("rtn-w4", *PLAIN), tmp_path / "out", windows=4, seqlen=32)
    exact, ours, ids = assert_same_function(model, tmp_path / "out", ["model.layers.0.mlp.down_proj"])
    assert torch.equal(exact.model.embed_tokens.weight, ours.model.embed_tokens.weight)  # one table, as it was
    assert torch.equal(exact.generate(ids, max_new_tokens=16), ours.generate(ids, max_new_tokens=16))


@pytest.mark.parametrize("embeddings", [16, 8])
def test_saves_again_as_it_was_loaded(embeddings: int, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    recipe = rotated("gptq-w3", f"format.embeddings={embeddings}")
    sordino.quantize(str(model), recipe, tmp_path / "out", windows=8, seqlen=32)
    ours, tokenizer = sordino.load(tmp_path / "out")
    ours.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    ids = tokenizer("and again", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, again(ids).logits)


def test_refuses_norms_behind_the_sublayers(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", "olmo2", layers=2)
    with pytest.raises(InputError, match=r"'rotate'.*olmo2"):
        sordino.quantize(str(model), rotated("rtn-w4"), tmp_path / "out")


def test_biases_of_the_linears_that_write_to_the_stream_turn_once(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2, attention_bias=True, mlp_bias=True)
    sordino.quantize(str(model), rotated("gptq-w4", "format.weights.bits=8"), tmp_path / "out", windows=8, seqlen=32)
    exact, ours = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("model", "out"))
    ids = torch.randint(2, 300, (1, 24))
    with torch.no_grad():
        a, b = exact(ids).logits, ours(ids).logits
    assert (a - b).norm() <= 0.05 * a.norm()
