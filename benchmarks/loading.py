"""How long a checkpoint takes to be there, beside the same model in bf16: seconds of `sordino.load` in new processes, in turns.

    python benchmarks/loading.py [--shapes smollm2-135m llama-3.2-1b] [--recipes rtn-w4 prefixquant-w4a8kv4-static]

Random weights, written as a bf16 model and quantized from it with 8-bit embeddings; files lie in the page cache. One
JSON row a shape goes to benchmarks/rows/loading.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch
import transformers

from ladder import ROWS, code_version, keep
from sordino.api import load
from sordino.measure.shapes import config_of, shape
from sordino.measure.workers import Order, Worker
from speed import SORDINO

ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="*", default=["smollm2-135m", "llama-3.2-1b"])
    parser.add_argument("--recipes", nargs="*", default=["rtn-w4"])
    args = parser.parse_args()
    for name in args.shapes:
        row = {"subject": name, "version": code_version(), "cores": os.cpu_count(), "threads": args.threads}
        row["seconds"] = measure(name, args.recipes, args.threads)
        keep(ROWS / "loading.jsonl", row)
        print(json.dumps(row), flush=True)


def measure(name: str, recipes: list[str], threads: int) -> dict[str, list[float]]:
    """Seconds of every load, by recipe and "bf16"."""
    with tempfile.TemporaryDirectory() as folder:
        full = Path(folder) / "bf16"
        transformers.AutoModelForCausalLM.from_config(config_of(shape(name)), dtype=torch.bfloat16).save_pretrained(full)
        load("smollm2")[1].save_pretrained(full)  # any tokenizer
        models = {"bf16": full}
        for recipe in recipes:
            models[recipe] = Path(folder) / recipe
            command = [SORDINO, "quantize", str(full), "-r", recipe, "-o", str(models[recipe]), "--no-samples"]
            command += ["--set", "format.embeddings=8", "--set", "guard=off"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds: dict[str, list[float]] = {what: [] for what in models}
        for turn in range(ROUNDS + 1):
            for what, where in models.items():
                with Worker(Order(str(where)), threads, (1, 1)) as worker:
                    took = worker.answer()
                if turn:  # the first round brings the files into memory
                    seconds[what].append(took)
    return seconds


if __name__ == "__main__":
    main()
