"""Ways to compute the same thing with a checkpoint that has a prefix, on a real model: how far apart they are.

python benchmarks/equivalence.py --calibrate wiki.valid.raw --evaluate wiki.test.raw --recipe prefixquant-w4a4kv4-static

For each pair, in fp32 and bf16: mean divergence of the next-token distributions (nat), or how many of 64 greedily generated
tokens agree before the first difference, the worst of four prompts. The first pair is a model in which nothing is rounded,
turned and behind the prefix, against the original that reads the prefix as text (turned weights are stored in bf16); the
second tells what the dtype alone does to the original. The others are the quantized checkpoint against itself. Codes that fall
the other way feed on themselves: the same forward with embeddings moved by a millionth (fp32; bf16 does not hold it) tells
how far apart two correct ways are bound to be. Rows go to benchmarks/rows/equivalence.jsonl.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sordino
from ladder import ROWS, code_version, keep, texts_parser
from sordino.corpus import eval_windows, load_text, tokenize
from sordino.recipe import load_recipe
from sordino.runtime import kernels

EXACT = [
    "format.embeddings=16",
    "format.weights.bits=16",
    "format.activations.bits=16",
    "format.kv.bits=16",
    "guard=off",
    "calibration.windows=16",
]
PROMPTS = ["The capital of France is", "Once upon a time", "In the year 1999, the city of Paris saw its first", "Music"]
LENGTH, WINDOWS, NEW = 256, 4, 64
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}

Logits = Callable[[Any, Tensor], Tensor]


def main() -> None:
    if sys.argv[1:2] == ["tell"]:
        print(json.dumps([tell(sys.argv[2], getattr(torch, sys.argv[3]), [p])[0] for p in PROMPTS]))
        return
    parser = texts_parser(__doc__)
    parser.add_argument("--recipe", default="prefixquant-w4a4kv4-static")
    parser.add_argument("--checkpoint", help="made by this recipe already")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        exact, made = str(Path(folder) / "exact"), args.checkpoint or str(Path(folder) / "made")
        sordino.quantize(args.model, load_recipe(args.recipe, EXACT), exact, text=args.calibrate)
        if not args.checkpoint:
            sordino.quantize(args.model, load_recipe(args.recipe, ["calibration.windows=16"]), made, text=args.calibrate)
        for dtype in (torch.float32, torch.bfloat16):
            for pair, figures in compare(args.model, exact, made, args.evaluate, dtype).items():
                row = {"pair": pair, "dtype": str(dtype).removeprefix("torch."), "recipe": args.recipe, **figures}
                keep(ROWS / "equivalence.jsonl", row | {"model": args.model, "version": code_version()})
                print(row, flush=True)


@torch.no_grad()
def compare(original: str, exact: str, made: str, text: str, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Figures of every pair, by its name."""
    plain, tokenizer = sordino.load(original, dtype=dtype)
    ids = eval_windows(tokenize(load_text(text), tokenizer), LENGTH, WINDOWS)
    turned, _ = sordino.load(exact, dtype=dtype)
    before = torch.tensor(turned.config.quantization_config.prefix, dtype=torch.long)
    as_text = torch.cat([before.expand(len(ids), -1), ids], 1)
    found = {"prefix in a turned basis / as text": apart(plain(as_text).logits[:, len(before) :], turned(ids).logits)}
    finer, _ = sordino.load(original, dtype=torch.float32)
    found["original in fp32 / in this dtype"] = apart(finer(as_text).logits, plain(as_text).logits)
    del plain, turned, finer
    model, _ = sordino.load(made, dtype=dtype)
    whole = model(ids, use_cache=False).logits
    found["token by token through the cache / one forward"] = apart(whole, through_the_cache(model, ids))
    found["padded / alone"] = apart(whole, padded(model, ids))
    with kernels.using("off"):
        found["torch / native kernels"] = apart(whole, model(ids, use_cache=False).logits)
    found["moved by a millionth / not"] = apart(whole, moved(model, ids))
    said = [tell(made, dtype, [p])[0] for p in PROMPTS]
    others = {
        "batch of 4, padded / alone": tell(made, dtype, PROMPTS),
        "without a cache / with one": tell(made, dtype, PROMPTS[:1], use_cache=False),
        "another process / this one": elsewhere(made, dtype),
    }
    for name, lines in others.items():
        equal = min(agreed(a, b) for a, b in zip(said, lines, strict=False))
        found[name] = {"equal_tokens": equal, "of": NEW}
    return found


def apart(a: Tensor, b: Tensor) -> dict[str, Any]:
    """Mean divergence, and how often the most likely token is another."""
    p, q = (t.double().log_softmax(-1) for t in (a, b))
    return {"kl": float((p.exp() * (p - q)).sum(-1).mean()), "top1": float((p.argmax(-1) == q.argmax(-1)).double().mean())}


def through_the_cache(model: Any, ids: Tensor) -> Tensor:
    """Logits of a prefill of half a text, and of the rest one token at a time."""
    half = ids.shape[1] // 2
    out = model(ids[:, :half], use_cache=True)
    logits = [out.logits]
    for i in range(half, ids.shape[1]):
        out = model(ids[:, i : i + 1], past_key_values=out.past_key_values)
        logits.append(out.logits)
    return torch.cat(logits, 1)


def padded(model: Any, ids: Tensor) -> Tensor:
    """Logits of the texts behind (and before) different numbers of padding tokens."""
    length, starts = ids.shape[1], [3 + 5 * i for i in range(len(ids))]
    batch = torch.zeros(len(ids), starts[-1] + length, dtype=ids.dtype)
    mask = torch.zeros_like(batch)
    for i, start in enumerate(starts):
        batch[i, start : start + length], mask[i, start : start + length] = ids[i], 1
    logits = model(batch, attention_mask=mask, use_cache=False).logits
    return torch.stack([row[start : start + length] for row, start in zip(logits, starts, strict=True)])


def moved(model: Any, ids: Tensor) -> Tensor:
    """Logits of texts whose embeddings have noise of a millionth: what rounding to few codes makes of any difference."""
    embeddings = model.get_input_embeddings()(ids)
    return model(inputs_embeds=embeddings * (1 + 1e-6 * torch.randn_like(embeddings)), use_cache=False).logits


def tell(name: str, dtype: torch.dtype, prompts: list[str], **options: Any) -> list[list[int]]:
    """What the model says after each prompt, greedily, in one batch."""
    model, tokenizer = sordino.load(name, dtype=dtype)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    said = model.generate(**batch, **GREEDY, **options, pad_token_id=tokenizer.eos_token_id)
    return [row[batch.input_ids.shape[1] :].tolist() for row in said]


def elsewhere(name: str, dtype: torch.dtype) -> list[list[int]]:
    """The same from another process."""
    words = [sys.executable, __file__, "tell", name, str(dtype).removeprefix("torch.")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return [list(map(int, row)) for row in json.loads(done.stdout.splitlines()[-1])]


def agreed(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


if __name__ == "__main__":
    main()
