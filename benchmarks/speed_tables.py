"""Tables of speed for render.py: prefill and decode, other engines, single linears, loading, two ways to the same number."""

from __future__ import annotations

import statistics
from typing import Any

from ladder import ROWS, read
from tables import last

# What /proc/cpuinfo says of processors that were measured, and what they are.
PROCESSORS = {"AuthenticAMD 25 17": "AMD Zen 4", "AuthenticAMD 26 2": "AMD Zen 5"}
# Rows that do not say it: by their kernels. Those with AVX-512 were of a Zen 5 and are in the table of all rows only.
KERNELS = {"native, amx": "Xeon with AMX", "native, avx2": "AMD Zen 3, no AVX-512"}


def processor(row: dict[str, Any]) -> str:
    """Of a row, with how fast it multiplies."""
    name = row.get("cpu", "")
    return (f"{PROCESSORS.get(name, name)}, " if name else "") + f"one thread's matmul: {row['gflops']} GFLOP/s"


def machine(row: dict[str, Any], kernels: str) -> tuple[str, str]:
    """Which machines' rows replace each other; rows that do not say what processor they had are told apart by their kernels."""
    name = row.get("cpu", "")
    return name, kernels if name or not kernels.endswith(("avx512", "amx")) else "avx512"


def speeds(title: str = "") -> str:
    """Prefill and decode, from the last row of each part."""
    every = read(ROWS / "speed.jsonl")
    rows = {(r["part"], r["subject"], machine(r, r["bench"]["kernels"])): r for r in every}
    lines: list[str] = ["", title] if title and rows else []
    for (part, subject, _), row in rows.items():
        found = row["bench"]
        lines += ["", f"{subject}, {found['threads']} threads, after {found['prompt_tokens']} tokens"]
        lines[-1] += ", without the one call a token" if part == "no call" else ""
        lines[-1] += f" ({found['kernels']}; {processor(row)}):"
        lines += ["", "| model | prefill tokens/s | × bf16 | × fp32 | decode tokens/s | × bf16 | × fp32 | peak MiB |"]
        lines += ["|---" * 8 + "|"]
        for model in found["models"]:
            shown = [model["model"]]
            for phase in ("prefill", "decode"):
                low, high = model[f"{phase}_tokens_per_s_range"]
                shown.append(f"{model[f'{phase}_tokens_per_s']:.0f} ({low:.0f} … {high:.0f})")
                ratios = [model[f"ratio_to_{p}"] for p in ("bf16", "fp32")]
                shown += ["–" if r is None else f"{r[phase]:.2f}" for r in ratios]
            lines.append("| " + " | ".join([*shown, f"{model['peak_memory_bytes'] / 2**20:.0f}"]) + " |")
        lines += where(found)
    return "\n".join(lines) + "\n" if lines else ""


