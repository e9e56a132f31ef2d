"""Render docs/results.md and the tables in README.md and docs/methods/ from the rows in benchmarks/rows; nothing is typed."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import bisup
import d2quant
import joined
import prefixquant
import weight_only
import zeroshot
from ladder import ROOT, ROWS, read
from sordino.recipe import load_recipe, presets
from speed_tables import OTHERS, beside, beside_torch, loading, speeds, summary, two_paths
from tables import cells, last, latest, spread, table

HEAD = """# Measured results

Rendered by `python benchmarks/render.py` from `benchmarks/rows/*.jsonl`; do not edit by hand.

**Model.** `smollm2` is SmolLM2-135M-Instruct, dequantized from a 4-bit GGUF (Q4_1, blocks of 32), the only real model at
hand without a network. Unrotated asymmetric 4-bit rounding in groups of 32 would be exact by construction, so no such row is
shown; groups of 64 and more are fair, but 4-bit figures of this model should be compared with each other only.

**Method.** Calibration: 128 windows of 512 tokens of WikiText-2 raw validation (a seeded choice), 16 further windows held out
for the guards. Perplexity: WikiText-2 raw test as one text, tokenized once without added specials, first 32 non-overlapping
windows of 2048, bf16. C4: the first 16 windows of a sample of truncated C4 documents; compare it with itself only.
"auto" takes groups of 64 where 128 does not divide (576 columns) and 128 else (1536 columns). "g64 sym" rows are in the
setting of the public tools' table: symmetric, groups of 64 everywhere. KL is against full precision on the same windows.
The first two ladders keep the guards on: "fallbacks" names blocks in which plain rounding took the place of what the row is
about. Seeds of one row may be of different versions of the code; every JSON row has its own. Most rows have one seed: the
range of rows with three tells how far another choice of calibration windows moves one. CPU seconds are
user + system of the whole `quantize` process, taken with one thread and another job beside; GFLOP/s is what one thread of that
machine makes of a bf16 matmul (rows without it: about 460).

