"""What ladders of recipes share: quantize in a process of its own, evaluate, keep one JSON row each.

Quantization is the public command line, so CPU seconds and memory are a user's. A row is one (recipe digest, code version,
seed); rows that are there are skipped, so a ladder can be stopped and continued. `python benchmarks/render.py` turns the
rows into docs/results.md.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import sordino
from sordino.measure.evaluate import Reference, reference
from sordino.numerics.machine import fast
from sordino.recipe import load_recipe

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "benchmarks" / "rows"

# name -> (recipe, overrides, seeds)
Ladder = dict[str, tuple[str, list[str], list[int]]]


def climb(doc: str | None, ladder: Ladder, file: str) -> None:
    """Command line of a ladder: measure its rows, or some of them, into ``benchmarks/rows/FILE``."""
    parser = making_parser(doc)
    parser.add_argument("--only", nargs="*", help="names of rows, in this order")
    parser.add_argument("--seeds", type=int, nargs="*", help="of these seeds only")
    args = parser.parse_args()
    systems = {"full precision": (None, [], [0]), **ladder}
    if unknown := set(args.only or ()) - systems.keys():
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    for name in args.only or systems:
        recipe, overrides, seeds = systems[name]
        for seed in seeds:
            if recipe is None or args.seeds is None or seed in args.seeds:
                row(name, recipe, overrides, seed, args, ROWS / file)


def texts_parser(doc: str | None) -> argparse.ArgumentParser:
    """Arguments that every benchmark has which calibrates on one text and evaluates on others."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", required=True, help="calibration text (never the test text)")
    parser.add_argument("--evaluate", required=True, help="evaluation text")
    parser.add_argument("--also", help="second evaluation text, of another domain; its first 16 windows are scored")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--windows", type=int, default=32, help="evaluation windows")
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens of an evaluation window")
    return parser


def making_parser(doc: str | None) -> argparse.ArgumentParser:
    """The same and :func:`add_checkpoints`."""
    parser = texts_parser(doc)
    add_checkpoints(parser)
    return parser


def add_checkpoints(parser: argparse.ArgumentParser) -> None:
    """The option by which runs share what takes longest."""
    parser.add_argument(
        "--checkpoints", type=Path, help="folder that keeps checkpoints; those that it holds are not made again"
    )


def row(
    name: str,
    recipe: str | None,
    overrides: list[str],
    seed: int,
    args: argparse.Namespace,
    rows: Path,
    simulated: str | None = None,
) -> None:
    """Measure one row and append it, unless it is there; ``simulated`` says what the caller changed in the evaluation."""
    digest = load_recipe(recipe, overrides).digest if recipe else "full"
    key = {"digest": digest, "version": code_version(), "seed": seed, "windows": args.windows, "model": called(args.model)}
    key["simulated"] = simulated
    if there(rows, key):
        return
    result: dict[str, Any] = {"name": name, **key, "recipe": recipe, "overrides": overrides, "cores": os.cpu_count()}
    result["gflops"] = speed()
    with made(args, recipe, overrides, "--seed", str(seed)) as (subject, cost, manifest):
        if recipe:
            result |= {"quantize": cost, "guard": manifest["guard"], "coverage": manifest["coverage"]}
            result |= {"finish": manifest["finish"]} if manifest.get("finish") else {}
            if found := [b["inputs"]["down"] for b in manifest["blocks"] if "down" in b.get("inputs", {})]:
                result["down_inputs"] = found
            result["errors"] = [b["error"] for b in manifest["blocks"] if "error" in b]  # held out, behind each block
            result["fallbacks"] = [b["block"] for b in manifest["blocks"] if b.get("fallback")]
        result |= figures(subject, args.evaluate, args.windows, args.model if recipe else None, args.seqlen)
        if args.also:
            result["also"] = figures(subject, args.also, 16, args.model if recipe else None, args.seqlen)
    keep(rows, result)
    print(f"{name} seed {seed}: PPL {result['ppl']:.3f} at {result['bits_per_weight']:.3f} bits", flush=True)


@contextmanager
def made(
    args: argparse.Namespace, recipe: str | None, overrides: list[str], *options: str
) -> Iterator[tuple[str, dict[str, float], dict[str, Any]]]:
    """A checkpoint by the command line, there for the body: its folder, what it cost, its manifest; the model without a recipe.

    The report's samples are left out: they would count as the recipe's time.
    """
    if recipe is None:
        yield args.model, {}, {}
        return
    with tempfile.TemporaryDirectory(prefix="sordino-bench-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        if args.checkpoints:
            said = json.dumps([args.model, args.calibrate, load_recipe(recipe, overrides).digest, code_version(), options])
            folder = args.checkpoints / hashlib.sha256(said.encode()).hexdigest()[:16]
        out, cost = folder / "out", folder / "cost.json"
        if not cost.is_file():
            given = [*options, *(x for o in overrides for x in ("--set", o))]
            command = ["quantize", args.model, "-r", recipe, "-o", str(out), "--text", args.calibrate, "--no-samples", *given]
            cost.parent.mkdir(parents=True, exist_ok=True)
            spent = run(command)  # goes on where it was interrupted, and run.json counts what that had cost
            past = json.loads((out / "run.json").read_text())
            cost.write_text(json.dumps(spent | {k: max(spent[k], past[k]) for k in ("seconds", "cpu_seconds")}))
        yield str(out), json.loads(cost.read_text()), json.loads((out / "sordino.json").read_text())


def called(model: str) -> str:
    """A model's name in the rows: of a folder without the path, which is this machine's."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def there(rows: Path, key: dict[str, Any]) -> bool:
    """Whether a file has a row with these entries."""
    return any(all(r.get(k) == v for k, v in key.items()) for r in read(rows))


def read(rows: Path) -> list[dict[str, Any]]:
    """All rows of a file, in order; none without the file."""
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.is_file() else []


def keep(rows: Path, row: dict[str, Any]) -> None:
    """Append a row to a file."""
    rows.parent.mkdir(parents=True, exist_ok=True)
    with open(rows, "a") as f:
        f.write(json.dumps(row) + "\n")


def figures(subject: str, text: str, windows: int, against: str | None, seqlen: int = 2048) -> dict[str, Any]:
    """What `sordino eval` measures; the reference runs once for all rows."""
    exact = None if against is None else _reference(against, text, windows, seqlen)
    return sordino.evaluate(subject, text=text, windows=windows, seqlen=seqlen, against=exact).to_json()


@functools.cache
def _reference(model: str, text: str, windows: int, seqlen: int) -> Reference:
    return reference(model, text=text, windows=windows, seqlen=seqlen)


def speed() -> int:
    """GFLOP/s of a matmul on one thread, bf16 or else fp32, so that CPU seconds of different machines can be told apart."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    a = torch.ones(2048, 2048, dtype=fast(torch.bfloat16))
    best = min(timeit.repeat(lambda: a @ a, number=1, repeat=5))
    torch.set_num_threads(threads)
    return round(2 * 2048**3 / best / 1e9)


def cpu() -> str:
    """Maker, family and model of the processor, which virtual machines name truly where they hide its name; "" if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return " ".join(known.get(key, "") for key in ("vendor_id", "cpu family", "model")).strip()


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
