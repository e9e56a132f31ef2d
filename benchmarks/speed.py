"""Prefill and decode of random checkpoints beside full precision in transformers, in one run each (`sordino bench --shape`).

    python benchmarks/speed.py [--threads 2] [--shapes smollm2-135m llama-3.2-1b] [--parts short 2048 "no call" long]

short    after 512 tokens
2048     after 2048 tokens
no call  the same without the one native call a token (SORDINO_ONE_CALL=off)
long     after 8128 tokens, keys and values in bf16 and in 4 bits

What the numbers are does not matter to speed. Nothing else should run on the machine. One JSON row a part and shape goes to
benchmarks/rows/speed.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ladder import ROWS, code_version, cpu, keep, speed
from sordino.recipe import load_recipe

SORDINO = str(Path(sys.executable).parent / "sordino")
KV4 = 'format.kv={bits=4, mode="dynamic", symmetric=false}'
CHECKPOINTS: dict[str, tuple[str, list[str]]] = {
    "W4": ("rtn-w4", []),
    "W4KV4": ("rtn-w4", [KV4]),
    "W2 additive": ("d2quant-w2", []),
    "W4A8KV4 static": ("prefixquant-w4a8kv4-static", []),
    "W4A8KV4 dynamic": ("prefixquant-w4a8kv4-dynamic", []),
    "W4A4KV4 static": ("prefixquant-w4a4kv4-static", []),
    "W4A4KV4 dynamic": ("prefixquant-w4a4kv4-dynamic", []),
}
# part -> (checkpoints, tokens of the prompt, environment)
PARTS: dict[str, tuple[list[str], int, dict[str, str]]] = {
    "short": (["W4", "W2 additive", *(n for n in CHECKPOINTS if n.endswith("ic"))], 512, {}),
    "2048": (["W4A8KV4 static"], 2048, {}),
    "no call": (["W4", "W4A8KV4 static"], 512, {"SORDINO_ONE_CALL": "off"}),
    "long": (["W4", "W4KV4"], 8128, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="*", default=["smollm2-135m", "llama-3.2-1b"])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    for shape in args.shapes:
        for part in args.parts:
            row = {"part": part, "subject": shape, "version": code_version(), "cores": os.cpu_count()}
            row |= {"cpu": cpu(), "gflops": speed()}
            row["bench"] = bench(shape, *PARTS[part], args.threads)
            keep(ROWS / "speed.jsonl", row)
            print(shape, part, json.dumps(row["bench"])[:300], flush=True)


def recipe_file(name: str, folder: Path) -> Path:
    """One of the checkpoints above as a recipe of its own."""
    recipe, sets = CHECKPOINTS[name]
    file = folder / f"{name}.toml"
    file.write_text(load_recipe(recipe, [*sets, "format.embeddings=8"]).to_toml())
    return file


def bench(shape: str, names: list[str], tokens: int, env: dict[str, str], threads: int) -> dict[str, Any]:
    """What `sordino bench` measures."""
    with tempfile.TemporaryDirectory() as folder:
        given = []
        for name in names:
            given += ["-r", str(recipe_file(name, Path(folder)))]
        out = Path(folder) / "bench.json"
        options = ["--prompt-tokens", str(tokens), "--new-tokens", "32", "--threads", str(threads), "--json", str(out)]
        command = [SORDINO, "bench", "--shape", shape, *given, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | env)
        result: dict[str, Any] = json.loads(out.read_text())
    # Names instead of this machine's files; full precision comes behind the checkpoints.
    for name, model in zip(names, result["models"], strict=False):
        model["model"] = name
    result["model"] = names[0]
    return result


if __name__ == "__main__":
    main()
