"""Prefill and decode beside ONNX Runtime GenAI: the same shapes, threads and lengths, models taking turns in one run.

    python -m venv build/onnxruntime && build/onnxruntime/bin/pip install torch==2.13.0
    build/onnxruntime/bin/pip install onnxruntime onnxruntime-genai onnx onnx_ir transformers torch==2.13.0
    python benchmarks/vs_onnxruntime.py --python build/onnxruntime/bin/python [--threads 2] [--shapes smollm2-135m llama-3.2-1b]

ONNX Runtime has a model of transformers with random weights, exported and rounded by its own builder: symmetric codes of 4
bits in groups of 64 in the linears, of 8 in embedding and head, as our checkpoints have them; activations are multiplied in 8
bits, its builder's own choice for CPUs, and the head reads the last token alone. Nothing else should run on the machine. One
JSON row a shape goes to benchmarks/rows/vs_onnxruntime.jsonl; `python benchmarks/render.py` shows them in docs/kernels.md.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

import sordino
from foreign import making_parser, measure_exported

WORKER = str(Path(__file__).with_name("onnxruntime_worker.py"))
NAME, GROUP = "ONNX Runtime int4", 64
OPTIONS = (f"block_size={GROUP}", "algo_config=rtn", "matmul_mixed_precision=last_matmul:int8", "prune_lm_head=true")


def main() -> None:
    args = making_parser(__doc__ or "", "onnxruntime-genai").parse_args()
    versions = {"onnxruntime": "onnxruntime", "genai": "onnxruntime_genai"}
    measure_exported(args, NAME, "vs_onnxruntime.jsonl", export, versions)


def export(python: str, plain: Path, made: Path) -> tuple[list[str], int]:
    """ONNX Runtime's model of one of transformers."""
    sordino.load("smollm2")[1].save_pretrained(plain)  # the builder wants a tokenizer; none is measured
    build = [python, "-m", "onnxruntime_genai.models.builder", "-i", str(plain), "-o", str(made), "-p", "int4"]
    subprocess.run([*build, "-e", "cpu", "-c", str(made.parent), "--extra_options", *OPTIONS], check=True)
    return [python, WORKER, str(made)], sum(f.stat().st_size for f in made.glob("model.onnx*"))


if __name__ == "__main__":
    torch.set_num_threads(1)  # of this process, which only waits
    main()
