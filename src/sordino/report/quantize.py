"""The page that every run leaves beside its checkpoint: what was made, what it cost, what went wrong, in plain words."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from sordino.measure.size import stored_split
from sordino.moves import MOVES
from sordino.report.colours import COLOURS
from sordino.report.page import render
from sordino.report.svg import Series, plot

_KINDS = {"this recipe": "error", "plain rounding (RTN)": "rtn_error"}


def quantize_page(
    out: Path, model: str, manifest: dict[str, Any], run: dict[str, Any], samples: list[Any] | str | None = None
) -> str:
    """One self-contained HTML page of a run.

    Args:
        out: the checkpoint, whose ``recipe.toml`` and safetensors are there already.
        model: what the user called the model.
        manifest: as in ``sordino.json``.
        run: as in ``run.json``.
        samples: what both models say (report/samples.py), or why there is nothing of it; None if nobody asked.
    """
    return render(
        "quantize.html",
        title=f"{manifest['recipe']} of {model}",
        headline=_headline(model, manifest),
        warnings=list(_warnings(manifest)),
        split=_split(out),
        errors=_block_errors(manifest),
        linears=_linear_errors(manifest),
        blocks=[_block_row(b) for b in manifest["blocks"]],
        moves=(moves := _moves(manifest, run)),
        about=_about([row[0] for row in moves]),
        notes=_notes(manifest),
        samples=samples,
        run=_run_lines(run),
        recipe=(out / "recipe.toml").read_text(encoding="utf-8"),
        manifest=json.dumps({k: v for k, v in manifest.items() if k != "blocks"}, indent=1),
    )


def result_lines(manifest: dict[str, Any], run: dict[str, Any]) -> list[tuple[str, str]]:
    """What a terminal or a notebook shows of a run: (figure, value)."""
    lines = [
        ("coverage", manifest["coverage"]),
        ("bits per quantized weight", f"{manifest['bits_per_weight']:.3f}"),
        ("bytes", f"{manifest['bytes']:,}"),
    ]
    guard = manifest["guard"]
    if "not_run" in guard:
        lines.append(("final guard", f"not run: {guard['not_run']}"))
    elif guard:
        found = f"{guard['kl']:.4f} (RTN of the same format: {guard['rtn_kl']:.4f})"
        lines.append(("KL to full precision, held out", found))
        if "ppl" in guard:
            lines.append(("perplexity, held out", _perplexities(guard)))
    if prefix := _prefix_line(manifest):
        lines.append(("prefix", prefix))
    if "system_prompt" in manifest:
        lines.append(("system prompt", f"{manifest['system_prompt']['tokens']} tokens at the end of the prefix"))
    if fallbacks := [str(b["block"]) for b in manifest["blocks"] if b.get("fallback")]:
        lines.append(("blocks where RTN was better and taken", ", ".join(fallbacks)))
    if tuned := [any(kept) for b in manifest["blocks"] if (kept := _tuned(b))]:
        lines.append(("blocks that tuning made better", f"{sum(tuned)} of {_rounded(manifest)}; the others keep what they had"))
    for name, note in manifest.get("finish", {}).items():
        if "kl_before" in note:
            change = f"{note['kl_before']:.4f} → {note['kl_after']:.4f}"
            lines.append((f"{name}: KL, held out", change if note["kept"] else f"{change}: not kept"))
    lines.append(("time", f"{run['seconds']:.0f} s wall, {run['cpu_seconds']:.0f} s CPU"))
    lines.append(("peak memory", f"{run['peak_memory_bytes'] / 2**30:.2f} GiB"))
    return lines


def _tuned(block: dict[str, Any]) -> list[bool]:
    """Whether each tuning of a block was kept."""
    return [note["kept"] for name, note in block.get("moves", {}).items() if name.partition(" ")[0] == "tune"]


def _rounded(manifest: dict[str, Any]) -> int:
    """How many blocks a move could have kept what it did in: those that fell back to plain rounding lose their notes."""
    return sum("left" not in block for block in manifest["blocks"])


def _prefix_line(manifest: dict[str, Any]) -> str:
    """Tokens of the prefix that are no system prompt, and how far they stood out; empty if there is nothing to say of them."""
    found, prompt = manifest.get("prefix"), manifest.get("system_prompt", {}).get("tokens", 0)
    if found is None:
        return ""
    tokens, ratios = found["tokens"][: len(found["tokens"]) - prompt], found["outlier_ratios"]
    if not tokens and not ratios:
        return ""
    line = " ".join(map(repr, tokens)) or "none: no token stands out far enough"
    return f"{line} (largest over median token: {max(ratios):.0f}, in block {ratios.index(max(ratios))})" if ratios else line


def _headline(model: str, manifest: dict[str, Any]) -> list[tuple[str, Any]]:
    guard = manifest["guard"]
    lines = [
        ("model", model),
        ("recipe", f"{manifest['recipe']} (digest {manifest['recipe_digest']})"),
        ("coverage", manifest["coverage"]),
        ("bits per quantized weight", f"{manifest['bits_per_weight']:.3f}"),
        ("checkpoint", f"{manifest['bytes']:,} bytes = {manifest['bytes'] / 2**20:.1f} MiB"),
    ]
    if exact := manifest.get("full_precision_bytes"):
        lines.append(
            ("full precision", f"{exact:,} bytes = {exact / 2**20:.1f} MiB, {exact / manifest['bytes']:.2f} times as much")
        )
    if "kl" in guard:
        lines.append(("KL to full precision on held-out text", f"{guard['kl']:.4f} nats a token"))
        lines.append(("the same for plain rounding (RTN)", f"{guard['rtn_kl']:.4f} nats a token"))
    if "ppl" in guard:
        lines.append(("perplexity on it", _perplexities(guard)))
        lines.append(("likeliest next token is full precision's", f"{100 * guard['top1_agreement']:.1f} % of tokens"))
    if prefix := _prefix_line(manifest):
        lines.append(("prefix", prefix))
    if prompt := manifest.get("system_prompt"):
        lines.append(("system prompt", f"{prompt['tokens']} tokens before every text, their keys and values exact"))
    return lines


def _perplexities(guard: dict[str, Any]) -> str:
    return f"{guard['ppl']:.3f} (full precision: {guard['fp_ppl']:.3f}, RTN of the same format: {guard['rtn_ppl']:.3f})"


def _warnings(manifest: dict[str, Any]) -> Iterator[str]:
    """What a reader should know before using the checkpoint."""
    guard, blocks = manifest["guard"], manifest["blocks"]
    if guard.get("failed"):
        yield "The result is worse than plain rounding of the same format on held-out text. Do not use it; try more text."
    if "not_run" in guard:
        yield f"The result was not compared with plain rounding: {guard['not_run']}."
    elif not guard:
        yield "No held-out text was read: the result was not compared with full precision. Measure it with sordino eval."
    if fallen := [b["block"] for b in blocks if b.get("fallback")]:
        yield f"Plain rounding was better in {_blocks(fallen)} and was taken there, judged on held-out text."
    for name in sorted({name for b in blocks for name in b.get("moves", {})}):
        lost = [b["block"] for b in blocks if b.get("moves", {}).get(name, {}).get("kept") is False]
        if lost:
            yield f"The move '{name}' made {_blocks(lost)} no better on held-out text; they keep what they had."
    if any(b.get("moves", {}).get("mean-shift", {}).get("final_kept") is False for b in blocks):
        yield "The mean shift of the final norm made its output no better on held-out text and was dropped."
    for name, note in manifest.get("finish", {}).items():
        if note.get("kept") is False:
            yield f"The move '{name}' made the whole model no better on held-out text; what it did was dropped."
    if left := [b["block"] for b in blocks if "left" in b]:
        yield f"Not quantized: {_blocks(left)}."
    if "left in full precision" in manifest["coverage"]:
        yield f"Some weights stayed in full precision: {manifest['coverage'].partition('full precision: ')[2]}."
    if "prefix" in manifest and not manifest["prefix"]["ids"]:
        yield "No token stands out far enough for a prefix; the checkpoint has none."


def _blocks(numbers: list[int]) -> str:
    return ("block " if len(numbers) == 1 else f"{len(numbers)} blocks: ") + ", ".join(map(str, numbers))


def _split(out: Path) -> list[dict[str, Any]]:
    """What the bytes of the checkpoint are, for a bar and a table."""
    split = stored_split(out)
    total = sum(split.values())
    return [
        {"name": name, "bytes": size, "share": 100 * size / total, "style": f"s{i % COLOURS}"}
        for i, (name, size) in enumerate(split.items())
    ]


def _block_errors(manifest: dict[str, Any]) -> Any:
    """Ours against RTN over depth; None where no block was measured."""
    series = block_series(manifest)
    return plot(series, "block", "relative error", lines=True) if series[0].points else None


def block_series(manifest: dict[str, Any]) -> list[Series]:
    """Held-out error of every block, ours and RTN's; without points where none was measured."""
    return [
        Series(label, [(b["block"], b[key], f"block {b['block']}: {b[key]:.4g}") for b in manifest["blocks"] if key in b])
        for label, key in _KINDS.items()
    ]


