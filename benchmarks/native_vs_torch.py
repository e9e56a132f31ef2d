"""Perplexity of checkpoints by the kernels and by torch alone, each in a process of its own.

    python benchmarks/native_vs_torch.py CHECKPOINT … --evaluate wiki.test.raw [--windows 8]

A checkpoint's row is named by its folder. One JSON row each goes to benchmarks/rows/native_vs_torch.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ladder import ROWS, code_version, keep
from speed import SORDINO

WAYS = {"native": {}, "torch": {"SORDINO_KERNELS": "off"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--evaluate", required=True, help="text to measure on")
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    for checkpoint in args.checkpoints:
        row: dict[str, Any] = {
            "recipe": checkpoint.name,
            "version": code_version(),
            "windows": args.windows,
            "cores": os.cpu_count(),
        }
        row |= {way: perplexity(checkpoint, args, env) for way, env in WAYS.items()}
        keep(ROWS / "native_vs_torch.jsonl", row)
        print(json.dumps(row), flush=True)


def perplexity(checkpoint: Path, args: argparse.Namespace, env: dict[str, str]) -> dict[str, float]:
    """What `sordino eval` finds."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "eval.json"
        command = [
            SORDINO,
            "eval",
            str(checkpoint),
            "--text",
            args.evaluate,
            "--windows",
            str(args.windows),
            "--json",
            str(out),
        ]
        subprocess.run([*command, "--json", str(out)], check=True, stdout=subprocess.DEVNULL, env=os.environ | env)
        found = json.loads(out.read_text())
    return {key: found[key] for key in ("ppl", "ppl_stderr")}


if __name__ == "__main__":
    main()
