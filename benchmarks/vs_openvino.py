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

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from foreign import making_parser, measured_beside, version_of
from ladder import ROWS, keep
from sordino.measure.shapes import config_of, shape

WORKER = str(Path(__file__).with_name("openvino_worker.py"))
NAME, GROUP = "OpenVINO int4", 64


def main() -> None:
    args = making_parser(__doc__ or "", "optimum-intel[openvino]").parse_args()
    for name in args.shapes:
        row = compare(name, args.python, args.threads, (args.prompt_tokens, args.new_tokens))
        keep(ROWS / "vs_openvino.jsonl", row)
        print(json.dumps(row, indent=1), flush=True)


def compare(name: str, python: str, threads: int, tokens: tuple[int, int]) -> dict[str, Any]:
    """One shape: both engines, and transformers in bf16."""
    config = shape(name)
    with tempfile.TemporaryDirectory() as folder:
        plain, four = Path(folder) / "plain", Path(folder) / "int4"
        transformers.AutoModelForCausalLM.from_config(config_of(config), dtype=torch.bfloat16).save_pretrained(plain)
        subprocess.run([python, WORKER, "export", str(plain), str(four), str(GROUP)], check=True)
        command = [python, WORKER, "serve", str(four), *(str(n) for n in (threads, *tokens))]
        size = (four / "openvino_model.bin").stat().st_size
        row = measured_beside(name, config, Path(folder), {NAME: (command, size)}, threads, tokens)
    return row | {"openvino": version_of(python, "openvino")}


if __name__ == "__main__":
    torch.set_num_threads(1)  # of this process, which only waits
    main()
