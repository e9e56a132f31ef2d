"""The ablation grid of the BiSup-style reconstruction (spec section 12), on both hosts; see ladder.py.

python benchmarks/bisup.py --calibrate wiki.valid.raw --evaluate wiki.test.raw --also c4.txt [--only NAME …] [--sweeps]

Rows are the vertical part: host, + clips, + smoothing, + low-rank, and the target that leaves earlier error alone. The
prompt's rows come from prompt.py: `--recipe quarot-w3a3` for the prompt alone, `--recipe bisup-quarot-w3a3` for all of it.
`--keys-early` instead: the Atom hosts with keys rounded before the rotary embedding, as Atom's code has it; simulated, since
the packed cache holds what attention reads. Blocks are calibrated with keys rounded behind it.
`--sweeps` instead: one option at a time on blocks 0:10 of a host at W3A3, told by the held-out error against the full-precision
stream behind each block (E_acc), into benchmarks/rows/bisup_sweeps.jsonl.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ladder import ROWS, Ladder, called, climb, code_version, keep, made, making_parser, row, there
from sordino.measure import evaluate
from sordino.numerics.kv import KvGrid
from sordino.recipe import load_recipe
from tables import cells, last, latest, spread

SEEDS = [0, 1, 2]
TELL = "guard=tell"  # no block gives way to RTN, but training that does not help is undone (spec section 6.4)
HOSTS = {
    "quarot": '{move="rotate", size="full"}, {move="rotate-inner"}',
    "atom": '{move="channels"}',
}
NONE = "weights=0, scales=0, inputs=0, gains=0"
CLIP, RANK, SMOOTH = "clips=0.1", "rank=16", "smooth=0.002"
BASE = f"{CLIP}, {RANK}"


def tuned(host: str, options: str) -> str:
    """The moves of a host, and the tuner with some of the parameter-efficient spaces."""
    given = options if "epochs" in options else f"epochs=2, {options}"
    return f'moves=[{HOSTS[host]}, {{move="tune", {NONE}, {given}}}]'


def grid(host: str, bits: int) -> Ladder:
    """Rows of one host and width."""
    name = f"{host}-w{bits}a{bits}"
    return {
        name: (name, [TELL], SEEDS),
        f"{name} + clip": (name, [TELL, tuned(host, CLIP)], [0]),
        f"{name} + clip + smooth": (name, [TELL, tuned(host, f"{CLIP}, {SMOOTH}")], [0]),
        f"{name} + clip + low-rank": (name, [TELL, tuned(host, BASE)], SEEDS),
        f"{name} + clip + smooth + low-rank": (name, [TELL, tuned(host, f"{CLIP}, {SMOOTH}, {RANK}")], SEEDS),
        f"{name} + clip + low-rank, quantized target": (
            name,
            [TELL, tuned(host, f'{BASE}, target="quantized"')],
            [0],
        ),
    }


LADDER: Ladder = {k: v for host in HOSTS for bits in (4, 3) for k, v in grid(host, bits).items()}

# option -> what it is set to, the rest as in BASE. A default that BASE or the first row of smoothing has gets no second row.
SWEEPS: dict[str, list[str]] = {
    "rank": [f"{CLIP}, rank={r}" for r in (0, 8, 32, 64)],
    "start": [f'{BASE}, start="random"'],
    "side": [f"{CLIP}, rank={r}, side=true" for r in (8, 16)],
    "smoothing": [f"{BASE}, {SMOOTH}", *(f'{BASE}, {SMOOTH}, smooth_mode="{m}"' for m in ("hard", "free"))],
    "smoothing's start": [f'{BASE}, {SMOOTH}, smooth_start="search"'],
    "target": [f'{BASE}, target="quantized"'],
    "epochs": [f"{BASE}, epochs={n}" for n in (1, 5)],
    "clips' rate": [f"clips={rate}, {RANK}" for rate in (0.01, 0.03, 0.3)],
    "updates' rate": [f"{BASE}, updates={rate}" for rate in (0.003, 0.03)],
}
WINDOWS = (8, 32)  # amounts of data; BASE has 128


def sweep(args: argparse.Namespace) -> None:
    """Every option of :data:`SWEEPS`, and amounts of data, on both hosts."""
    for host in HOSTS:
        recipe = f"{host}-w3a3"
        errors(f"{host} host", recipe, [TELL], args)
        errors(f"{host} base: {BASE}", recipe, [TELL, tuned(host, BASE)], args)
        for option, settings in SWEEPS.items():
            for setting in settings:
                errors(f"{host} {option}: {setting}", recipe, [TELL, tuned(host, setting)], args)
        for windows in WINDOWS:
            errors(f"{host} windows: {windows}", recipe, [TELL, tuned(host, BASE), f"calibration.windows={windows}"], args)


def errors(name: str, recipe: str, overrides: list[str], args: argparse.Namespace) -> None:
    """Quantize the first blocks, and keep the held-out error behind each of them."""
    key = {
        "digest": load_recipe(recipe, overrides).digest,
        "version": code_version(),
        "model": called(args.model),
        "blocks": args.blocks,
    }
    if there(ROWS / "bisup_sweeps.jsonl", key):
        return
    with made(args, recipe, overrides, "--blocks", args.blocks) as (_, cost, manifest):
        blocks = [b for b in manifest["blocks"] if "error" in b]
    row = {"name": name, **key, "recipe": recipe, "overrides": overrides, "quantize": cost}
    row |= {"errors": [b["error"] for b in blocks], "fallbacks": [b["block"] for b in blocks if b.get("fallback")]}
    keep(ROWS / "bisup_sweeps.jsonl", row)
    print(f"{name}: {row['errors'][-1]:.4f} behind block {blocks[-1]['block']}", flush=True)


EARLY = {name: f"{name}, keys rounded before the rotary embedding (simulated)" for name in ("atom-w4a4", "atom-w3a3")}


def early(args: argparse.Namespace) -> None:
    """Rows of :data:`EARLY`: the hosts' own checkpoints, evaluated with another place for the rounding of keys."""
    with keys_early():  # quantization is another process and knows nothing of it
        for recipe, name in EARLY.items():
            row(name, recipe, [TELL], 0, args, ROWS / "bisup.jsonl", simulated="keys rounded early")


