"""The whole path on the public API: quantize, load with transformers in a new process, generate, measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import sordino
from sordino.anatomy import FAMILIES
from sordino.errors import InputError
from sordino.measure.evaluate import reference
from sordino.runtime.generate import generate
from sordino.runtime.modules import QuantLinear
from sordino.walk.context import Context
from tiny import make_tiny

SMALL = {"windows": 32, "seqlen": 64}


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("tied", [True, False])
def test_every_family_goes_in_and_comes_out(tmp_path: Path, family: str, tied: bool) -> None:
    model = make_tiny(tmp_path / "model", family, tied=tied)
    result = sordino.quantize(str(model), "gptq-w4", tmp_path / "out", **SMALL)
    assert "28 of 28 block linears quantized" in result.manifest["coverage"]
    loaded, tokenizer = sordino.load(tmp_path / "out")
    assert sum(isinstance(m, QuantLinear) for m in loaded.modules()) == 28
    ids = tokenizer("a small model", return_tensors="pt").input_ids
    with torch.no_grad():
        full = AutoModelForCausalLM.from_pretrained(model)(ids).logits
        ours = loaded(ids).logits
    # Random weights: only closeness is asked, far closer than to another model's logits.
    assert (ours - full).norm() < 0.5 * full.norm()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_checkpoint_equals_what_calibration_saw(tmp_path: Path, bits: int, symmetric: str) -> None:
    """A8: fp32 logits of the loaded checkpoint equal the calibration-time model's, which is rebuilt from the codes."""
    model = make_tiny(tmp_path / "model", "qwen2")
    overrides = (f"format.weights.bits={bits}", f"format.weights.symmetric={symmetric}")
    sordino.quantize(str(model), "gptq-w4", tmp_path / "out", overrides=overrides, **SMALL)
    loaded, tokenizer = sordino.load(tmp_path / "out", dtype=torch.float32)
    simulated = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, module in loaded.named_modules():
        if isinstance(module, QuantLinear):
            codes, zeros, scale = module.codes().double(), module.zeros().double(), module.weight_scale.double()
            w = (codes.view(*scale.shape, -1) - zeros[..., None]) * scale[..., None]
            simulated.get_submodule(name).weight.data = w.view(module.out_features, -1).float()
    ids = tokenizer("one two three four five six seven", return_tensors="pt").input_ids
    with torch.no_grad():
        ours, theirs = loaded(ids).logits, simulated(ids).logits
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_new_process_generates_the_same_text(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model")
    sordino.quantize(str(model), "rtn-w4", tmp_path / "out")
    script = (
        "import sys, sordino\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "i = t('hello there', return_tensors='pt')\n"
        "o = m.generate(i.input_ids, max_new_tokens=12, do_sample=False)[0]\n"
        "print(t.decode(o, skip_special_tokens=True), end='')\n"
    )
    run = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert run.stdout == generate(tmp_path / "out", "hello there", 12)


@pytest.mark.parametrize(("embeddings", "head"), [(16, 16), (8, 16)])
@pytest.mark.parametrize("tied", [True, False])
def test_save_load_save_is_byte_identical(tmp_path: Path, embeddings: int, head: int, tied: bool) -> None:
    model = make_tiny(tmp_path / "model", tied=tied)
    widths = (f"format.embeddings={embeddings}", f"format.head={head if tied else 4}")
    sordino.quantize(str(model), "rtn-w4", tmp_path / "out", overrides=widths)
    first, second = tmp_path / "first", tmp_path / "second"
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(first)
    AutoModelForCausalLM.from_pretrained(first).save_pretrained(second)
    stored = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert (first / "model.safetensors").read_bytes() == stored
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_tied_table_is_stored_once_and_head_reads_it(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", tied=True)
    sordino.quantize(str(model), "rtn-w4", tmp_path / "out", overrides=("format.embeddings=8", "format.weights.bits=8"))
    loaded, tokenizer = sordino.load(tmp_path / "out")
    assert [n for n in loaded.state_dict() if "lm_head" in n] == []
    ids = tokenizer("tied tables", return_tensors="pt").input_ids
    with torch.no_grad():
        full = AutoModelForCausalLM.from_pretrained(model)(ids).logits
        assert (loaded(ids).logits - full).norm() < 0.03 * full.norm()


def test_ignored_and_overridden_linears(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model")
    recipe = tmp_path / "mixed.toml"
    recipe.write_text(
        '[format.weights]\nbits = 4\nsolver = "gptq"\nignore = ["*.0.mlp.down_proj"]\n'
        '[[format.weights.override]]\nmatch = "*.v_proj"\nbits = 8\n'
        '[[format.weights.override]]\nmatch = "*.k_proj"\nsolver = "rtn"\n'
    )
    result = sordino.quantize(str(model), recipe, tmp_path / "out", **SMALL)
    assert "left in full precision: model.layers.0.mlp.down_proj" in result.manifest["coverage"]
    loaded, _ = sordino.load(tmp_path / "out")
    layers = loaded.model.layers
    assert layers[1].self_attn.v_proj.bits == 8 and layers[1].self_attn.k_proj.bits == 4
    assert isinstance(layers[0].mlp.down_proj, torch.nn.Linear) and isinstance(layers[1].mlp.down_proj, QuantLinear)


def test_blocks_leaves_the_rest_in_full_precision(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model")
    sordino.quantize(str(model), "gptq-w4", tmp_path / "out", blocks=(1, 3), **SMALL)
    loaded, _ = sordino.load(tmp_path / "out")
    kinds = [isinstance(layer.mlp.up_proj, QuantLinear) for layer in loaded.model.layers]
    assert kinds == [False, True, True, False]
    original = AutoModelForCausalLM.from_pretrained(model)
    assert torch.equal(loaded.model.layers[3].mlp.up_proj.weight, original.model.layers[3].mlp.up_proj.weight)


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model")
    shards = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sordino.quantize(str(model), "gptq-w4", tmp_path / name, seed=seed, **SMALL)
        shards.append((tmp_path / name / "model.safetensors").read_bytes())
    assert shards[0] == shards[1] != shards[2]


def test_stored_numbers_and_manifest_agree_with_the_loaded_model(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model")
    result = sordino.quantize(str(model), "rtn-w4", tmp_path / "out")
    figures = sordino.evaluate(tmp_path / "out", seqlen=64, windows=3, against=str(model))
    assert figures.bits_per_weight == pytest.approx(result.manifest["bits_per_weight"])
    assert figures.bytes <= result.manifest["bytes"] <= figures.bytes + 200_000  # the file adds its header
    assert figures.kl is not None and figures.kl > 0 and figures.top1_agreement is not None
    assert json.loads((tmp_path / "out" / "sordino.json").read_text())["seed"] == 0


def test_perplexity_equals_transformers_own_loss(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    figures = sordino.evaluate(str(model), text=str(text), seqlen=50, windows=4)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(), add_special_tokens=False, return_tensors="pt").input_ids[0]
    with torch.no_grad():
        losses = [plain(ids[i : i + 50][None], labels=ids[i : i + 50][None]).loss for i in range(0, 200, 50)]
    assert figures.ppl == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-4)


def test_one_reference_serves_many_models_and_only_on_its_own_text(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model")
    sordino.quantize(str(model), "rtn-w4", tmp_path / "out")
    options = {"seqlen": 64, "windows": 3}
    exact = reference(str(model), **options)
    again = sordino.evaluate(str(model), against=exact, **options)
    assert again.kl == pytest.approx(0, abs=1e-7) and again.top1_agreement == 1
    ours, alone = (sordino.evaluate(tmp_path / "out", against=a, **options) for a in (exact, str(model)))
    assert ours.kl == alone.kl and ours.ppl == alone.ppl and ours.top1_agreement == alone.top1_agreement
    with pytest.raises(InputError, match="tokenize the text differently"):
        sordino.evaluate(tmp_path / "out", against=exact, seqlen=32, windows=3)


def test_leftover_rotary_buffers_are_ignored_and_other_extras_refused(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    file = model / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, file, metadata={"format": "pt"})
    sordino.quantize(str(model), "rtn-w4", tmp_path / "out")
    assert "inv_freq" not in " ".join(load_file(tmp_path / "out" / "model.safetensors"))
    save_file(tensors | {"model.layers.0.self_attn.sinks": torch.ones(8)}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="sinks"):
        sordino.quantize(str(model), "rtn-w4", tmp_path / "out2")


def test_sizes_do_not_depend_on_the_compute_dtype_nor_count_the_models_own_biases(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", "qwen2", layers=2)
    overrides = ("format.weights.symmetric=true", "format.weights.group=32")
    result = sordino.quantize(str(model), "rtn-w4", tmp_path / "out", overrides=overrides)
    sizes = [sordino.evaluate(tmp_path / "out", seqlen=32, windows=2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert sizes[0].bytes == sizes[1].bytes == result.manifest["bytes"]
    assert sizes[0].bits_per_weight == sizes[1].bits_per_weight == result.manifest["bits_per_weight"] == 4.5


def test_gptaq_runs_both_streams_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both runners keep what they saw, so that no site computes a stream's attention again."""
    kept = []
    stats = Context.stats

    def watch(self: Context, *args: Any) -> Any:
        result = stats(self, *args)
        kept.append([sorted(self.runner(s, s).kept) for s in ("fp", "q")])
        return result

    monkeypatch.setattr(Context, "stats", watch)
    sordino.quantize(str(make_tiny(tmp_path / "model", layers=1)), "gptaq-w3", tmp_path / "out", **SMALL)
    assert kept == [[[], []], [["o"], ["o"]], [["o"], ["o"]], [["down", "o"], ["down", "o"]]]
