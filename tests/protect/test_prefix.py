"""The prefix: chosen as the paper says, and equal to a text that begins with it, whatever way the model is called."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

import sordino
import sordino.runtime.generate
from sordino.contract import Move
from sordino.errors import InputError
from sordino.moves import MOVES
from sordino.protect.prefix import Outliers, Prefix, choose, token_ratios
from sordino.recipe import MoveSpec, Recipe, load_recipe
from tiny import IDS, Fixed, Sordino, make_tiny

SMALL: dict[str, Any] = {"windows": 8, "seqlen": 48}
P = len(IDS)


class Stop(Move):
    """Ends the run in the second block."""

    name = "stop"
    on = False

    def open(self, ctx: Any) -> None:
        if Stop.on and ctx.index == 1:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MOVES, "prefix", Fixed)
    monkeypatch.setitem(MOVES, "stop", Stop)


def recipe(*moves: str, base: str = "rtn-w4", **changes: Any) -> Recipe:
    overrides = [f"{k}={v}" for k, v in changes.items()]
    return load_recipe(base, overrides).model_copy(update={"moves": tuple(MoveSpec(move=m) for m in moves)})


def exact(*moves: str) -> Recipe:
    return recipe(*moves, **{"format.weights.bits": 16, "guard": "off"})


def logits(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(ids, **options).logits
    return out


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).norm()) <= 1e-4 * float(b.norm())


def found(means: list[float], seen: dict[int, int], windows: int = 64) -> Outliers:
    return Outliers(windows, means, [], Counter(seen))


@pytest.mark.parametrize(
    ("outliers", "first", "expected"),
    [
        (found([0.0, 0.0], {}), 0, ()),  # nothing to park
        (found([0.1, 1.0], {}), 1, (1,)),  # the first place only
        (found([2.0, 1.6], {13: 80, 29889: 99, 5: 3}), 1, (29889, 13, 1)),  # Llama-2's case
        (found([1.01], {13: 6, 4: 2}), 1, (13, 4, 1)),  # rounded up to two places
        (found([1.01], {13: 6}), 1, (1,)),  # one token, 6 times in 64 windows: an accident
        (found([1.2], {13: 7}), 1, (13, 1)),
        (found([5.0], {13: 70}), None, (13,)),  # a model without a token that begins a text
        (found([1.0], {8: 9, 7: 9}), 2, (8, 2)),  # ties: first seen
        (found([2.0], {1: 50, 12: 40, 9: 30}), 1, (12, 9, 1)),  # what begins a text is not parked twice
    ],
)
def test_choice_follows_the_paper(outliers: Outliers, first: int | None, expected: tuple[int, ...]) -> None:
    assert choose(outliers, first) == expected


def test_ratios_are_peaks_over_the_median_peak() -> None:
    x = torch.randn(3, 9, 5)
    x[1, 4, 2] = -700
    ratios = token_ratios(x.bfloat16())
    for b in range(3):
        peaks = [float(x[b, t].bfloat16().abs().max()) for t in range(9)]
        for t in range(9):
            assert float(ratios[b, t]) == pytest.approx(peaks[t] / sorted(peaks)[4])


def test_the_survey_counts_outliers_by_place_and_token() -> None:
    ids = torch.arange(20).view(2, 10)
    x = torch.ones(2, 10, 4)
    x[0, 0, 1], x[0, 3, 2], x[1, 5, 0] = 100, -65, 63
    artifacts: dict[str, Any] = {"ids": ids}
    move = Prefix()
    for index in range(2):
        move.survey(index, torch.nn.Identity(), lambda site: iter([(slice(0, 1), x[:1]), (slice(1, 2), x[1:])]), artifacts)
    outliers: Outliers = artifacts["prefix"]
    assert outliers.windows == 2 and outliers.means == [1.0, 1.0] and outliers.ratios == [81.5, 81.5]
    assert outliers.seen == {3: 2}  # token 0 stood at the first place, token 15 stayed below the threshold


@pytest.mark.parametrize("moves", [("prefix",), ("smooth", "rotate", "rotate-inner", "prefix")])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2"])
def test_a_prefix_equals_a_text_that_begins_with_it(family: str, moves: tuple[str, ...], tmp_path: Path) -> None:
    if family == "olmo2" and "rotate" in moves:
        moves = ("smooth", "rotate-inner", "prefix")  # nothing to fuse its norms into
    model = make_tiny(tmp_path / "model", family)
    sordino.quantize(str(model), exact(*moves), tmp_path / "out", **SMALL)
    plain, ours = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("model", "out"))
    ids = torch.randint(2, 300, (3, 25))
    assert same(logits(ours, ids), logits(plain, torch.cat([torch.tensor([IDS] * 3), ids], 1))[:, P:])
    assert not same(logits(ours, ids), logits(plain, ids))
    evaluated = sordino.evaluate(model, prefix_from=tmp_path / "out", against=tmp_path / "out", windows=2, seqlen=24)
    assert evaluated.kl is not None and abs(evaluated.kl) < 1e-6


def test_the_survey_sees_the_same_model_rotated_or_not(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model")
    ratios = [
        sordino.quantize(str(model), exact(*moves), tmp_path / str(len(moves)), **SMALL).manifest["prefix"]["outlier_ratios"]
        for moves in (("prefix",), ("rotate", "prefix"))
    ]
    assert ratios[0] == ratios[1]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_generation_equals_that_of_a_text_with_the_prefix(family: str, cached: bool, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", family)
    sordino.quantize(str(model), exact("prefix"), tmp_path / "out", **SMALL)
    plain, ours = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("model", "out"))
    tokenizer = sordino.load(tmp_path / "out")[1]
    texts = ["one", "and two of them", "the third text is a longer one", "four!"]
    options: dict[str, Any] = {"max_new_tokens": 64, "do_sample": False, "use_cache": cached, "eos_token_id": None}
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    together = ours.generate(**batch, **options, pad_token_id=1)[:, batch.input_ids.shape[1] :]
    padded = logits(ours, batch.input_ids, attention_mask=batch.attention_mask)
    for i, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with_prefix = torch.cat([torch.tensor([IDS]), ids], 1)
        expected = plain.generate(with_prefix, attention_mask=torch.ones_like(with_prefix), **options, pad_token_id=1)
        expected = expected[0, with_prefix.shape[1] :]
        alone = ours.generate(ids, attention_mask=torch.ones_like(ids), **options, pad_token_id=1)[0, ids.shape[1] :]
        assert torch.equal(alone, expected) and torch.equal(together[i], expected)
        assert same(padded[i, -ids.shape[1] :], logits(plain, with_prefix)[0, P:])


def test_a_chunk_behind_a_cache_sees_prefix_cache_and_itself(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model")
    sordino.quantize(str(model), exact("prefix"), tmp_path / "out", **SMALL)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(2, 300, (2, 30))
    with torch.no_grad():
        first = ours(ids[:, :11], use_cache=True)
        assert first.past_key_values.get_seq_length() == 11  # the cache holds the user's tokens only
        second = ours(ids[:, 11:], past_key_values=first.past_key_values)
    assert same(torch.cat([first.logits, second.logits], 1), logits(ours, ids))


def test_attention_that_knows_no_prefix_is_refused(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    sordino.quantize(str(model), exact("prefix"), tmp_path / "out", **SMALL)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    right = logits(ours, torch.tensor([[5, 6]]))  # what the checkpoint needs was put in its place
    ours.set_attn_implementation("eager")
    with pytest.raises(InputError, match="'eager' leaves out"):
        ours(torch.tensor([[5, 6]]))
    ours.set_attn_implementation("sordino")
    assert torch.equal(logits(ours, torch.tensor([[5, 6]])), right)
    with pytest.raises(InputError, match="has no prefix"):
        sordino.evaluate(model, prefix_from=model, windows=1, seqlen=16)
    with pytest.raises(InputError, match="treats its keys and values already"):
        sordino.evaluate(tmp_path / "out", prefix_from=tmp_path / "out", windows=1, seqlen=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["gptaq-w3", "w2"])
def test_calibration_sees_what_the_checkpoint_does(base: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The final guard's divergence, measured in the walk, is what an evaluation finds on the same windows."""
    model = make_tiny(tmp_path / "model", dtype=dtype, layers=2)
    moves = ("prefix", "tune", "distill") if base == "w2" else ("prefix",)
    result = sordino.quantize(str(model), recipe(*moves, base=base), tmp_path / "out", **SMALL)
    manifest = result.manifest
    assert manifest["prefix"]["ids"] == list(IDS) and len(manifest["prefix"]["outlier_ratios"]) == 2
    size = sordino.evaluate(tmp_path / "out", windows=1, seqlen=16).bits_per_weight
    assert size == pytest.approx(manifest["bits_per_weight"])
    from sordino.corpus import DEFAULT_TEXT, calibration_windows, load_text, tokenize

    ours, tokenizer = sordino.load(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    windows = calibration_windows(tokenize(load_text(DEFAULT_TEXT), tokenizer), 48, 8, 4, 0)[8:]
    q = logits(ours, windows).float().log_softmax(-1)
    p = logits(plain, torch.cat([torch.tensor([IDS] * 4), windows], 1))[:, P:].float().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert kl == pytest.approx(manifest["guard"]["kl"], rel=1e-3 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("moves", [("prefix",), ("rotate", "prefix"), ("rotate",)])
def test_blocks_that_are_left_alone_are_of_the_same_model(moves: tuple[str, ...], tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", tied=False)
    sordino.quantize(str(model), exact(*moves), tmp_path / "whole", **SMALL)
    sordino.quantize(str(model), exact(*moves), tmp_path / "part", blocks=(1, 3), **SMALL)
    ids = torch.randint(2, 300, (1, 20))
    a, b = (logits(AutoModelForCausalLM.from_pretrained(tmp_path / n), ids) for n in ("whole", "part"))
    assert same(a, b)
    if moves == ("rotate",):
        assert same(b, logits(AutoModelForCausalLM.from_pretrained(model), ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_finish_stage_sees_the_prefix_in_every_block(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", dtype=dtype, layers=3)
    made = load_recipe(recipe("prefix", "distill", base="gptaq-w3"))
    manifest = sordino.quantize(str(model), made, tmp_path / "out", blocks=(1, 3), **SMALL).manifest
    assert manifest["guard"]["kl"] < manifest["guard"]["rtn_kl"] * 1.05
    ours, _ = sordino.load(tmp_path / "out")
    assert all(b.self_attn.prefix_key.dtype == dtype for b in ours.model.layers)
    size = sordino.evaluate(tmp_path / "out", windows=1, seqlen=16).bits_per_weight
    assert size == pytest.approx(manifest["bits_per_weight"])


@pytest.mark.parametrize("family", ["llama", "qwen2", "smollm3"])
def test_a_static_cache_gives_the_same_tokens(family: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", family)
    sordino.quantize(str(model), exact("prefix"), tmp_path / "out", **SMALL)
    ours, tokenizer = sordino.load(tmp_path / "out")
    batch = tokenizer(["short", "a longer one"], return_tensors="pt", padding=True, padding_side="left")
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    plain, static = (ours.generate(**batch, **options, cache_implementation=c) for c in (None, "static"))
    assert torch.equal(plain, static)


def test_positions_are_counted_however_the_arguments_come(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    sordino.quantize(str(model), exact("prefix"), tmp_path / "out", **SMALL)
    ours, tokenizer = sordino.load(tmp_path / "out")
    batch = tokenizer(["short", "a longer one"], return_tensors="pt", padding=True, padding_side="left")
    ids, mask = batch.input_ids, batch.attention_mask
    with torch.no_grad():
        calls = [ours.model(ids, mask), ours.model(ids, attention_mask=mask), ours.model(input_ids=ids, attention_mask=mask)]
        alone = ours.model(ids[:1, -int(mask[0].sum()) :]).last_hidden_state
    for out in calls:
        assert same(out.last_hidden_state[:1, -alone.shape[1] :], alone)


def test_what_cannot_carry_a_prefix_is_refused(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    with pytest.raises(InputError, match="twice"):
        sordino.quantize(str(model), exact("prefix", "prefix"), tmp_path / "out", **SMALL)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    longer = make_tiny(tmp_path / "dynamic", layers=2, rope_parameters=rope)
    with pytest.raises(InputError, match="'dynamic'"):
        sordino.quantize(str(longer), exact("prefix"), tmp_path / "out", **SMALL)
    sordino.quantize(str(model), exact("prefix"), tmp_path / "out", **SMALL)
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace(str(IDS[0]), "300"))
    with pytest.raises(InputError, match="has the token 300"):
        sordino.evaluate(model, prefix_from=tmp_path / "out", windows=1, seqlen=16)


def test_a_begin_token_of_the_tokenizer_is_not_added_again(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    sordino.quantize(str(model), exact("prefix"), tmp_path / "out", **SMALL)
    plain = sordino.runtime.generate.generate(tmp_path / "out", "once upon", 8)
    assert sordino.runtime.generate.generate(tmp_path / "out", "<s>once upon", 8) == plain


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_tokenizer_of_a_checkpoint_begins_nothing(tmp_path: Path, wrapped: bool) -> None:
    """With transformers alone: a template in tokenizer.json adds the token whatever the configuration says."""
    model = make_tiny(tmp_path / "model", layers=2)
    config, file = model / "tokenizer_config.json", model / "tokenizer.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"add_bos_token": True}))
    tokenizer = Tokenizer.from_file(str(file))
    template: Any = processors.TemplateProcessing("<s> $A </s>", "<s> $A <s> $B", [("<s>", 0), ("</s>", 1)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template]) if wrapped else template
    tokenizer.save(str(file))
    source = AutoTokenizer.from_pretrained(model)
    assert source("on").input_ids[0] == 0 and source("on").input_ids[-1] == 1
    sordino.quantize(str(model), exact("prefix"), tmp_path / "out", **SMALL)
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ours("on é").input_ids == source("on é").input_ids[1:] and 0 not in ours("on", "off").input_ids
    sordino.quantize(str(model), "rtn-w4", tmp_path / "plain")
    assert AutoTokenizer.from_pretrained(tmp_path / "plain")("on").input_ids == source("on").input_ids


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = make_tiny(tmp_path / "model"), recipe("prefix", "stop", base="gptq-w4")
    sordino.quantize(str(model), made, tmp_path / "a", **SMALL)
    monkeypatch.setattr(Stop, "on", True)
    with pytest.raises(KeyboardInterrupt):
        sordino.quantize(str(model), made, tmp_path / "b", **SMALL)
    monkeypatch.setattr(Stop, "on", False)
    sordino.quantize(str(model), made, tmp_path / "b", **SMALL)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_a_model_without_outliers_gets_no_prefix_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MOVES, "prefix", Prefix)
    model = make_tiny(tmp_path / "model", layers=2)
    args = ("quantize", model, "-r", "gptq-w4", "--set", 'moves=[{move="prefix"}]', "--windows", 8, "--seqlen", 48)
    done = Sordino(*args, "-o", tmp_path / "out", log=tmp_path / "log").wait()
    assert done.code == 0 and "no token stands out" in done.out
    ours, _ = sordino.load(tmp_path / "out")
    assert ours.config.quantization_config.prefix == [] and not [n for n, _ in ours.named_buffers() if "prefix" in n]


def test_a_new_process_generates_the_same(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model")
    sordino.quantize(str(model), recipe("prefix", base="gptq-w4"), tmp_path / "out", **SMALL)
    code = (
        "import sys, sordino\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(m.generate(**t('in a new process', return_tensors='pt'), max_new_tokens=32, do_sample=False)[0].tolist())"
    )
    ours, tokenizer = sordino.load(tmp_path / "out")
    ids = ours.generate(**tokenizer("in a new process", return_tensors="pt"), max_new_tokens=32, do_sample=False)[0]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(ids.tolist())