Public tools on the same model and text (GPTQModel 7.6, auto-round 0.16, symmetric, group 64): GPTQ 27.40 / 53.9 / 9331 at
4 / 3 / 2 bits in 401 / 360 / 355 CPU seconds, AutoRound 29.34 / 75.9 at 3 / 2 bits in 710 / 751.
"""

# The README's rows: by width, from plain rounding to the best.
SHOWN = ["full precision"]
for _bits in (4, 3, 2):
    SHOWN += [f"{solver}-w{_bits}" for solver in ("rtn", "gptq", "gptaq", "d2quant-paper", "d2quant")]
    SHOWN += [f"w{_bits}"]
SHOWN += [
    "quarot-w4a4kv4",
    "spinquant-w4a4kv4",
    "w4a4kv4 static: + prefix",
    "w4a4kv4 static: + tuning",
    "w4a4kv4",
    "w4a8kv4",
]


def main() -> None:
    first, second = latest("weight_only.jsonl"), latest("d2quant.jsonl")
    # Recipes that are in both ladders.
    first |= {k: v for k, v in second.items() if k[0] in weight_only.LADDER}
    second = {k: v for k, v in first.items() if k[0] in d2quant.LADDER} | second
    body = HEAD + "\n## Rounding alone\n\n" + table(first, ["full precision", *weight_only.LADDER])
    body += "\n## D²Quant, and past it\n\n" + table(second, ["full precision", *d2quant.LADDER])
    third = latest("prefixquant.jsonl")
    ladder = table(third, ["full precision", *prefixquant.LADDER], 9) + searched_scale(third) if third else ""
    body += ladder and "\n## PrefixQuant (`benchmarks/prefixquant.py`)\n\n" + ladder
    hosts = bisup.rendered() + bisup.rendered_sweeps()
    body += hosts and "\n## BiSup-style reconstruction (`benchmarks/bisup.py`)\n\n" + hosts
    together = systems_joined()
    body += together and "\n## The three systems joined (`benchmarks/joined.py`)\n" + together
    body += means("## What all tokens share (`benchmarks/means.py`)")
    body += prefix("## The prefix on full precision (`benchmarks/prefix.py`)") + kv_memory()
    body += equivalence("## Ways to compute the same thing (`benchmarks/equivalence.py`)")
    body += prompt("## A protected system prompt (`benchmarks/prompt.py`)")
    body += zeroshot.rendered() + solver_options() + analyses() + large_shape() + speeds("## Speed (`benchmarks/speed.py`)")
    for engine, (file, *_) in OTHERS.items():
        body += beside(engine, f"## Speed beside {engine} (`benchmarks/{Path(file).stem}.py`)")
    body += beside_torch("## One linear beside torch's int4 (`benchmarks/vs_torch_int4.py`)")
    body += loading("## Loading (`benchmarks/loading.py`)") + two_paths("## Two paths (`benchmarks/native_vs_torch.py`)")
    (ROOT / "docs" / "results.md").write_text(body)
    fill(ROOT / "README.md", table(first | second | third, SHOWN, 4))
    fill(ROOT / "README.md", summary(), "speed")
    fill(ROOT / "docs" / "methods" / "d2quant.md", table(second, ["full precision", *d2quant.LADDER], 8))
    fill(ROOT / "docs" / "methods" / "prefixquant.md", ladder + means() + prefix() + equivalence())
    fill(
        ROOT / "docs" / "kernels.md",
        speeds() + "".join(map(beside, OTHERS)) + loading() + two_paths()
        or "Nothing yet: `benchmarks/speed.py` was not run.\n",
    )
    fill(ROOT / "docs" / "howto" / "cost.md", costs())
    none = "Nothing yet: `benchmarks/bisup.py` is written and was not run.\n"
    fill(ROOT / "docs" / "methods" / "bisup.md", (hosts or none) + together + prompt())


def costs() -> str:
    """CPU seconds and peak memory of the presets as they are; and which have no row."""
    # What a name stands for now: rows of a preset's earlier forms have names of their own.
    meant = weight_only.LADDER | d2quant.LADDER | prefixquant.LADDER | bisup.LADDER | joined.LADDER
    same = {load_recipe(n, [f"guard={g}"]).digest: n for n in presets() for g in ("on", "off", "tell")}
    found: dict[str, list[dict[str, Any]]] = {}
    for file in ("weight_only.jsonl", "d2quant.jsonl", "prefixquant.jsonl", "bisup.jsonl", "joined.jsonl"):
        for row in latest(file).values():
            recipe, overrides, _ = meant.get(row["name"], (None, [], []))
            if recipe and (preset := same.get(load_recipe(recipe, overrides).digest)):
                found.setdefault(preset, []).append(row)
    lines = ["| preset | CPU s | peak GiB |", "|---|---|---|"]
    for name in sorted(found, key=lambda n: min(r["quantize"]["cpu_seconds"] for r in found[n])):
        shown = cells(name, found[name])
        lines.append(f"| `{name}` | {shown[8]} | {shown[10]} |")
    missing = ", ".join(f"`{n}`" for n in presets() if n not in found)
    return "\n".join([*lines, "", f"Presets that have not been run on smollm2: {missing or 'none'}."]) + "\n"


def fill(path: Path, content: str, mark: str = "results") -> None:
    """Replace what stands between a file's markers."""
    before, rest = path.read_text().split(f"<!-- {mark} -->\n", 1)
    after = rest.split(f"<!-- /{mark} -->", 1)[1]
    path.write_text(before + f"<!-- {mark} -->\n" + content + f"<!-- /{mark} -->" + after)


def prefix(title: str = "") -> str:
    """The search and its effect, from the last row; the table alone without a title."""
    path = ROWS / "prefix.jsonl"
    if not path.is_file():
        return "" if title else "Nothing yet: `benchmarks/prefix.py` is written and was not run.\n"
    row = json.loads(path.read_text().splitlines()[-1])
    tokens = ", ".join(f"{i} `{t}`" for i, t in zip(row["ids"], row["tokens"], strict=True))
    lines = ["", title, ""] if title else []
    cost = f"{row['search_seconds']:.0f} s ({row['threads']} threads, {row['cores']} cores)"
    lines += [f"Found in {row['model']}: {tokens}, in {cost}; the whole run with its loading and"]
    lines += [f"writing took {row['whole_run_cpu_seconds']:.0f} CPU s. Ratios: mean over windows, in the worst block.", ""]
    lines += [
        "| | without | with the prefix |",
        "|---|---|---|",
    ]
    shown = [("perplexity of full precision", "ppl", float), ("the same on C4", "c4_ppl", float)]
    shown += [("down_proj input, largest over median token", "down", max)]
    shown += [(f"{k}, median over smallest token", k, max) for k in ("query", "key")]
    for label, key, pick in shown:
        if key in row["before"]:
            lines.append(f"| {label} | " + " | ".join(f"{pick(row[w][key]):.2f}" for w in ("before", "after")) + " |")
    inside = [f"{row['later'][str(i)]:.1f} (`{t}`)" for i, t in zip(row["ids"], row["tokens"], strict=True)]
    lines += ["", f"In the middle of a text, behind the prefix, its tokens reach {', '.join(inside)} times the median token in"]
    lines += ["the worst block, far below the threshold of 64: later occurrences need no treatment."]
    if "again" in row:
        last = row["tokens"][-1]
        lines += [
            f"Directly behind the prefix, as the first token of the text, `{last}` reaches {row['again']:.1f} times the median."
        ]
    return "\n".join(lines) + "\n"