def where(bench: dict[str, Any]) -> list[str]:
    """What was read and multiplied at which rate, where a run has it."""
    machine = bench.get("machine")
    if machine is None:
        return []
    lines = ["", f"The machine reads {machine['read_gb_per_s']:.1f} GB/s; torch multiplies"]
    lines[-1] += f" {machine['int8_gop_per_s']:.0f} GOP/s in int8, {machine['bf16_gop_per_s']:.0f} in bf16."
    names = ["model", "MB read a token", "GB/s", "of memory's", "linears of the prompt, GOP/s", "of int8's"]
    names += ["kernels' share of the prompt", "of a token"]
    lines += ["", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for m in [m for m in bench["models"] if "kernel_share" in m]:  # very slow ones were not run once more
        shown = [m["model"], f"{m['weight_bytes_per_token'] / 1e6:.0f}", f"{m['decode_gb_per_s']:.1f}"]
        shown += [
            f"{m['decode_share_of_read']:.0%}",
            f"{m['prefill_linears_gop_per_s']:.0f}",
            f"{m['prefill_share_of_int8']:.0%}",
        ]
        shown += [f"{m['kernel_share'][phase]:.0%}" for phase in ("prefill", "decode")]
        lines.append("| " + " | ".join(shown) + " |")
    return lines


# Who else was measured: file, the model that ratios are of, the field of its version, and what to know of it.
OTHERS = {
    "llama.cpp": (
        "vs_llama_cpp.jsonl",
        "llama.cpp Q4_0",
        "llama_cpp_python",
        "llama.cpp was built for the machine at hand; beside AMX for AVX-512 with VNNI and BF16, without\n"
        "matrix tiles: its own path for them died of an illegal instruction on that virtual machine.",
    ),
    "OpenVINO": (
        "vs_openvino.jsonl",
        "OpenVINO int4",
        "openvino",
        "OpenVINO has symmetric codes of 4 bits in groups of 64, and of 8 in embedding and head; activations and cache\n"
        "are as it likes best itself.",
    ),
    "ONNX Runtime": (
        "vs_onnxruntime.jsonl",
        "ONNX Runtime int4",
        "genai",
        "ONNX Runtime GenAI has symmetric codes of 4 bits in groups of 64, and of 8 in embedding and head; activations are\n"
        "multiplied in 8 bits, its builder's own choice for CPUs; the cache is fp32.",
    ),
}
SHOWN = "W4A8KV4 static"  # in the table of all engines


def beside(engine: str, title: str = "") -> str:
    """Another engine and ours, from the last row of each shape; ratios are medians of those within a round."""
    file, reference, version, note = OTHERS[engine]
    # The first rows do not say which kernels they had.
    rows = {(r["subject"], r["prompt_tokens"], r.get("kernels", "native, amx"), r.get("cpu")): r for r in read(ROWS / file)}
    lines: list[str] = ["", title] if title and rows else []
    if rows:
        lines += ["", note]
    for (subject, _, kernels, _), row in rows.items():
        by = {m["model"]: m for m in row["models"]}
        twin = next(name for name in by if name.endswith("twin"))
        number = row[version].partition("-")[0]
        lines += ["", f"{subject}, {row['threads']} threads, after {row['prompt_tokens']} tokens, beside {engine} {number}"]
        lines[-1] += f" ({kernels}; {processor(row)}):"
        of = reference.removeprefix(engine).strip()
        lines += ["", f"| model | prefill tokens/s | × {of} | × twin | decode tokens/s | × {of} | × twin | MB read a token |"]
        lines += ["|---" * 8 + "|"]
        for name, model in by.items():
            shown = [name]
            for phase, tokens in (("prefill", row["prompt_tokens"]), ("decode", row["new_tokens"])):
                rates = sorted(tokens / s for s in model[phase])
                shown.append(f"{statistics.median(rates):.0f} ({rates[0]:.0f} … {rates[-1]:.0f})")
                for other in (reference, twin):
                    ratio = median_ratio(by[other][phase], model[phase])
                    shown.append("–" if other == name else f"{ratio:.2f}")
            size = model["weight_bytes"]
            lines.append("| " + " | ".join([*shown, "–" if size is None else f"{size / 1e6:.0f}"]) + " |")
    return "\n".join(lines) + "\n" if lines else ""


def summary() -> str:
    """Ours beside all others in a few numbers: prefill / decode, ratios of medians within a round, from the last rows."""
    columns = {"twin": "transformers bf16"} | {reference: reference for _, reference, _, _ in OTHERS.values()}
    found: dict[tuple[str, str, int], dict[str, str]] = {}
    for engine, (file, reference, _, _) in OTHERS.items():
        for row in read(ROWS / file):
            where = PROCESSORS.get(row.get("cpu", "")) or KERNELS.get(row.get("kernels", "native, amx"))
            by = {m["model"]: m for m in row["models"]}
            if where is None or SHOWN not in by:
                continue
            cells = found.setdefault((where, row["subject"], row["prompt_tokens"]), {})
            cells[reference] = both_ratios(by[reference], by[SHOWN])
            if engine == "llama.cpp":  # measured on most machines
                cells["twin"] = next(
                    both_ratios(m, by[SHOWN]) + (" (fp32)" if name == "fp32 twin" else "")
                    for name, m in by.items()
                    if name.endswith("twin")
                )
    lines = ["| two cores of | shape | prompt | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 3) + "|"]
    for (where, subject, tokens), cells in sorted(found.items()):
        lines.append(f"| {where} | {subject} | {tokens} | " + " | ".join(cells.get(c, "–") for c in columns) + " |")
    return "\n".join(lines) + "\n"


def both_ratios(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Of prefill and of decode."""
    return " / ".join(f"{median_ratio(theirs[phase], ours[phase]):.2f}" for phase in ("prefill", "decode"))


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times as long others took, round by round."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=False))


def beside_torch(title: str = "") -> str:
    """One linear beside torch's own int4 product, from the last row."""
    rows = last("vs_torch_int4.jsonl", "threads")
    lines = ["", title] if title and rows else []
    for row in rows.values():
        names = list(next(iter(row["microseconds"].values())))
        lines += ["", f"One linear, {row['threads']} threads ({row['kernels']}), microseconds, median and range of 15:", ""]
        lines += ["| linear, rows of inputs | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
        for what, times in row["microseconds"].items():
            lines.append(f"| {what} | " + " | ".join(f"{m:.0f} ({a:.0f} … {b:.0f})" for m, a, b in times.values()) + " |")
    return "\n".join(lines) + "\n" if lines else ""


def loading(title: str = "") -> str:
    """Seconds until a checkpoint is there, from the last row of each shape."""
    rows = last("loading.jsonl", "subject")
    lines = ["", title] if title and rows else []
    if rows:
        lines += ["", "Seconds of `sordino.load` in a new process, files in the page cache, median and range of five:", ""]
        lines += ["| shape | checkpoint | s |", "|---|---|---|"]
    for subject, row in rows.items():
        for what, seconds in row["seconds"].items():
            lines.append(f"| {subject} | {what} | {statistics.median(seconds):.2f} ({min(seconds):.2f} … {max(seconds):.2f}) |")
    return "\n".join(lines) + "\n" if lines else ""


def two_paths(title: str = "") -> str:
    """Perplexity by the kernels and by torch, from the last row of each recipe and dtype (bf16 if it does not say)."""
    rows = {(r["recipe"], r.get("dtype", "bfloat16")): r for r in read(ROWS / "native_vs_torch.jsonl")}
    lines = ["", title] if title and rows else []
    if rows:
        lines += ["", "Perplexity of one checkpoint by the kernels and by torch alone (smollm2, WikiText-2 test):", ""]
        lines += ["| recipe | dtype | windows | kernels | torch | apart |", "|---" * 6 + "|"]
    for (recipe, dtype), r in rows.items():
        apart = f"{r['native'] / r['torch'] - 1:+.3%}"
        lines.append(f"| {recipe} | {dtype} | {r['windows']} | {r['native']:.3f} | {r['torch']:.3f} | {apart} |")
    return "\n".join(lines) + "\n" if lines else ""
