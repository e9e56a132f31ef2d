"""The protected system prompt: equal to a text that begins with it, never rounded, never sent twice."""

from __future__ import annotations

import heapq
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache

import sordino
from sordino.corpus import calibration_windows, load_text, tokenize
from sordino.errors import InputError
from sordino.protect.prefix import Prefix
from sordino.protect.prompt import join_prompt, read_prompt, tokenize_prompt
from sordino.recipe import MoveSpec, load_recipe
from sordino.runtime.cache import PackedLayer
from sordino.runtime.generate import chat_inputs, generate, own_inputs
from sordino.runtime.prefix import KEY, VALUE, already_there
from sordino.walk.attention import NAME as WINDOW_ATTENTION
from sordino.walk.attention import watched
from tiny import make_tiny, make_tokenizer

TEXT = "Be kind and brief."
SMALL: dict[str, Any] = {"windows": 8, "seqlen": 48}
EXACT = ("format.weights.bits=16", "guard=off")
BEGIN = {  # as in Llama 3: the token that begins a text is put there whatever the tokenizer's config says
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
}
TOKENS = st.lists(st.integers(0, 3), max_size=6)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(ids).logits
    return out


def test_equals_one_pass(tmp_path: Path) -> None:
    """Quantizers off: keys and values made beforehand give what one pass over prompt and text gives (spec 11.3)."""
    made = make_tiny(tmp_path / "m")
    result = sordino.quantize(str(made), "rtn-w4", tmp_path / "out", overrides=EXACT, system_prompt=TEXT, **SMALL)
    model, tokenizer = sordino.load(tmp_path / "out")
    ids = torch.tensor([result.manifest["prefix"]["ids"]])
    opening = tokenizer.apply_chat_template([{"role": "system", "content": TEXT}], return_dict=True)["input_ids"]
    assert ids[0].tolist() == opening
    text = torch.tensor([[70, 30, 41, 12, 99]])
    whole = logits(AutoModelForCausalLM.from_pretrained(made), torch.cat([ids, text], 1))[:, ids.shape[1] :]
    mine = logits(model, text)
    assert float((mine - whole).norm()) <= 1e-4 * float(whole.norm())
    alone = logits(AutoModelForCausalLM.from_pretrained(made), text)
    assert float((mine - alone).norm()) > 1e-2 * float(whole.norm())  # the prompt does something


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_behind_outlier_tokens_in_a_turned_basis(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smoothed and rotated, behind outlier tokens, quantizers off: what one pass over all of it gives (spec 11.2, 11.3)."""
    monkeypatch.setattr(Prefix, "prefix", lambda *_: (70, 12, 0))  # random models have no outliers
    made = make_tiny(tmp_path / "m", family)
    moves = tuple(MoveSpec(move=m) for m in ("smooth", "rotate", "rotate-inner", "prefix"))
    recipe = load_recipe("rtn-w4", EXACT).model_copy(update={"moves": moves})
    manifest = sordino.quantize(str(made), recipe, tmp_path / "out", system_prompt=TEXT, **SMALL).manifest
    before = manifest["prefix"]["ids"]
    assert before[:3] == [70, 12, 0] and len(before) == 3 + manifest["system_prompt"]["tokens"]
    plain, model = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("m", "out"))
    text = torch.randint(2, 300, (3, 25))
    whole = logits(plain, torch.cat([torch.tensor([before] * 3), text], 1))[:, len(before) :]
    assert float((logits(model, text) - whole).norm()) <= 1e-4 * float(whole.norm())


def test_calibration_and_training_see_it_as_past(tmp_path: Path) -> None:
    """The final guard's divergence, measured in the walk, is what the checkpoint shows on the same windows."""
    made = make_tiny(tmp_path / "m", layers=2)
    recipe = load_recipe("w2").model_copy(update={"moves": tuple(MoveSpec(move=m) for m in ("tune", "distill"))})
    manifest = sordino.quantize(str(made), recipe, tmp_path / "out", system_prompt=TEXT, text=heapq.__file__, **SMALL).manifest
    model, tokenizer = sordino.load(tmp_path / "out")
    plain, before = AutoModelForCausalLM.from_pretrained(made), manifest["prefix"]["ids"]
    windows = calibration_windows(tokenize(load_text(heapq.__file__), tokenizer), 48, 8, 4, 0)[8:]
    q = logits(model, windows).log_softmax(-1)
    p = logits(plain, torch.cat([torch.tensor([before] * 4), windows], 1))[:, len(before) :].log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(manifest["guard"]["kl"], rel=1e-3)


def test_prompt_is_never_rounded(tmp_path: Path) -> None:
    """Rounded keys and values: the prompt's stay full precision's, before and after a forward; the text's have at most 2^b
    levels by token and head, and the cache holds the text alone (spec 11.5)."""
    made = make_tiny(tmp_path / "m")
    bits = ("format.kv.bits=3", "guard=off")
    sordino.quantize(str(made), "rtn-w4", tmp_path / "q", overrides=bits, system_prompt=TEXT, **SMALL)
    sordino.quantize(str(made), "rtn-w4", tmp_path / "f", overrides=EXACT, system_prompt=TEXT, **SMALL)
    model, _ = sordino.load(tmp_path / "q")
    exact = {n: t for n, t in sordino.load(tmp_path / "f")[0].named_buffers() if n.rpartition(".")[2] in (KEY, VALUE)}
    assert exact
    cache: Any = DynamicCache()
    with torch.no_grad():
        model(torch.randint(2, 300, (2, 20)), past_key_values=cache)
    for name, tensor in exact.items():
        assert torch.equal(model.get_buffer(name), tensor)
    for layer in cache.layers:
        assert isinstance(layer, PackedLayer) and layer.get_seq_length() == 20
        for packed, scale in zip((layer.keys, layer.values), layer.scales, strict=True):
            assert packed is not None
            values = layer.grid.unpack(packed, scale, model.config.head_dim, torch.float32)
            assert max(len(row.unique()) for row in values.flatten(0, 2)) <= 2**3
    # What attention multiplies: the prompt's own keys and values, then rows of at most so many levels.
    model.set_attn_implementation(WINDOW_ATTENTION)
    for i, layer in enumerate(model.model.layers):
        with torch.no_grad(), watched(layer.self_attn) as calls:
            model(torch.randint(2, 300, (2, 20)), use_cache=False)
        [(_, *operands)] = calls
        for operand, kind in zip(operands, (KEY, VALUE), strict=True):
            prompt = exact[f"model.layers.{i}.self_attn.{kind}"]
            assert operand.shape[2] == prompt.shape[-2] + 20
            before, after = operand.split([prompt.shape[-2], 20], 2)
            assert torch.equal(before, prompt.expand_as(before))
            assert 2 < max(len(row.unique()) for row in after.flatten(0, 2)) <= 2**3


def test_not_sent_twice(tmp_path: Path) -> None:
    made = make_tiny(tmp_path / "m")
    sordino.quantize(str(made), "rtn-w4", tmp_path / "out", system_prompt=TEXT, **SMALL)
    model, tokenizer = sordino.load(tmp_path / "out")
    user = [{"role": "user", "content": "Hello"}]
    full = chat_inputs(model, tokenizer, [{"role": "system", "content": TEXT}, *user])
    bare = chat_inputs(model, tokenizer, user)
    plain = tokenizer.apply_chat_template(user, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert full["input_ids"][0].tolist() == bare["input_ids"][0].tolist() == plain
    run = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**full, **run), model.generate(**bare, **run))
    other = [{"role": "system", "content": "Be rude."}, *user]
    whole = tokenizer.apply_chat_template(other, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat_inputs(model, tokenizer, other)["input_ids"][0].tolist() == whole
    begun = {"input_ids": torch.tensor([model.config.quantization_config.prefix])}
    assert own_inputs(model, begun)["input_ids"].shape == begun["input_ids"].shape  # nothing would be left


def test_turns_that_begin_like_a_text_stay_whole(tmp_path: Path) -> None:
    """In SmolLM2's template the token that begins a text begins every turn; behind another prompt it is the turn's own."""
    made = make_tiny(tmp_path / "m")
    (made / "chat_template.jinja").write_text("{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}")
    sordino.quantize(str(made), "rtn-w4", tmp_path / "out", system_prompt=TEXT, blocks=(0, 1), **SMALL)
    model, tokenizer = sordino.load(tmp_path / "out")
    assert model.config.quantization_config.prefix[0] == model.config.bos_token_id == 0
    for text, kept in ((TEXT, 1), ("Be rude.", 2)):
        talk = [{"role": "system", "content": text}, {"role": "user", "content": "Hello"}]
        ids = chat_inputs(model, tokenizer, talk)["input_ids"][0].tolist()
        assert ids[0] == 0 and ids.count(0) == kept
        assert ids == tokenizer.apply_chat_template(talk[-kept:], return_dict=True)["input_ids"]


def test_what_a_prefix_has_said() -> None:
    prompt = (1, 8, 9, 2)
    assert already_there([1, 8, 9, 2, 1, 7], prompt, 4, 1) == 4 and already_there([8, 9, 2, 1, 7], prompt, 4, 1) == 3
    assert already_there([8, 9, 2, 1, 7], prompt, 4, None) == 0  # 1 begins no text, so it is part of the prompt
    assert already_there([1, 8, 5, 2, 1, 7], prompt, 4, 1) == 0 and already_there([1, 7], prompt, 4, 1) == 0
    assert already_there([1, 7], (5, 1), 0, 1) == 1 and already_there([5, 1, 7], (5, 1), 0, 1) == 0
    assert already_there([1, 7], (1, 5), 0, 1) == 0 and already_there([1], (5, 1), 0, 1) == 0
    assert already_there([1, 7], (), 0, 1) == 0 and already_there([1, 7], (5, 1), 0, None) == 0


def test_generate_puts_it_there_once(tmp_path: Path) -> None:
    """A plain text goes on behind the prompt, whether or not it is sent along; the same as full precision in one pass."""
    made = make_tiny(tmp_path / "m")
    (made / "chat_template.jinja").write_text("{% for m in messages %}<s>{{ m.content }}\n{% endfor %}")
    file = made / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": BEGIN}))
    sordino.quantize(str(made), "rtn-w4", tmp_path / "out", overrides=EXACT, system_prompt=TEXT, **SMALL)
    plain, tokenizer = sordino.load(made)
    ids = tokenizer(f"{TEXT}\none two", return_tensors="pt").input_ids
    assert ids[0, 0] == 0
    out = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0]
    new = tokenizer.decode(out[ids.shape[1] :], skip_special_tokens=True)
    for text in ("one two", f"{TEXT}\none two"):
        assert generate(tmp_path / "out", text, 12) == "one two" + new


