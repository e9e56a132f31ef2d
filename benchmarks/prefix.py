"""What the prefix search costs and what the prefix does to outlier tokens, on a real model in full precision.

python benchmarks/prefix.py --calibrate wiki.valid.raw --evaluate wiki.test.raw --also c4.txt

One row in benchmarks/rows/prefix.jsonl: the tokens, seconds of the search (64 windows of 512, the paper's setting), and with
and without the prefix: perplexity of full precision; by block, the largest over the median token at the input of down_proj,
and the median over the smallest token of queries and keys (before rotary embedding), means over windows. Last, the ratio that a
token of the prefix reaches when it stands in the middle of a text behind the prefix, in the worst block, and what its last
one reaches directly behind it, where some chat templates put it.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sordino
from ladder import ROWS, code_version, keep, texts_parser
from sordino.corpus import eval_windows, load_text, tokenize
from sordino.protect.prefix import token_ratios
from sordino.recipe import MoveSpec, load_recipe
from sordino.runtime.attention import attach
from sordino.runtime.prefix import prefix_ids

SEARCH = {"windows": 64, "seqlen": 512}
LOOK = {"windows": 16, "seqlen": 512}


def main() -> None:
    args = texts_parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        row = search(args.model, args.calibrate, out)
        row["before"], row["after"] = (magnitudes(args.model, args.calibrate, p) for p in (None, out))
        row["later"] = {str(t): later(args.model, args.calibrate, out, t, LOOK["seqlen"] // 2) for t in row["ids"]}
        row["again"] = later(args.model, args.calibrate, out, row["ids"][-1], 0)
        texts = [("ppl", args.evaluate, args.windows)] + ([("c4_ppl", args.also, 16)] if args.also else [])
        for name, text, windows in texts:
            for key, prefix in (("before", None), ("after", out)):
                row[key][name] = sordino.evaluate(args.model, text=text, windows=windows, prefix_from=prefix).ppl
    row |= {"name": "prefix", "model": args.model, "seed": 0, "windows": args.windows, "version": code_version()}
    keep(ROWS / "prefix.jsonl", row)
    print(json.dumps(row, indent=1))


def search(model: str, text: str, out: Path) -> dict[str, Any]:
    """Find the prefix and make its keys and values; nothing is rounded."""
    recipe = load_recipe("rtn-w4", ["format.weights.bits=16", "guard=off"])
    recipe = recipe.model_copy(update={"moves": (MoveSpec(move="prefix"),)})
    began: dict[str, float] = {}

    def progress(what: str, *_: int) -> None:
        began.setdefault(what, time.time())

    cpu = time.process_time()
    found = sordino.quantize(model, recipe, out, text=text, progress=progress, **SEARCH).manifest["prefix"]
    return {
        "ids": found["ids"],
        "tokens": found["tokens"],
        "search_seconds": round(began["block"] - began["survey"], 1),
        "whole_run_cpu_seconds": round(time.process_time() - cpu, 1),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


@torch.no_grad()
def magnitudes(name: str, text: str, prefix: Path | None) -> dict[str, list[float]]:
    """Ratios by block, means over windows."""
    model, tokenizer = sordino.load(name)
    if prefix is not None:
        attach(model, prefix_ids(prefix))
    found: dict[str, list[list[float]]] = {}

    def record(key: str, index: int, x: Tensor) -> None:
        ratios = token_ratios(x)
        found.setdefault(key, [[] for _ in layers])[index].append(float(ratios.max() if key == "down" else 1 / ratios.min()))

    layers = model.get_decoder().layers
    for i, layer in enumerate(layers):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, i=i: record("down", i, args[0]))
        for key, linear in (("query", layer.self_attn.q_proj), ("key", layer.self_attn.k_proj)):
            linear.register_forward_hook(lambda _, __, y, i=i, key=key: record(key, i, y))
    for window in eval_windows(tokenize(load_text(text), tokenizer), LOOK["seqlen"], LOOK["windows"]):
        model.get_decoder()(input_ids=window[None], use_cache=False)
    return {key: [round(sum(r) / len(r), 2) for r in blocks] for key, blocks in found.items()}


@torch.no_grad()
def later(name: str, text: str, prefix: Path, token: int, place: int) -> float:
    """Largest over blocks of the mean over windows of the ratio that the token has in some place of a window."""
    model, tokenizer = sordino.load(name)
    attach(model, prefix_ids(prefix))
    found: dict[int, list[float]] = {}
    for i, layer in enumerate(model.get_decoder().layers):
        found[i] = []
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, args, i=i: found[i].append(float(token_ratios(args[0]).flatten()[place]))
        )
    for window in eval_windows(tokenize(load_text(text), tokenizer), LOOK["seqlen"], LOOK["windows"]):
        window = window.clone()
        window[place] = token
        model.get_decoder()(input_ids=window[None], use_cache=False)
    return round(max(sum(r) / len(r) for r in found.values()), 2)


if __name__ == "__main__":
    main()
