"""Memory of the KV cache at 4 bits against bf16, as the resident size of a process, and what those 4 bits alone cost.

python benchmarks/kv_memory.py --calibrate wiki.valid.raw --evaluate wiki.test.raw --also c4.txt [--windows 32]

Keys and values are the only thing that is rounded (static scales by head, behind the prefix). A process of its own fills the
caches of several texts of 2048 tokens and holds them, and nothing else, before its resident size is read again. Each row of
benchmarks/rows/kv_memory.jsonl has bytes per token so measured, those of the cache's tensors, and perplexity.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import sordino
from ladder import ROWS, code_version, figures, keep, texts_parser
from sordino.recipe import load_recipe

TOKENS = 2048
TEXTS = (1, 4, 8)  # the slope over these counts, so that what a forward leaves behind once is not counted
RECIPE = ("prefixquant-w4a4kv4-static", ["format.weights.bits=16", "format.activations.bits=16", "guard=off"])


def main() -> None:
    if sys.argv[1:2] == ["hold"]:
        print(json.dumps(hold(sys.argv[2], int(sys.argv[3]))))
        return
    args = texts_parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = str(Path(folder) / "made")
        recipe = load_recipe(RECIPE[0], [*RECIPE[1], "calibration.windows=32"])
        sordino.quantize(args.model, recipe, made, text=args.calibrate)
        for name, subject in (("bf16", args.model), ("4 bits", made)):
            row = {"name": name, "model": args.model, "windows": args.windows, "seed": 0, "version": code_version()}
            row |= bytes_per_token(subject) | {"tokens": TOKENS, "texts": TEXTS, "cores": os.cpu_count()}
            against = None if subject == args.model else args.model
            row["text"] = figures(subject, args.evaluate, args.windows, against)
            if args.also:
                row["also"] = figures(subject, args.also, 16, against)
            keep(ROWS / "kv_memory.jsonl", row)
            print(json.dumps(row), flush=True)


def bytes_per_token(model: str) -> dict[str, Any]:
    """Slopes of the resident size and of the tensors' size over the number of texts held."""
    held = []
    for texts in TEXTS:
        done = subprocess.run([sys.executable, __file__, "hold", model, str(texts)], capture_output=True, text=True, check=True)
        held.append(json.loads(done.stdout.splitlines()[-1]))
    span = (TEXTS[-1] - TEXTS[0]) * TOKENS
    return {f"{k}_per_token": round((held[-1][k] - held[0][k]) / span, 1) for k in ("resident", "tensors")} | {"held": held}


@torch.no_grad()
def hold(name: str, texts: int) -> dict[str, int]:
    """Growth of this process in bytes by the caches of so many texts, one after the other."""
    model, _ = sordino.load(name)
    torch.manual_seed(0)
    ids = torch.randint(1000, 40000, (texts + 1, 1, TOKENS))
    model(ids[-1], use_cache=True, logits_to_keep=1)  # what only the first forward allocates
    before = resident()
    caches = [model(x, use_cache=True, logits_to_keep=1).past_key_values for x in ids[:-1]]
    for cache in caches:  # the first decoded token makes room for more
        model(ids[-1, :, :1], past_key_values=cache)
    grown = resident() - before
    return {
        "resident": grown,
        "tensors": sum(t.untyped_storage().nbytes() for c in caches for layer in c.layers for t in (layer.keys, layer.values)),
    }


def resident() -> int:
    """Resident size in bytes, after freed memory was given back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