@contextmanager
def keys_early() -> Iterator[None]:
    """Let checkpoints that `sordino.evaluate` loads round what k_proj puts out, by token and head, and not again."""

    def load(*args: Any, **options: Any) -> Any:
        model, tokenizer = real(*args, **options)
        for attention in [m for m in model.modules() if getattr(m, "kv_grid", None) is not None]:
            grid, share = attention.kv_grid, attention.key_scale
            attention.kv_grid = _ValuesOnly(grid.bits, grid.symmetric, grid.static, share)

            def round_keys(
                _: Any, __: Any, out: Any, grid: Any = grid, share: Any = share, size: int = attention.head_dim
            ) -> Any:
                heads = out.unflatten(-1, (-1, size)).transpose(1, 2)
                return grid.fake(heads, share).transpose(1, 2).flatten(2)

            attention.k_proj.register_forward_hook(round_keys)
        return model, tokenizer

    real, evaluate.load = evaluate.load, load
    try:
        yield
    finally:
        evaluate.load = real


@dataclass(frozen=True)
class _ValuesOnly(KvGrid):
    """Leaves alone what is to be rounded by the keys' shares."""

    keys: Any

    def fake(self, x: Any, share: Any, moving: bool = False) -> Any:
        return x if share is self.keys else super().fake(x, share, moving)


def rendered() -> str:
    """The grid, with the share of each host's gap to full precision that is closed, and E_acc behind some blocks."""
    rows = latest("bisup.jsonl")
    exact = [r["ppl"] for (name, _), r in latest("d2quant.jsonl").items() if name == "full precision"]
    names = ["recipe", "bits/weight", "inputs", "KV", "PPL", "seeds", "C4 PPL", "KL", "gap closed"]
    names += ["E_acc at a third, two thirds, the end", "CPU s"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for name in (*LADDER, *EARLY.values()):
        mine = [r for (n, _), r in sorted(rows.items()) if n == name]
        if not mine:
            continue
        host = [r["ppl"] for (n, _), r in rows.items() if n == name.partition(" ")[0].rstrip(",")]
        shown = cells(name, mine)
        closed = [math.log(statistics.mean(host) / r["ppl"]) / math.log(statistics.mean(host) / exact[0]) for r in mine if host]
        share = spread([100 * c for c in closed], 0) + " %" if closed and " " in name else "–"
        bits = [f"{mine[0][k]:.2f}" if mine[0].get(k) else "–" for k in ("bits_per_input", "bits_per_kv")]
        depth = accumulated([statistics.mean(e) for e in zip(*(r.get("errors", []) for r in mine), strict=True)])
        lines.append(f"| {' | '.join([*shown[:2], *bits, *shown[3:7], share, depth, shown[8]])} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def rendered_sweeps() -> str:
    """Options, by the held-out error behind the first blocks; the best of a host's last."""
    rows = last("bisup_sweeps.jsonl", "name")
    if not rows:
        return ""
    lines = [
        "",
        "Options on the first blocks: held-out error against the full-precision stream (E_acc) behind three of them.",
        "",
    ]
    lines += [
        "| host, option | blocks | E_acc at a third, two thirds, the end | blocks left to the host | CPU s |",
        "|---" * 5 + "|",
    ]
    for name, r in sorted(rows.items(), key=lambda item: (item[0].partition(" ")[0], -item[1]["errors"][-1])):
        left = ", ".join(map(str, r["fallbacks"])) or "–"
        lines.append(f"| {name} | {r['blocks']} | {accumulated(r['errors'])} | {left} | {r['quantize']['cpu_seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def accumulated(errors: list[float]) -> str:
    """Held-out errors behind three of the blocks."""
    n = len(errors)
    return ", ".join(f"{errors[i]:.3f}" for i in (n // 3 - 1, 2 * n // 3 - 1, n - 1)) if n > 2 else "–"


if __name__ == "__main__":
    if "--sweeps" in sys.argv:
        sys.argv.remove("--sweeps")
        parser = making_parser(__doc__)
        parser.add_argument("--blocks", default="0:10", help="blocks to quantize")
        sweep(parser.parse_args())
    elif "--keys-early" in sys.argv:
        sys.argv.remove("--keys-early")
        early(making_parser(__doc__).parse_args())
    else:
        climb(__doc__, LADDER, "bisup.jsonl")
