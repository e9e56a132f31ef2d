"""The protected system prompt: equal to a text that begins with it, never rounded, never sent twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import sordino
from sordino.errors import InputError
from sordino.protect.prompt import join_prompt, read_prompt, tokenize_prompt
from sordino.runtime.generate import chat_inputs, own_inputs
from sordino.runtime.prefix import KEY, VALUE, already_there
from tiny import make_tiny, make_tokenizer

TEXT = "Be kind and brief."
SMALL: dict[str, Any] = {"windows": 8, "seqlen": 48}
EXACT = ("format.weights.bits=16", "guard=off")
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


def test_prompt_is_never_rounded(tmp_path: Path) -> None:
    """Rounded keys and values: the prompt's stay full precision's, before and after a forward (spec 11.5)."""
    made = make_tiny(tmp_path / "m")
    bits = ("format.kv.bits=3", "guard=off")
    sordino.quantize(str(made), "rtn-w4", tmp_path / "q", overrides=bits, system_prompt=TEXT, **SMALL)
    sordino.quantize(str(made), "rtn-w4", tmp_path / "f", overrides=EXACT, system_prompt=TEXT, **SMALL)
    model, _ = sordino.load(tmp_path / "q")
    exact = {n: t for n, t in sordino.load(tmp_path / "f")[0].named_buffers() if n.rpartition(".")[2] in (KEY, VALUE)}
    assert exact
    logits(model, torch.tensor([[70, 30, 41]]))
    for name, tensor in exact.items():
        assert torch.equal(model.get_buffer(name), tensor)


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
