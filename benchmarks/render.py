"""Render docs/results.md and the table in README.md from the rows in benchmarks/rows; no figure is typed by hand."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from weight_only import LADDER

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "benchmarks" / "rows"

HEAD = """# Measured results

Rendered by `python benchmarks/render.py` from `benchmarks/rows/*.jsonl`; do not edit by hand.

**Model.** `smollm2` is SmolLM2-135M-Instruct, dequantized from a 4-bit GGUF (Q4_1, blocks of 32), the only real model at
hand without a network. Unrotated asymmetric 4-bit rounding in groups of 32 would be exact by construction, so no such row is
shown; groups of 64 and more are fair, but 4-bit figures of this model should be compared with each other only.

**Method.** Calibration: 128 windows of 512 tokens of WikiText-2 raw validation (a seeded choice), 16 further windows held out
for the guards. Perplexity: WikiText-2 raw test as one text, tokenized once without added specials, first 32 non-overlapping
windows of 2048, bf16. "auto" takes groups of 64 where 128 does not divide (576 columns) and 128 else (1536 columns).
"g64 sym" rows are in the setting of the public tools' table: symmetric, groups of 64 everywhere. Where a row has one seed, the
three-seed rows tell how far another choice of calibration windows moves it.
"""


COLUMNS = ["recipe", "bits/weight", "bits/parameter", "PPL", "seeds", "fallbacks to RTN", "held-out KL (RTN's)"]
COLUMNS += ["wall s", "CPU s", "peak GiB"]


def main() -> None:
    rows = [json.loads(line) for line in (ROWS / "weight_only.jsonl").read_text().splitlines()]
    rows = [r for r in rows if r["model"] == "smollm2" and r["windows"] == 32]
    latest = {(r["name"], r["seed"]): r for r in rows}  # later rows replace earlier ones
    have = {r["name"] for r in latest.values()}
    names = [n for n in ["full precision", *LADDER] if n in have]
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for name in names:
        mine = [r for (n, _), r in sorted(latest.items()) if n == name]
        lines.append(line(name, mine))
    cores = sorted({r["cores"] for r in latest.values()})
    versions = sorted({r["version"] for r in latest.values()})
    foot = (
        f"\nMachine: {cores[0]} cores. Code: src tree {', '.join(versions)}. Wall times were taken with other jobs running.\n"
    )
    body = HEAD + "\n## Weight-only recipes\n\n" + "\n".join(lines) + "\n" + foot + large_shape()
    (ROOT / "docs" / "results.md").write_text(body)
    readme(latest, names)


def readme(latest: dict, names: list[str]) -> None:
    """Replace the short table between README's markers."""
    table = ["| recipe | bits/weight | bits/parameter | WikiText-2 PPL |", "|---|---|---|---|"]
    for name in names:
        mine = [r for (n, _), r in sorted(latest.items()) if n == name]
        table.append("| " + " | ".join(line(name, mine)[2:-2].split(" | ")[:4]) + " |")
    path = ROOT / "README.md"
    before, rest = path.read_text().split("<!-- results -->\n", 1)
    after = rest.split("<!-- /results -->", 1)[1]
    path.write_text(before + "<!-- results -->\n" + "\n".join(table) + "\n<!-- /results -->" + after)


def large_shape() -> str:
    """Section on memory at the size of a large model, from the last row of each recipe."""
    rows = {r["recipe"]: r for r in map(json.loads, (ROWS / "large_shape.jsonl").read_text().splitlines())}
    lines = [
        "",
        "## Memory at the shape of Llama-3-8B",
        "",
        "Random weights, bf16, 16 GB on disk; blocks 0:2 quantized with four",
    ]
    lines += ["windows, the other blocks copied (`benchmarks/large_shape.py`).", ""]
    lines += ["| recipe | peak resident GiB | wall s | CPU s |", "|---|---|---|---|"]
    for r in rows.values():
        lines.append(f"| {r['recipe']} | {r['peak_bytes'] / 2**30:.2f} | {r['seconds']:.0f} | {r['cpu_seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def line(name: str, rows: list[dict]) -> str:
    """One table row; several seeds are shown as mean and range."""
    ppl = [r["ppl"] for r in rows]
    shown = f"{ppl[0]:.2f}" if len(ppl) == 1 else f"{statistics.mean(ppl):.2f} ({min(ppl):.2f} … {max(ppl):.2f})"
    first = rows[0]
    guard, cost = first.get("guard") or {}, first.get("quantize") or {}
    kl = f"{guard['kl']:.3f} ({guard['rtn_kl']:.3f})" if guard else "–"
    falls = ", ".join(map(str, first.get("fallbacks") or [])) or "–"
    time = [f"{cost['seconds']:.0f}", f"{cost['cpu_seconds']:.0f}", f"{cost['peak_bytes'] / 2**30:.2f}"] if cost else ["–"] * 3
    seeds = str(len(rows)) if first["recipe"] else "–"
    cells = [name, f"{first['bits_per_weight']:.3f}", f"{first['bits_per_parameter']:.3f}", shown, seeds, falls, kl, *time]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
