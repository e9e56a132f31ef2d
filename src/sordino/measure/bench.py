"""Speed and memory of checkpoints beside full precision: prefill, decode, time to first token, peak memory.

Every model lives in a process of its own, so that its memory is its own; they take turns, one round after another, so
that what else the machine does falls on all of them alike. Figures are medians over rounds, ratios are medians of the
ratios within a round. Full precision is a model of the checkpoint's shape with random weights, in bf16 and in fp32: speed
does not depend on the numbers, and the original need not be at hand. So can the checkpoints be: random codes in the shape of
a model that is too big or too far away to quantize here (measure/shapes.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from sordino.anatomy import skeleton
from sordino.contract import Progress
from sordino.errors import InputError
from sordino.measure.roofline import Ceilings, Shares, ceilings
from sordino.measure.shapes import config_of, shape, stored
from sordino.measure.workers import PRECISIONS, ROUNDS, Order, Speed, Worker, in_turns
from sordino.report.notebook import Figure, figure, table
from sordino.report.svg import Series
from sordino.runtime.kernels import status
from sordino.walk.source import locate

PROMPT, DECODED = 512, 32  # tokens, if nothing else is asked for


@dataclass(frozen=True)
class Bench:
    """What one run measured: the models in the order given, then full precision of each shape."""

    models: list[Speed]
    twins: dict[str, dict[str, Speed]]  # by model name, then "bf16" and "fp32"
    prompt_tokens: int
    new_tokens: int
    threads: int
    ceilings: Ceilings | None = None

    header = (
        "model",
        "prefill tokens/s",
        "× bf16",
        "× fp32",
        "decode tokens/s",
        "× bf16",
        "× fp32",
        "first token s",
        "peak MiB",
    )
    where_header = (
        "model",
        "load s",
        "MB read a token",
        "GB/s",
        "of memory's",
        "linears of the prompt, GOP/s",
        "of int8's",
        "kernels' share of the prompt",
        "of a token",
    )

    def row(self, speed: Speed) -> dict[str, Any]:
        """Figures of one model."""
        twins = self.twins.get(speed.name, {})
        rates = {"prefill": self.prompt_tokens, "decode": self.new_tokens}
        out: dict[str, Any] = {"model": speed.name}
        for phase, tokens in rates.items():
            found = [tokens / s for s in getattr(speed, phase)]
            out[f"{phase}_tokens_per_s"] = median(found)
            out[f"{phase}_tokens_per_s_range"] = [min(found), max(found)]
        for precision in PRECISIONS:
            twin = twins.get(precision)
            out[f"ratio_to_{precision}"] = (
                None if twin is None else {p: _ratio(getattr(twin, p), getattr(speed, p)) for p in rates}
            )
        out["time_to_first_token_s"] = median(speed.prefill)
        out["peak_memory_bytes"] = speed.peak_memory_bytes
        out["load_s"] = speed.load
        if speed.shares is not None:
            out |= self._where(speed, speed.shares)
        return out

    def _where(self, speed: Speed, found: Shares) -> dict[str, Any]:
        """What a token reads and a prompt multiplies, at which rates, and the kernels' share of the time."""
        read, rate = found.weight_bytes * self.new_tokens / median(speed.decode), found.operations / found.linears
        best = self.ceilings
        return {
            "weight_bytes_per_token": found.weight_bytes,
            "decode_gb_per_s": read / 1e9,
            "decode_share_of_read": None if best is None else read / best.read,
            "prefill_linears_gop_per_s": rate / 1e9,
            "prefill_share_of_int8": None if best is None else rate / best.int8,
            "kernel_share": {"prefill": found.native[0] / found.prefill, "decode": found.native[1] / found.decode},
        }

    def to_json(self) -> dict[str, Any]:
        """The first model's figures, and those of all under ``models``."""
        every = [*self.models, *{t.name: t for twins in self.twins.values() for t in twins.values()}.values()]
        rows = [self.row(s) for s in every]
        run: dict[str, Any] = {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens, "threads": self.threads}
        run["machine"] = None if self.ceilings is None else self.ceilings.to_json()
        return rows[0] | run | {"rounds": ROUNDS, "kernels": status(), "torch": torch.__version__, "models": rows}

    def cells(self) -> list[tuple[str, ...]]:
        """The table's cells as text: medians, with half the range over rounds."""
        return [
            (
                row["model"], *_phase(row, "prefill"), *_phase(row, "decode"), f"{row['time_to_first_token_s']:.3f}",
                f"{row['peak_memory_bytes'] / 2**20:.0f}",
            )
            for row in self.to_json()["models"]
        ]  # fmt: skip

    def where_cells(self) -> list[tuple[str, ...]]:
        """A second table's cells: what was read and multiplied, and how fast, beside what the machine can do."""

        def share(value: float | None) -> str:
            return "–" if value is None else f"{100 * value:.0f} %"

        return [
            (
                row["model"],
                "–" if row["load_s"] is None else f"{row['load_s']:.2f}",
                f"{row['weight_bytes_per_token'] / 1e6:.0f}",
                f"{row['decode_gb_per_s']:.1f}",
                share(row["decode_share_of_read"]),
                f"{row['prefill_linears_gop_per_s']:.0f}",
                share(row["prefill_share_of_int8"]),
                *(share(part) for part in row["kernel_share"].values()),
            )
            for row in self.to_json()["models"]
            if "kernel_share" in row
        ]

    def figure(self) -> Figure:
        """Decoded tokens a second over peak memory, full precision included."""
        rows = self.to_json()["models"]
        points = [(row["peak_memory_bytes"] / 2**20, row["decode_tokens_per_s"], row["model"]) for row in rows]
        return figure([Series("decode", points)], "peak MiB", "decode tokens/s", lines=False, log_x=True)

    def _repr_html_(self) -> str:
        return table(self.cells(), self.header)