def test_a_batch_with_the_prompt_equals_one_without(tmp_path: Path) -> None:
    made = make_tiny(tmp_path / "m")
    bits = ("format.kv.bits=4", "guard=off")
    sordino.quantize(str(made), "rtn-w4", tmp_path / "out", overrides=bits, system_prompt=TEXT, **SMALL)
    model, tokenizer = sordino.load(tmp_path / "out")
    talks = [[{"role": "user", "content": s}] for s in ("one", "and two of them", "the third text is a longer one")]
    system = {"role": "system", "content": TEXT}

    def new(talks: list[Any], own: bool = True) -> torch.Tensor:
        left = {"padding": True, "return_dict": True, "return_tensors": "pt", "tokenizer_kwargs": {"padding_side": "left"}}
        inputs = tokenizer.apply_chat_template(talks, add_generation_prompt=True, **left)
        inputs = own_inputs(model, inputs) if own else inputs
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=1)
        return out[:, inputs["input_ids"].shape[1] :]

    expected = new(talks, own=False)
    assert torch.equal(new([[system, *t] for t in talks]), expected)
    assert torch.equal(new([[system, *talks[0]], talks[1], [system, *talks[2]]]), expected)  # every row by itself
    for talk, row in zip(talks, expected, strict=True):
        assert torch.equal(new([[system, *talk]])[0], row)
    assert not torch.equal(new([[system, *t] for t in talks], own=False), expected)  # it matters


