"""Ladder of weight-only recipes on smollm2: quantize, evaluate, keep one JSON row each.

    python benchmarks/weight_only.py --calibrate wiki.valid.raw --evaluate wiki.test.raw [--only NAME …]

Every step is the public command line in its own process, so CPU seconds and memory are a user's. A row is one
(recipe digest, code version, seed); rows that are there are skipped, so the script can be stopped and continued.
`python benchmarks/render.py` turns the rows into docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sordino.recipe import load_recipe

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "benchmarks" / "rows" / "weight_only.jsonl"
G64, SYM = "format.weights.group=64", "format.weights.symmetric=true"

# name -> (recipe, overrides, seeds)
LADDER: dict[str, tuple[str, list[str], list[int]]] = {
    "rtn-w4": ("rtn-w4", [], [0]),
    "gptq-w4": ("gptq-w4", [], [0]),
    "rtn-w3": ("rtn-w4", ["format.weights.bits=3"], [0]),
    "gptq-w3": ("gptq-w3", [], [0, 1, 2]),
    "gptaq-w3": ("gptaq-w3", [], [0, 1, 2]),
    "rtn-w2": ("rtn-w4", ["format.weights.bits=2"], [0]),
    "gptq-w2": ("gptq-w2", [], [0]),
    "gptaq-w2": ("gptaq-w2", [], [0]),
    "rtn-w4 g64 sym": ("rtn-w4", [G64, SYM], [0]),
    "gptq-w4 g64 sym": ("gptq-w4", [G64, SYM], [0]),
    "rtn-w3 g64 sym": ("rtn-w4", ["format.weights.bits=3", G64, SYM], [0]),
    "gptq-w3 g64 sym": ("gptq-w3", [G64, SYM], [0]),
    "gptaq-w3 g64 sym": ("gptaq-w3", [G64, SYM], [0]),
    "rtn-w2 g64 sym": ("rtn-w4", ["format.weights.bits=2", G64, SYM], [0]),
    "gptq-w2 g64 sym": ("gptq-w2", [G64, SYM], [0]),
    "gptaq-w2 g64 sym": ("gptaq-w2", [G64, SYM], [0]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", required=True, help="calibration text (never the test text)")
    parser.add_argument("--evaluate", required=True, help="evaluation text")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--windows", type=int, default=32, help="evaluation windows of 2048")
    parser.add_argument("--only", nargs="*", help="names of rows")
    args = parser.parse_args()
    if "full precision" in (args.only or ["full precision"]):
        row("full precision", None, [], 0, args)
    for name, (recipe, overrides, seeds) in LADDER.items():
        if args.only is None or name in args.only:
            for seed in seeds:
                row(name, recipe, overrides, seed, args)


def row(name: str, recipe: str | None, overrides: list[str], seed: int, args: argparse.Namespace) -> None:
    """Measure one row and append it, unless it is there."""
    digest = load_recipe(recipe, overrides).digest if recipe else "full"
    key = {"digest": digest, "version": code_version(), "seed": seed, "windows": args.windows, "model": args.model}
    have = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.is_file() else []
    if any(all(r.get(k) == v for k, v in key.items()) for r in have):
        return
    work = Path(tempfile.mkdtemp(prefix="sordino-bench-"))
    result = {"name": name, **key, "recipe": recipe, "overrides": overrides, "cores": os.cpu_count()}
    try:
        subject = args.model
        if recipe:
            subject = str(work / "out")
            sets = [x for o in overrides for x in ("--set", o)]
            command = [
                "quantize",
                args.model,
                "-r",
                recipe,
                "-o",
                subject,
                "--text",
                args.calibrate,
                "--seed",
                str(seed),
                *sets,
            ]
            result["quantize"] = run(command)
            manifest = json.loads((work / "out" / "sordino.json").read_text())
            result |= {"guard": manifest["guard"], "coverage": manifest["coverage"]}
            result["fallbacks"] = [b["block"] for b in manifest["blocks"] if b.get("fallback")]
        figures = work / "figures.json"
        run(["eval", subject, "--text", args.evaluate, "--windows", str(args.windows), "--json", str(figures)])
        result |= json.loads(figures.read_text())
    finally:
        shutil.rmtree(work, ignore_errors=True)
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    with open(ROWS, "a") as f:
        f.write(json.dumps(result) + "\n")
    print(f"{name} seed {seed}: PPL {result['ppl']:.3f} at {result['bits_per_weight']:.3f} bits", flush=True)


def run(command: list[str]) -> dict[str, float]:
    """Run the command line; returns wall and CPU seconds and peak bytes of the process."""
    started = time.time()
    process = subprocess.Popen([str(Path(sys.executable).parent / "sordino"), *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    # A final guard's "worse than RTN" (exit 1) keeps its files; the row then says so through the manifest.
    code = os.waitstatus_to_exitcode(status)
    marked = command[0] == "quantize" and (Path(command[command.index("-o") + 1]) / "sordino.json").is_file()
    if code and not (code == 1 and marked):
        raise SystemExit(f"sordino {' '.join(command)} failed with {code}")
    return {
        "seconds": round(time.time() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def code_version() -> str:
    """Version of the code that decides the figures: git's name of the src tree, marked if it has local changes."""
    tree = subprocess.run(["git", "rev-parse", "--short", "HEAD:src"], cwd=ROOT, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain", "src"], cwd=ROOT, capture_output=True, text=True).stdout
    return tree.stdout.strip() + ("-dirty" if dirty.strip() else "")


if __name__ == "__main__":
    main()
