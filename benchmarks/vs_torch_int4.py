"""One linear at 4 bits: Sordino's kernels beside torch's own int4 product and bf16, taking turns in one process.

    python benchmarks/vs_torch_int4.py [--threads 2]

Linears of smollm2's and Llama-3.2-1B's shapes, groups of 64 (W4, bf16 inputs) or one scale a row (W4A8, static), one row of
inputs and 512. Before every call of one row so many other weights are read that none is in the cache, as when a model decodes.
Median, least and most of the rounds. One JSON row goes to benchmarks/rows/vs_torch_int4.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ladder import ROWS, code_version, keep
from sordino.runtime.kernels import status
from sordino.runtime.modules import QuantLinear

SHAPES = {"smollm2 up": (576, 1536), "smollm2 down": (1536, 576), "1B up": (2048, 8192), "1B down": (8192, 2048)}
GROUP, ROUNDS = 64, 15
COLD = 64 << 20  # bytes of weights that are gone through, one copy after another


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    row = {"version": code_version(), "cores": os.cpu_count(), "threads": args.threads, "kernels": status()}
    with torch.inference_mode():
        row["microseconds"] = {f"{name}, {rows}": measure(*shape, rows) for name, shape in SHAPES.items() for rows in (1, 512)}
    keep(ROWS / "vs_torch_int4.jsonl", row)
    print(json.dumps(row, indent=1))


def measure(inputs: int, outputs: int, rows: int) -> dict[str, list[float]]:
    """Microseconds of every engine, one entry a round."""
    x = torch.randn(rows, inputs, dtype=torch.bfloat16)
    engines = {
        "W4": lambda: packed(inputs, outputs, GROUP, None),
        "W4A8": lambda: packed(inputs, outputs, inputs, {"bits": 8, "mode": "static"}),
        "torch int4": lambda: torch_int4(inputs, outputs),
        "torch bf16": lambda: half(inputs, outputs),
    }
    copies = max(1, COLD // (inputs * outputs // 2)) if rows == 1 else 1
    linears = {name: [make() for _ in range(copies)] for name, make in engines.items()}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(ROUNDS + 1):
        for name, some in linears.items():
            started = time.perf_counter()
            for linear in some:
                linear(x)
            if turn:
                times[name].append(1e6 * (time.perf_counter() - started) / copies)
    return {name: [statistics.median(t), min(t), max(t)] for name, t in times.items()}


def packed(inputs: int, outputs: int, group: int, rounding: dict[str, object] | None) -> Callable[[Tensor], Tensor]:
    """A QuantLinear of random codes."""
    module = QuantLinear(inputs, outputs, False, 4, group, True, inputs=rounding)
    module.weight_packed.random_(-(2**31), 2**31 - 1)
    module.weight_scale.fill_(0.01)
    if rounding is not None:
        module.input_scale.fill_(0.02)
    return module


def torch_int4(inputs: int, outputs: int) -> Callable[[Tensor], Tensor]:
    """Torch's own."""
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
    weight = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.full((inputs // GROUP, outputs, 2), 0.01, dtype=torch.bfloat16)
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, weight, GROUP, scales)


def half(inputs: int, outputs: int) -> Callable[[Tensor], Tensor]:
    """No rounding."""
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)
    return lambda x: F.linear(x, weight)


if __name__ == "__main__":
    main()
