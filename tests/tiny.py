"""A small random model of every family with a real tokenizer, and the command line in processes of its own."""

import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import sordino
from sordino.cli import app
from sordino.corpus import DEFAULT_TEXT, calibration_windows, load_text, tokenize
from sordino.protect.prefix import Prefix

STORIES = Path(__file__).parent / "data" / "stories260k"  # a trained model, however small
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2")
_OPTIONS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 32},
    "qwen3": {"head_dim": 32},
}
_HEAD_DIM = ("llama", "mistral")  # families whose config defaults to head_dim=128
_MERGES = "Ġ t,h e,i n,e r,Ġ a,o n,r e,Ġt he,Ġ s,a t,e n,o r,Ġ o,e s,i s,t e,Ġ c,i t,Ġ i,Ġ f,a l,a r,t h,l e,Ġ b,Ġ m"
_MERGES += ",Ġ p,Ġo f,in g,Ġ w,t i,Ġi s,c t,m e,e d,s t,n t,Ġ re,a n,d e,ti on,u l"
_CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


IDS = (70, 12, 0)


class Fixed(Prefix):
    """Random models have no outliers: the tokens are given, everything else is the move's own."""

    def prefix(self, artifacts: dict[str, Any], first: int | None) -> tuple[int, ...]:
        assert first == 0
        return IDS


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of exactly 300 tokens, put together by hand: any text works, nothing is trained or downloaded."""
    merges = [tuple(m.split()) for m in _MERGES.split(",")]
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = _CHAT
    return fast


def make_tiny(
    path: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    tied: bool = True,
    layers: int = 4,
    seed: int = 0,
    ffn: int = 96,
    **options: Any,
) -> Path:
    """Save a random model of a family and its tokenizer into ``path``; the same arguments give the same bytes.

    ``ffn=172`` is no multiple of 32. Norms and biases are random too, so that a path that drops them is noticed.
    """
    tokenizer = make_tokenizer()
    defaults = {
        "hidden_size": 64, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 512, "tie_word_embeddings": tied,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "initializer_range": 0.1,
    }  # fmt: skip
    if family in _HEAD_DIM:
        defaults["head_dim"] = 16
    config = AutoConfig.for_model(family, **defaults | _OPTIONS.get(family, {}) | options)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.1 * torch.randn_like(parameter) + float(name.endswith("norm.weight")))
    model.to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)


def tell_stories(file: Path, seed: int) -> str:
    """A file of stories sampled from stories260k in full precision, and its name."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    begin = torch.full((32, 1), tokenizer.bos_token_id)
    stories = model.generate(begin, do_sample=True, max_new_tokens=255, eos_token_id=None, pad_token_id=0)
    file.write_text("\n\n".join(tokenizer.batch_decode(stories, skip_special_tokens=True)))
    return str(file)


# The command line, each call in a process of its own. Children are forked from a server that has imported torch once.

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["tiny", "sordino.cli", "sordino.api", "sordino.measure.evaluate", "transformers.models.llama.modeling_llama"]
)


@dataclass(frozen=True)
class Done:
    """How a call ended: exit code (negative: the signal that killed it), stdout, stderr."""

    code: int
    out: str
    err: str


class Sordino:
    """A running ``sordino`` command.

    Args:
        args: of the command line.
        log: folder for what it prints.
        env: further environment variables.
        file_limit: bytes that a file may have; writing more fails (EFBIG), as it would on a full disk.
        prepare: called in the process before anything else; a function of a module, picklable.
    """

    def __init__(
        self,
        *args: object,
        log: Path,
        env: Mapping[str, str] | None = None,
        file_limit: int | None = None,
        prepare: Callable[[], None] | None = None,
    ):
        self._log = log
        log.mkdir(parents=True, exist_ok=True)
        self.process = _FORKS.Process(target=_child, args=([str(a) for a in args], log, dict(env or {}), file_limit, prepare))
        self.process.start()

    def wait(self, timeout: float = 120) -> Done:
        """Wait for its end."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s")
        return Done(self.process.exitcode, *((self._log / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")))


def run(*words: str) -> str:
    """What the command line prints, in this process; it must succeed."""
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def _child(args: list[str], log: Path, env: dict[str, str], file_limit: int | None, prepare: Any) -> None:
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        stream.flush()
        os.dup2(os.open(log / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    os.environ |= env
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if prepare is not None:
        prepare()
    sys.argv = ["sordino", *args]
    from sordino.cli import main

    main()


def assert_same_function(model: Path, out: Path, changed: Sequence[str]) -> tuple[Any, Any, torch.Tensor]:
    """Weights ``changed`` (paths of linears) differ between two checkpoints, what they compute does not (fp32, 1e-4).

    Returns both models, and the token ids they were compared on.
    """
    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ours, tokenizer = sordino.load(out, dtype=torch.float32)
    for name in changed:
        a, b = (m.get_submodule(name).weight for m in (exact, ours))
        assert not torch.allclose(a, b)
    ids = tokenizer("the function stays", return_tensors="pt").input_ids
    with torch.no_grad():
        a, b = exact(ids).logits, ours(ids).logits
    assert (a - b).norm() <= 1e-4 * a.norm()
    return exact, ours, ids


def assert_seen_in_the_walk(model: Path, out: Path, manifest: Mapping[str, Any]) -> None:
    """A checkpoint made of 16 windows of 48 diverges as its walk measured on held-out ones, and has the bits it was to have."""
    ours, tokenizer = sordino.load(out)
    plain = AutoModelForCausalLM.from_pretrained(model)
    windows = calibration_windows(tokenize(load_text(DEFAULT_TEXT), tokenizer), 48, 16, 4, 0)[16:]
    with torch.no_grad():
        q, p = (m(windows, use_cache=False).logits.log_softmax(-1) for m in (ours, plain))
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(manifest["guard"]["kl"], rel=1e-2)
    size = sordino.evaluate(out, windows=1, seqlen=16).bits_per_weight
    assert size == pytest.approx(manifest["bits_per_weight"])
