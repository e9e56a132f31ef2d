"""What protecting a system prompt's keys and values is good for: the controls of BiSup's prompt mixed precision (spec 7.6).

python benchmarks/prompt.py --calibrate wiki.valid.raw --evaluate wiki.test.raw --recipe quarot-w4a4kv4 --system-prompt TEXT

One JSON row a run in benchmarks/rows/prompt.jsonl; docs/system_prompt.md says how to read it. Nothing rounded, in the basis of
the recipe: without a prompt (F0), with it (F1), with the token that begins it alone (FB). Quantized, each held against one of
these: without a prompt (Q0); with keys and values of the prompt that the quantized model made and rounded itself (Q1), that it
made in full width (Q2), that full precision made (Q3); with those of the beginning token alone, full precision's (QB). All Q
share one set of weights, calibrated without a prompt, so that only the prefix differs; "shipped" is what
`quantize --system-prompt` makes, calibrated behind the prompt. Guards are off. All rows score the same tokens. A recipe that
trains smoothing divides the values of its prefix, which full precision's of another run do not fit: it has no Q3 and no QB.
Beside them what passes from token to token (docs/inspect.md) in the model as it is, its keys and values rounded without
rotations or clips at the recipe's width.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

import sordino
from ladder import ROWS, called, code_version, keep, texts_parser, there
from sordino.anatomy import anatomy_of
from sordino.contract import having
from sordino.corpus import eval_windows, load_text, tokenize
from sordino.measure.diffusion import horizontal
from sordino.measure.evaluate import reference
from sordino.measure.inspect import SPREAD
from sordino.measure.prompt import prefix_made_by, put_prefix
from sordino.moves import build_moves
from sordino.recipe import Recipe, load_recipe
from sordino.walk.attention import NAME as WINDOW_ATTENTION

CHAT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HELD_AGAINST = {"F0": ["Q0"], "F1": ["Q1", "Q2", "Q3", "shipped"], "FB": ["QB"]}
SPREAD_FIGURES = ("correlation", "kv_correlation", "shares", "kv_shares")
FROM_FULL = ("Q3", "QB", "FB")  # FB is there for QB alone


def main() -> None:
    args = _arguments()
    recipe = load_recipe(args.recipe, [*args.set, "guard=off"])
    key = {"digest": recipe.digest, "version": code_version(), "seed": args.seed, "model": called(args.model)}
    key |= {"prompt": args.system_prompt, "windows": args.windows, "seqlen": args.seqlen}
    if there(ROWS / "prompt.jsonl", key):
        return
    with tempfile.TemporaryDirectory() as folder:
        models, tokens = make(recipe, Path(folder), args)
        row = {"name": "prompt", **key, "recipe": args.recipe, "overrides": args.set, "prompt_tokens": tokens}
        row |= measure(models, args) | across_tokens(recipe, args)
    # Mean bits of a cached number with the prompt in 16 (Q2, Q3, shipped), at the length of the windows.
    row["kv_bits"] = (16 * tokens + row["rows"]["Q0"]["bits_per_kv"] * args.seqlen) / (tokens + args.seqlen)
    keep(ROWS / "prompt.jsonl", row)
    print(json.dumps(row, indent=1))


def make(recipe: Recipe, work: Path, args: argparse.Namespace) -> tuple[dict[str, Path], int]:
    """The checkpoints by the names of their rows, and how many tokens the prompt has."""
    options: dict[str, Any] = {"text": args.calibrate, "seed": args.seed}
    sordino.quantize(args.model, recipe, work / "Q0", **options)
    sordino.quantize(args.model, unrounded(recipe), work / "F0", **options)
    made = sordino.quantize(args.model, recipe, work / "shipped", system_prompt=args.system_prompt, **options).manifest
    prompt = made["prefix"]["ids"][-made["system_prompt"]["tokens"] :]
    models = {name: work / name for name in ("Q0", "F0", "shipped")}
    left_out = FROM_FULL if any(move.smooths for move in build_moves(recipe.moves)) else ()
    for name, base, by, ids, rounded in (
        ("Q1", "Q0", "Q0", prompt, True),
        ("Q2", "Q0", "Q0", prompt, False),
        ("Q3", "Q0", "F0", prompt, False),
        ("QB", "Q0", "F0", prompt[:1], False),
        ("F1", "F0", "F0", prompt, False),
        ("FB", "F0", "F0", prompt[:1], False),
    ):
        if name in left_out:
            continue
        tensors = prefix_made_by(sordino.load(models[by])[0], ids, rounded)
        models[name] = put_prefix(models[base], work / name, ids, tensors)
    return models, len(prompt)


def unrounded(recipe: Recipe) -> Recipe:
    """The recipe's reshapes alone."""
    moves = [s for s, m in zip(recipe.moves, build_moves(recipe.moves), strict=True) if having([m], "reshape") or m.inner()]
    wide = [f"format.{part}.bits=16" for part in ("weights", "activations", "kv")]
    plain = load_recipe(recipe, [*wide, "format.embeddings=16", "format.head=16"])
    return plain.model_copy(update={"moves": tuple(moves)})


def measure(models: dict[str, Path], args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity and KL of every row, a hash of the tokens, and the differences of log-perplexity that the claims are about."""
    options: dict[str, Any] = {"text": args.evaluate, "seqlen": args.seqlen, "windows": args.windows}
    rows: dict[str, dict[str, Any]] = {}
    tokens = set()
    for full, held in HELD_AGAINST.items():
        if full not in models:
            continue
        exact = reference(models[full], **options)
        assert exact.ids is not None
        tokens.add(hashlib.sha256(exact.ids.numpy().tobytes()).hexdigest()[:16])
        for name in (n for n in (full, *held) if n in models):
            found = sordino.evaluate(models[name], against=exact, **options).to_json()
            rows[name] = {k: found[k] for k in ("ppl", "ppl_stderr", "kl", "kl_stderr", "bits_per_weight", "bits_per_kv")}
    pairs = [(name, full) for full, held in HELD_AGAINST.items() for name in held] + [("Q3", "Q1"), ("Q3", "Q2")]
    gaps = {f"{a} - {b}": round(math.log(rows[a]["ppl"] / rows[b]["ppl"]), 5) for a, b in pairs if {a, b} <= rows.keys()}
    (text_ids,) = tokens
    return {"text_ids": text_ids, "rows": rows, "gaps": gaps}


def across_tokens(recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """Error of later tokens where so many tokens' keys and values stay exact ("doses"), and by which tokens it comes about."""
    exact, tokenizer = sordino.load(args.model, dtype=torch.float32)
    ids = eval_windows(tokenize(load_text(args.evaluate), tokenizer), SPREAD[1], SPREAD[0])
    exact.set_attn_implementation(WINDOW_ATTENTION)
    found = horizontal(exact, anatomy_of(exact), ids, recipe.format.kv.bits, args.seed)
    return {"doses": found.doses, "spread": {k: getattr(found, k) for k in SPREAD_FIGURES}, "spread_windows": list(SPREAD)}


def _arguments() -> argparse.Namespace:
    parser = texts_parser(__doc__)
    parser.add_argument("--recipe", default="quarot-w4a4kv4", help="one that looks for no prefix of its own")
    parser.add_argument("--set", action="append", default=[], help="key=value changes to the recipe")
    parser.add_argument("--system-prompt", default=CHAT)
    parser.set_defaults(seqlen=512)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