def searched_scale(rows: dict[tuple[str, int], dict[str, Any]]) -> str:
    """What static inputs of one down_proj had searched for them, without and with the prefix."""
    found = [rows.get((f"w4a4kv4 static{rest}", 0), {}).get("down_inputs") for rest in ("", ": + prefix")]
    if not all(found):
        return ""
    without, behind = (blocks[11] for blocks in found)
    said = f"The static scale of block 11's down_proj input, searched: {without['scale']:.3g} without the prefix (largest entry"
    return f"\n{said} {without['peak']:.3g}),\n{behind['scale']:.3g} with it ({behind['peak']:.3g}).\n"


def means(title: str = "") -> str:
    """Means and what they cost, from the last row; the table alone without a title."""
    rows = read(ROWS / "means.jsonl")
    if not rows:
        return ""
    lines = ["", title] if title else []
    said = "Full precision, means over the blocks: the share of the energy that is the same for all tokens, and the relative"
    lines += ["", said]
    lines += ["squared error in thousandths of 4-bit codes behind a rotation, without → with the move `center`.", ""]
    lines += ["| | share of the mean | a scale a token (and head) | groups of 64 with zero points |", "|---|---|---|---|"]
    for what, found in rows[-1]["sites"].items():
        pairs = [
            f"{1e3 * found[f'whole {kind}']:.1f} → {1e3 * found[f'left {kind}']:.1f}" if f"whole {kind}" in found else "–"
            for kind in ("token", "groups")
        ]
        lines.append(f"| {what} | {100 * found['share']:.0f} % | {' | '.join(pairs)} |")
    return "\n".join(lines) + "\n"


def systems_joined() -> str:
    """A table for each model that joined.py was run on."""
    found = last("joined.jsonl", "model", "name")
    for name, row in [(n, r) for f in ("bisup.jsonl", "prefixquant.jsonl") for (n, seed), r in latest(f).items() if not seed]:
        found.setdefault(("smollm2", joined.ELSEWHERE.get(name, name)), row)  # the same recipe, measured by another ladder
    lines: list[str] = []
    for model in dict.fromkeys(m for m, name in found if name.startswith("joined")):
        lines += ["", f"On {model}:", "", "| recipe | bits/weight | PPL | C4 PPL | KL | CPU s |", "|---" * 6 + "|"]
        for name in ("full precision", *joined.LADDER):
            if row := found.get((model, name)):
                shown = cells(name, [row])
                lines.append(f"| {' | '.join([*shown[:2], shown[3], *shown[5:7], shown[8]])} |")
    return "\n".join(lines) + "\n" if lines else ""


