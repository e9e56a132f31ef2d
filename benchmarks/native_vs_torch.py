"""Perplexity of checkpoints by the kernels and by torch alone, each in a process of its own.

    python benchmarks/native_vs_torch.py CHECKPOINT … --evaluate wiki.test.raw [--windows 8] [--dtype float32]

Plain forwards of the loaded model, as its users make them: `sordino eval` has an attention of its own. In float32 the two
differ by how the last bits are rounded; in bfloat16 also by how often a sum is. One JSON row a checkpoint goes to
benchmarks/rows/native_vs_torch.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ladder import ROWS, code_version, keep
from sordino.api import load
from sordino.corpus import eval_windows, load_text, tokenize

WAYS = {"native": {}, "torch": {"SORDINO_KERNELS": "off"}}
LENGTH = 2048  # tokens of a window


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--evaluate", required=True, help="text to measure on")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the forwards")
    parser.add_argument("--here", action="store_true", help="print the first checkpoint's perplexity as this process finds it")
    args = parser.parse_args()
    if args.here:
        print(perplexity(args.checkpoints[0], args.evaluate, args.windows, getattr(torch, args.dtype)))
        return
    for checkpoint in args.checkpoints:
        recipe = json.loads((checkpoint / "sordino.json").read_text())["recipe"]
        row: dict[str, Any] = {"recipe": recipe, "version": code_version(), "windows": args.windows, "dtype": args.dtype}
        for way, env in WAYS.items():
            command = [
                sys.executable,
                __file__,
                str(checkpoint),
                "--evaluate",
                args.evaluate,
                "--windows",
                str(args.windows),
                "--dtype",
                args.dtype,
                "--here",
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | env)
            row[way] = float(done.stdout.split()[-1])
        keep(ROWS / "native_vs_torch.jsonl", row)
        print(json.dumps(row), flush=True)


@torch.inference_mode()
def perplexity(checkpoint: Path, text: str, windows: int, dtype: torch.dtype) -> float:
    """Of all tokens but the first of every window."""
    model, tokenizer = load(checkpoint, dtype=dtype)
    losses = []
    for ids in eval_windows(tokenize(load_text(text), tokenizer), LENGTH, windows):
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
        losses.append(float(F.cross_entropy(logits, ids[1:])))
    return math.exp(sum(losses) / len(losses))


if __name__ == "__main__":
    main()