def _linear_errors(manifest: dict[str, Any]) -> Any:
    """Squared error of every rounded weight relative to the weight, over depth."""
    names = list(dict.fromkeys(name for b in manifest["blocks"] for name in b.get("linears", {})))
    series = []
    for name in names:
        found = [(b["block"], b["linears"][name]["weight_error"]) for b in manifest["blocks"] if name in b.get("linears", {})]
        series.append(Series(name.rpartition(".")[2], [(i, e, f"block {i}, {name}: {e:.4g}") for i, e in found]))
    return plot(series, "block", "relative weight error", lines=True) if series else None


def _block_row(block: dict[str, Any]) -> list[Any]:
    linears = {name: report["weight_error"] for name, report in block.get("linears", {}).items()}
    verdict = "left in full precision" if "left" in block else "plain rounding taken" if block.get("fallback") else ""
    worst = max(linears, key=lambda name: linears[name]) if linears else None
    return [block["block"], block.get("error"), block.get("rtn_error"), linears.get(worst or ""), worst, verdict]


def _moves(manifest: dict[str, Any], run: dict[str, Any]) -> list[list[Any]]:
    """What each part of the run took, and what it did in short: (part, seconds, whether it was kept, its figures)."""
    blocks: dict[str, list[dict[str, Any]]] = {}
    for block in manifest["blocks"]:
        for name, note in block.get("moves", {}).items():
            blocks.setdefault(name, []).append(note)
    whole, seconds = manifest.get("finish", {}), run.get("parts", {})
    rows = []
    for name in dict.fromkeys([*seconds, *blocks, *whole]):
        notes = blocks.get(name, [])
        judged = [note["kept"] for note in notes if "kept" in note]
        kept = (
            f"{sum(judged)} of {_rounded(manifest)} blocks"
            if judged
            else {True: "yes", False: "no"}.get(whole.get(name, {}).get("kept"))
        )
        rows.append([name, seconds.get(name), kept, "; ".join(_changes(notes) + _changes([whole.get(name, {})]))])
    return rows


