"""What each option of the solver does to the held-out error of the first blocks: minutes instead of the hour of a ladder.

    python benchmarks/solver_options.py --calibrate wiki.valid.raw [--bits 2 3] [--model smollm2]

One row (bits, options) goes to benchmarks/rows/solver_options.jsonl; render.py makes the table. No training, no test text.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import sordino
from ladder import ROWS, code_version, keep
from sordino.recipe import load_recipe

S = "format.weights.solver"
WHOLE = [f'{S}={{name="gptaq", target="whole", alpha=1.0}}']
OPTIONS: dict[str, list[str]] = {
    "GPTQ": [f'{S}="gptq"'],
    "GPTAQ, as published (α = 0.25)": [],
    "GPTAQ + refit": [f"{S}.refit=true"],
    "GPTAQ + weighted + refit": [f"{S}.refit=true", f"{S}.weighted=true"],
    "whole target (α = 1)": WHOLE,
    "whole target + refit": [*WHOLE, f"{S}.refit=true"],
    "whole target + weighted + refit": [*WHOLE, f"{S}.refit=true", f"{S}.weighted=true"],
    "the same, α = 0.6": [*WHOLE, f"{S}.refit=true", f"{S}.weighted=true", f"{S}.alpha=0.6"],
    "the same, α = 1, rotated": [*WHOLE, f"{S}.refit=true", f"{S}.weighted=true", 'moves=[{move="rotate"}]'],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--bits", type=int, nargs="*", default=[2])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=4)
    args = parser.parse_args()
    for bits in args.bits:
        for name, options in OPTIONS.items():
            recipe = load_recipe("gptaq-w2", [f"format.weights.bits={bits}", *options])
            with tempfile.TemporaryDirectory() as folder:
                result = sordino.quantize(
                    args.model, recipe, Path(folder) / "out", text=args.calibrate, windows=args.windows, blocks=(0, args.blocks)
                )
            errors = [b["error"] for b in result.manifest["blocks"] if "error" in b]
            cost = result.run["cpu_seconds"]
            row = {"bits": bits, "name": name, "errors": errors, "cpu_seconds": cost, "version": code_version()}
            keep(ROWS / "solver_options.jsonl", row | {"model": args.model, "windows": args.windows})
            print(bits, name, [round(e, 4) for e in errors], flush=True)


if __name__ == "__main__":
    main()
