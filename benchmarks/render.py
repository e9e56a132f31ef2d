"""Render docs/results.md from the rows in benchmarks/rows; nothing in it is typed by hand."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

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
Standard errors are over windows and mostly measure how much the text varies, not the quantization.
"""


COLUMNS = ["recipe", "bits/weight", "bits/parameter", "PPL", "seeds", "fallbacks to RTN", "held-out KL (RTN's)"]
COLUMNS += ["wall s", "CPU s", "peak GiB"]


def main() -> None:
    rows = [json.loads(line) for line in (ROWS / "weight_only.jsonl").read_text().splitlines()]
    latest = {(r["name"], r["seed"]): r for r in rows}  # later rows replace earlier ones
    names = list(dict.fromkeys(r["name"] for r in latest.values()))
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
    (ROOT / "docs" / "results.md").write_text(HEAD + "\n## Weight-only recipes\n\n" + "\n".join(lines) + "\n" + foot)


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