def kv_memory() -> str:
    """Section on the cache's memory, from the last row of each width."""
    rows = last("kv_memory.jsonl", "name")
    if not rows:
        return ""
    lines = ["", "## Memory of the KV cache (`benchmarks/kv_memory.py`)", ""]
    lines += ["Only keys and values are rounded (static, by head, behind the prefix). Bytes per token: growth of the process's"]
    lines += ["resident size, and of the cache's tensors, from 1 to 8 texts of 2048 tokens held.", ""]
    lines += ["| cache | resident bytes/token | tensors, bytes/token | PPL | C4 PPL |", "|---" * 5 + "|"]
    for name, r in rows.items():
        shown = [f"{r[k]:,.0f}" for k in ("resident_per_token", "tensors_per_token")]
        shown += [f"{r['text']['ppl']:.2f}", spread([r["also"]["ppl"]] if r.get("also") else [], 2)]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def equivalence(title: str = "") -> str:
    """Divergences and equal greedy tokens of pairs, from the last row of each recipe, pair and dtype."""
    rows = last("equivalence.jsonl", "recipe", "pair", "dtype")
    if not rows:
        return ""
    lines = ["", *([title, ""] if title else [])]
    lines += [
        "Mean divergence of the next token's distribution (nat), or how many of 64 greedy tokens agree before the first",
        "difference, the worst of four prompts. The first two pairs round nothing. Moved by a millionth, fp32 shows how far",
        "apart two correct ways are bound to be: a code at a tie falls the other way, and what follows goes with it. bf16",
        "hardly holds so small a change.",
        "",
    ]
    recipes, dtypes = list(dict.fromkeys(r for r, _, _ in rows)), ("float32", "bfloat16")
    heads = [f"`{recipe}`, {short}" for recipe in recipes for short in ("fp32", "bf16")]
    lines += [f"| pair | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for pair in dict.fromkeys(p for _, p, _ in rows):
        found = [rows.get((recipe, pair, dtype)) for recipe in recipes for dtype in dtypes]
        shown = ["–" if r is None else f"{r['kl']:.1e}" if "kl" in r else f"{r['equal_tokens']} of {r['of']}" for r in found]
        lines.append(f"| {pair} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def prompt(title: str = "") -> str:
    """The controls of a protected prompt, from the last row of each model and recipe."""
    runs = last("prompt.jsonl", "model", "recipe")
    link = f"[A protected system prompt]({'' if title else '../'}system_prompt.md)"
    lines: list[str] = []
    for (model, recipe), run in runs.items():
        lines += ["", *([title, ""] if title else [])]
        lines += [f"{model}, `{recipe}`, a prompt of {run['prompt_tokens']} tokens; rows as in {link}."]
        if "bits_per_kv" in run["rows"]["Q0"]:  # older rows counted codes alone
            kv = f"{run['rows']['Q0']['bits_per_kv']:.3f}, with the prompt in 16 bits {run['kv_bits']:.3f}"
            lines += [f"Bits of a cached number: {kv}; of a weight {run['rows']['Q0']['bits_per_weight']:.3f}."]
        lines += ["", "| row | PPL | KL |", "|---|---|---|"]
        for name, r in run["rows"].items():
            lines.append(f"| {name} | {r['ppl']:.3f} ± {r['ppl_stderr']:.3f} | {r['kl']:.4f} ± {r['kl_stderr']:.4f} |")
        if doses := run.get("doses"):
            windows, length = run.get("spread_windows", (2, 256))  # older rows do not say so, and had these
            lines += [
                "",
                "Median relative error of later tokens of the model as it is, not turned, not clipped, where so many tokens'",
                f"keys and values stay exact, all others rounded at the recipe's width ({windows} windows of {length} tokens):",
                "",
            ]
            sizes = [str(p) for p, _ in next(iter(doses.values()))]
            lines += ["| tokens | " + " | ".join(sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
            lines += [f"| {kind} | " + " | ".join(f"{e:.4f}" for _, e in curve) + " |" for kind, curve in doses.items()]
        if carried := run.get("spread"):
            of_kv, of_all = ("–" if (c := carried[k]) is None else f"{c:.2f}" for k in ("kv_correlation", "correlation"))
            lines += [
                "",
                f"Of what rounded keys and values carry to later tokens, {shared(carried['kv_shares'])};",
                f"of what whole tokens do, {shared(carried['shares'])}.",
                f"Rank correlation with the attention received: {of_kv} and {of_all}.",
            ]
        title = ""
    return "\n".join(lines) + "\n" if lines else ""


def shared(shares: dict[str, float]) -> str:
    """Part of the whole that the first places carry."""
    return ", ".join(f"the first {p} places carry {share:.1%}" for p, share in shares.items())


def solver_options() -> str:
    """Section on the solver's options, from the last row of each."""
    rows = last("solver_options.jsonl", "bits", "name")
    if not rows:
        return ""
    count = max(len(r["errors"]) for r in rows.values())
    lines = ["", "## Options of the solver, block by block (`benchmarks/solver_options.py`)", ""]
    lines += [
        f"Held-out error of the first {count} blocks, relative to full precision, each on the stream that the blocks before it"
    ]
    lines += ["leave; 64 calibration windows, no training.", ""]
    lines += ["| bits | solver | " + " | ".join(f"block {i}" for i in range(count)) + " | CPU s |", "|---" * (count + 3) + "|"]
    for (bits, name), r in rows.items():
        lines.append(f"| {bits} | {name} | " + " | ".join(f"{e:.4f}" for e in r["errors"]) + f" | {r['cpu_seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def analyses() -> str:
    """Tables of d2quant_analyses.py, from the last row of each part."""
    parts = last("d2quant_analyses.jsonl", "part")
    lines: list[str] = ["", "## What D²Quant builds on (`benchmarks/d2quant_analyses.py`)"] if parts else []
    if a := parts.get("A"):
        lines += ["", "**Projection sensitivity**: change of held-out loss (nat/token) at 2 bits, with standard error.", ""]
        lines += [
            "| linear | share of weights | RTN: only it | RTN: all but it | GPTQ: only it | GPTQ: all but it |",
            "|---" * 6 + "|",
        ]
        for kind, share in a["share"].items():
            found = [a["delta"].get(f"{s} {label} {kind}") for s in ("rtn", "gptq") for label in ("only", "all but")]
            shown = [f"{d['mean']:.3f} ± {d['stderr']:.3f}" if d else "–" for d in found]
            lines.append(f"| {kind} | {share:.1%} | " + " | ".join(shown) + " |")
    if b := parts.get("B"):
        lines += [
            "",
            "**Column heterogeneity**: spread (standard deviation over mean) of the columns' mean size in a group, and the",
        ]
        lines += ["share of the 2-bit additive grid's squared error that a column scale takes away.", ""]
        lines += ["| linear | spread | gain | spread, rotated | gain, rotated |", "|---" * 5 + "|"]
        for kind in [k for k in b["kinds"] if "rotated" not in k]:
            plain, turned = b["kinds"][kind], b["kinds"][f"{kind} rotated"]
            figures = [f"{plain['cv']:.3f}", f"{plain['gain']:.1%}", f"{turned['cv']:.3f}", f"{turned['gain']:.1%}"]
            lines.append(f"| {kind} | " + " | ".join(figures) + " |")
    if c := parts.get("C"):
        lines += [
            "",
            "**Heavy tails**: largest over median channel energy and kurtosis of a site's input: median block, worst block.",
            "",
        ]
        lines += ["| site | max/median | worst | kurtosis | worst |", "|---" * 5 + "|"]
        for site, found in c["sites"].items():
            figures = [f"{f(found[k]):.0f}" for k in ("max_over_median", "kurtosis") for f in (statistics.median, max)]
            lines.append(f"| {site} | " + " | ".join(figures) + " |")
    if d := parts.get("D"):
        lines += [
            "",
            "**Mean shift**: share of the squared deviation at the post-attention norm that the shift takes away (2 bits,",
        ]
        lines += ["rotated GPTAQ), over all blocks: median (lowest … highest).", ""]
        lines += [
            "| text | calibration windows | held-out windows | held out, without token 0 | median of abs(mean)/deviation |",
            "|---" * 5 + "|",
        ]
        for label, found in d["texts"].items():
            figures = []
            for key in ("calib", "heldout", "heldout without token 0"):
                values = [r[key] for r in found]
                figures.append(f"{statistics.median(values):.1%} ({min(values):.1%} … {max(values):.1%})")
            figures.append(f"{statistics.median(r['snr_quantiles'][3] for r in found):.3f}")
            lines.append(f"| {label} | " + " | ".join(figures) + " |")
    if m := parts.get("M"):
        lines += [
            "",
            f"**Merge**: rounding up_proj's merged scales to stored numbers changes the perplexity by {m['change']:+.3%}",
        ]
        lines += [f"({m['ppl']['before rounding']:.3f} → {m['ppl']['as stored']:.3f}, fp32, held-out windows)."]
    return "\n".join(lines) + "\n"


def large_shape() -> str:
    """Section on memory at the size of a large model, from the last row of each recipe."""
    rows = last("large_shape.jsonl", "recipe")
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


if __name__ == "__main__":
    main()