def test_rows_are_cut_at_their_own_beginning() -> None:
    p = [8, 9, 2]
    config = SimpleNamespace(prefix=[5, *p], system_prompt={"text": "", "tokens": 3})
    model = SimpleNamespace(config=SimpleNamespace(bos_token_id=0, quantization_config=config))

    def own(ids: list[list[int]], mask: list[list[int]] | None = None) -> tuple[list[list[int]], list[list[int]]]:
        given = {"input_ids": torch.tensor(ids)} | ({} if mask is None else {"attention_mask": torch.tensor(mask)})
        found = own_inputs(model, given)
        assert mask is None or given["attention_mask"].tolist() == mask  # what was given is left alone
        return found["input_ids"].tolist(), found["attention_mask"].tolist()

    left = own([[1, *p, 50, 51], [1, 1, 60, 61, 62, 63]], [[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    assert left == ([[9, 2, 50, 51], [60, 61, 62, 63]], [[0, 0, 1, 1], [1, 1, 1, 1]])
    right = own([[*p, 50, 1], [*p, 60, 61]], [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    assert right == ([[50, 1], [60, 61]], [[1, 0], [1, 1]])
    assert own([[*p, 50]]) == ([[50]], [[1]]) and own([[8, 9, 7, 50]]) == ([[8, 9, 7, 50]], [[1, 1, 1, 1]])


def test_resume_knows_the_prompt(tmp_path: Path) -> None:
    made = make_tiny(tmp_path / "m")
    first = sordino.quantize(str(made), "rtn-w4", tmp_path / "out", system_prompt=TEXT, **SMALL)
    assert first.manifest["system_prompt"] == {"text": TEXT, "tokens": len(first.manifest["prefix"]["ids"])}
    with pytest.raises(InputError, match="another run"):
        sordino.quantize(str(made), "rtn-w4", tmp_path / "out", system_prompt="Be rude.", **SMALL)


def test_plain_text_begins_once() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    ids = tokenize_prompt("Be kind.", tokenizer, 300, 100).ids
    assert ids == (0, *tokenizer("Be kind.", add_special_tokens=False)["input_ids"])
    with pytest.raises(InputError, match=f"token {max(ids)}, the model only {max(ids)} embeddings"):
        tokenize_prompt("Be kind.", tokenizer, max(ids), 100)


def test_template_without_system_message() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'user' %}[u] {{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(InputError, match="leaves the system message out"):
        tokenize_prompt("Be kind.", tokenizer, 300, 100)
    inside = "[INST] {{ messages[0].content }} / {{ messages[1].content }} [/INST]"  # fails without a user
    tokenizer.chat_template = inside
    assert tokenizer.decode(tokenize_prompt("Be kind.", tokenizer, 300, 100).ids).startswith("[INST] Be kind. /")


@pytest.mark.parametrize(
    ("content", "word"),
    [(None, "read"), (b"", "empty"), (b" \n", "empty"), (b"\xff\xfe\x00", "UTF-8"), (b"a" * 1048577, "1 MiB")],
)
def test_bad_files(tmp_path: Path, content: bytes | None, word: str) -> None:
    file = tmp_path / "p.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=word):
        read_prompt(f"@{file}")


def test_bad_prompts(tmp_path: Path) -> None:
    made = make_tiny(tmp_path / "m")
    for text, word in (("", "empty"), ("word " * 400, "do not fit"), ("\udcff", "UTF-8")):
        with pytest.raises(InputError, match=word) as caught:
            sordino.quantize(str(made), "rtn-w4", tmp_path / "out", system_prompt=text, **SMALL)
        assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


@given(TOKENS, TOKENS, TOKENS)
def test_what_is_there_already(outliers: list[int], prompt: list[int], rest: list[int]) -> None:
    """Dropping gives the request without the prompt, whatever else is in it."""
    prefix = join_prompt(tuple(outliers), tuple(prompt))
    assert list(prefix[len(prefix) - len(prompt) :] if prompt else ()) == prompt
    assert len(prefix) in (len(outliers) + len(prompt), len(outliers) + len(prompt) - 1)
    ids = prompt + rest
    dropped = already_there(ids, prefix, len(prompt), None)
    assert ids[dropped:] == (rest if rest else ids)
