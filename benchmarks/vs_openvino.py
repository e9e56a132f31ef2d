"""Prefill and decode beside OpenVINO: the same shapes, threads and lengths, models taking turns in one run.

    python -m venv build/openvino && build/openvino/bin/pip install torch==2.13.0
    build/openvino/bin/pip install "optimum-intel[openvino]" torch==2.13.0 && build/openvino/bin/pip uninstall -y torchvision
    python benchmarks/vs_openvino.py --python build/openvino/bin/python [--threads 2] [--shapes smollm2-135m llama-3.2-1b]

(A torchvision from another index than torch's does not load, and keeps optimum-intel from loading.)
OpenVINO has a model of transformers with random weights, exported and rounded by its own tools: symmetric codes of 4 bits in
groups of 64 in the linears, of 8 in embedding and head, as our checkpoints have them; activations and cache are as it likes
best itself, which is 8 bits, dynamic, where the processor multiplies them. Nothing else should run on the machine. One JSON
row a shape goes to benchmarks/rows/vs_openvino.jsonl; `python benchmarks/render.py` shows them in docs/kernels.md.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

from foreign import making_parser, measure_exported

WORKER = str(Path(__file__).with_name("openvino_worker.py"))
NAME, GROUP = "OpenVINO int4", 64


def main() -> None:
    args = making_parser(__doc__ or "", "optimum-intel[openvino]").parse_args()
    measure_exported(args, NAME, "vs_openvino.jsonl", export, {"openvino": "openvino"})


def export(python: str, plain: Path, made: Path) -> tuple[list[str], int]:
    """OpenVINO's model of one of transformers."""
    subprocess.run([python, WORKER, "export", str(plain), str(made), str(GROUP)], check=True)
    return [python, WORKER, "serve", str(made)], (made / "openvino_model.bin").stat().st_size


if __name__ == "__main__":
    torch.set_num_threads(1)  # of this process, which only waits
    main()