def _about(names: list[str]) -> list[tuple[str, str]]:
    """Moves among these, each with the first line of what it says of itself."""
    return [(name, (inspect.getdoc(MOVES[name]) or "").partition("\n")[0]) for name in names if name in MOVES]


def _changes(notes: list[dict[str, Any]]) -> list[str]:
    """Figures that a move noted from before and after it, as medians over blocks."""
    found = []
    for before in dict.fromkeys(key for note in notes for key in note if "before" in key):
        pairs = [(n[before], n[after]) for n in notes if before in n and (after := before.replace("before", "after")) in n]
        if pairs:
            name = before.replace("before", "").strip("_") or "held-out error"
            found.append(f"{name} {median(a for a, _ in pairs):.4g} → {median(b for _, b in pairs):.4g}")
    return found


def _notes(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """What each move noted: by block, and on the whole model."""
    rows = [("block " + str(b["block"]), name, note) for b in manifest["blocks"] for name, note in b.get("moves", {}).items()]
    rows += [("whole model", name, note) for name, note in manifest.get("finish", {}).items()]
    return [{"where": where, "move": name, "notes": list(note.items())} for where, name, note in rows]


def _run_lines(run: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        ("calibration text", run.get("text") or "none"),
        ("time", f"{run['seconds']:.0f} s wall, {run['cpu_seconds']:.0f} s CPU (of the last process)"),
        (
            "peak memory",
            f"{run['peak_memory_bytes'] / 2**30:.2f} GiB (estimated before: {run['estimated_memory_bytes'] / 2**30:.2f})",
        ),
        ("machine", f"{run['machine']}, {run['threads']} threads of {run['cores']} cores, Python {run['python']}"),
    ]
