"""Prefill and decode of checkpoints beside full precision in transformers, in one run each (`sordino bench`).

    python benchmarks/speed.py --calibrate wiki.valid.raw [--threads 2] [--only short "no call" long shape] [--shape NAME]

short    smollm2 after 512 tokens
no call  the same without the one native call a token (SORDINO_ONE_CALL=off)
long     after 8128 tokens, keys and values in bf16 and in 4 bits
shape    random weights of a larger model, after 512 tokens

What the numbers are does not matter to speed, so checkpoints are made with eight windows and no guard. Nothing else should
run on the machine. One JSON row a part goes to benchmarks/rows/speed.jsonl.
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

from ladder import ROWS, code_version, keep, speed

SORDINO = str(Path(sys.executable).parent / "sordino")
KV4 = 'format.kv={bits=4, mode="dynamic", symmetric=false}'
CHECKPOINTS: dict[str, tuple[str, list[str]]] = {
    "W4": ("rtn-w4", []),
    "W4, KV4": ("rtn-w4", [KV4]),
    "W4A8KV4, static": ("prefixquant-w4a8kv4-static", []),
    "W4A4KV4, static": ("prefixquant-w4a4kv4-static", []),
    "W4A4KV4, dynamic": ("prefixquant-w4a4kv4-dynamic", []),
}
# part -> (checkpoints, tokens of the prompt, environment)
PARTS: dict[str, tuple[list[str], int, dict[str, str]]] = {
    "short": (["W4", "W4A8KV4, static", "W4A4KV4, static", "W4A4KV4, dynamic"], 512, {}),
    "no call": (["W4", "W4A8KV4, static"], 512, {"SORDINO_ONE_CALL": "off"}),
    "long": (["W4", "W4, KV4"], 8128, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", required=True, help="calibration text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=[*PARTS, "shape"], default=[*PARTS, "shape"])
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--made", help="folder for the checkpoints; those that are there are taken")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for part in args.only:
            names, tokens, env = PARTS.get(part, ([], 512, {}))
            given = [made(n, Path(args.made or folder), args.calibrate) for n in names]
            given += ["--shape", args.shape, "-r", "rtn-w4", "-r", "prefixquant-w4a8kv4-static"] if part == "shape" else []
            result = bench(given, tokens, args.threads, env)
            for name, model in zip(names, result["models"], strict=False):
                model["model"] = name
            subject = args.shape if part == "shape" else "smollm2"
            row = {"part": part, "subject": subject, "version": code_version(), "cores": os.cpu_count(), "gflops": speed()}
            keep(ROWS / "speed.jsonl", row | {"bench": result})
            print(part, json.dumps(result)[:300], flush=True)


def made(name: str, folder: Path, text: str) -> str:
    """A checkpoint of smollm2."""
    recipe, sets = CHECKPOINTS[name]
    out = folder / name.replace(", ", "-")
    if not (out / "sordino.json").is_file():
        options = [x for s in [*sets, "format.embeddings=8", "guard=off"] for x in ("--set", s)]
        command = [SORDINO, "quantize", "smollm2", "-r", recipe, "-o", str(out), "--text", text, "--windows", "8", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return str(out)


def bench(given: list[str], tokens: int, threads: int, env: dict[str, str]) -> dict[str, Any]:
    """What `sordino bench` measures."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        options = ["--prompt-tokens", str(tokens), "--new-tokens", "32", "--threads", str(threads), "--json", str(file)]
        subprocess.run([SORDINO, "bench", *given, *options], check=True, stdout=subprocess.DEVNULL, env=os.environ | env)
        result: dict[str, Any] = json.loads(file.read_text())
    return result


if __name__ == "__main__":
    main()