def _phase(row: dict[str, Any], phase: str) -> list[str]:
    (low, high), middle = row[f"{phase}_tokens_per_s_range"], row[f"{phase}_tokens_per_s"]
    ratios = [row[f"ratio_to_{p}"] for p in PRECISIONS]
    return [f"{middle:.0f} ±{50 * (high - low) / middle:.0f}%", *("–" if r is None else f"{r[phase]:.2f}" for r in ratios)]


def _ratio(slow: list[float], fast: list[float]) -> float:
    return median(s / f for s, f in zip(slow, fast, strict=False))


def bench(
    models: Sequence[str | Path] = (),
    *,
    shapes: Sequence[str] = (),
    recipes: Sequence[str] = ("rtn-w4",),
    prompt_tokens: int = PROMPT,
    new_tokens: int = DECODED,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Measure models in one run.

    Args:
        models: anything that :func:`sordino.load` takes.
        shapes: names of known shapes (measure/shapes.py), of which random checkpoints are made.
        recipes: as what they are stored.
        prompt_tokens: length of the prompt (random tokens, one text).
        new_tokens: how many tokens are decoded after it, one by one.
        threads: of every model; None for torch's own choice.
        progress: called with (what, done, total).

    Raises:
        InputError: if a model cannot be loaded or has too few positions, a shape is unknown, or there is nothing to measure.
    """
    if not models and not shapes:
        raise InputError("nothing to measure: name a checkpoint, or give --shape")
    threads, length = threads or torch.get_num_threads(), prompt_tokens + new_tokens
    subjects = {Order(str(m)): _shape(m, length) for m in models}
    for name in shapes:
        config = shape(name)
        _check_length(config, length, name)
        kind = json.dumps(config)
        subjects |= {Order(f"{name} {r}", kind, storage=stored(config, r)): kind for r in recipes}
    twins = _twins(list(dict.fromkeys(subjects.values())))
    with ExitStack() as stack:
        orders = [*subjects, *twins.values()]
        workers = [stack.enter_context(Worker(order, threads, (prompt_tokens, new_tokens))) for order in orders]
        speeds = {s.name: s for s in in_turns(workers, progress)}
    beside = {
        order.name: {p: speeds[twins[kind, p].name] for p in PRECISIONS if (kind, p) in twins}
        for order, kind in subjects.items()
    }
    best = ceilings(threads)
    return Bench([speeds[order.name] for order in subjects], beside, prompt_tokens, new_tokens, threads, best)


def _twins(kinds: list[str]) -> dict[tuple[str, str], Order]:
    """Full precision of each shape, by (shape, precision); models of one shape share them, and what has no room is left out."""
    room = 0.8 * psutil.virtual_memory().available
    found = {}
    for i, kind in enumerate(kinds):
        weights = sum(p.numel() for p in skeleton(config_of(json.loads(kind))).parameters())
        for precision, dtype in PRECISIONS.items():
            room -= weights * dtype.itemsize
            if room > 0:
                name = f"{precision} twin" + (f", shape {i + 1}" if len(kinds) > 1 else "")
                found[kind, precision] = Order(name, kind, precision)
    return found


def positions(name: str | Path) -> int | None:
    """How many tokens a model can hold; None if its config does not say."""
    limit = _config(name).get("max_position_embeddings")
    return limit if isinstance(limit, int) else None


def _config(name: str | Path) -> dict[str, Any]:
    folder = locate(name)
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{folder} has no readable config.json: not a model directory") from None
    return config


def _shape(name: str | Path, length: int) -> str:
    """A model's config as JSON, without what quantization added: the shape of its full-precision twin."""
    config = _config(name)
    _check_length(config, length, name)
    for key in ("quantization_config", "dtype", "torch_dtype", "_name_or_path", "transformers_version"):
        config.pop(key, None)
    return json.dumps(config, sort_keys=True)


def _check_length(config: dict[str, Any], length: int, name: str | Path) -> None:
    limit = config.get("max_position_embeddings")
    if isinstance(limit, int) and length > limit:
        raise InputError(f"{length} tokens of prompt and answer are more than the {limit} positions of {name}")
