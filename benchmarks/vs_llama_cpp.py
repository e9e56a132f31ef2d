"""Prefill and decode beside llama.cpp: the same shapes, threads and lengths, models taking turns in one run.

    python -m venv build/llama && build/llama/bin/pip install --no-binary llama-cpp-python llama-cpp-python
    python benchmarks/vs_llama_cpp.py --python build/llama/bin/python [--threads 2] [--shapes smollm2-135m llama-3.2-1b]

It is built from source, some twenty minutes on two cores, for the machine at hand. Where llama.cpp's own path for matrix tiles
dies of an illegal instruction (0.3.36 on a virtual Sapphire Rapids did, in ggml_backend_amx_mul_mat), build it without them:
CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON".

Weights are random on both sides: F16 GGUF files written here, Q4_0 made of them by llama.cpp itself, and random checkpoints in
Sordino's format. What the numbers are does not matter to speed. Nothing else should run on the machine. One JSON row a shape
goes to benchmarks/rows/vs_llama_cpp.jsonl; `python benchmarks/render.py` shows them in docs/kernels.md.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from foreign import making_parser, measured_beside, version_of
from ladder import ROWS, keep
from sordino.measure.shapes import shape

WORKER = Path(__file__).with_name("llama_cpp_worker.py")


def main() -> None:
    parser = making_parser(__doc__ or "", "llama-cpp-python")
    parser.add_argument("--no-f16", action="store_true", help="leave llama.cpp in F16 out, which takes longest")
    args = parser.parse_args()
    for name in args.shapes:
        row = compare(name, args.python, args.threads, (args.prompt_tokens, args.new_tokens), args.no_f16)
        keep(ROWS / "vs_llama_cpp.jsonl", row)
        print(json.dumps(row, indent=1), flush=True)


def compare(name: str, python: str, threads: int, tokens: tuple[int, int], no_f16: bool) -> dict[str, Any]:
    """One shape: both engines, and transformers in bf16."""
    config = shape(name)
    with tempfile.TemporaryDirectory() as folder:
        half, four = Path(folder) / "f16.gguf", Path(folder) / "q4_0.gguf"
        write(half, config)
        subprocess.run([python, str(WORKER), "quantize", str(half), str(four)], check=True, stderr=subprocess.DEVNULL)
        given = [str(n) for n in (threads, *tokens)]
        others = {
            subject: ([python, str(WORKER), "serve", str(file), *given], file.stat().st_size)
            for subject, file in (("llama.cpp Q4_0", four), ("llama.cpp F16", half))[: 1 if no_f16 else 2]
        }
        row = measured_beside(name, config, Path(folder), others, threads, tokens)
    return row | {"llama_cpp_python": version_of(python, "llama_cpp")}


def write(file: Path, config: dict[str, Any]) -> None:
    """A llama model of random F16 weights, without a vocabulary."""
    hidden, middle, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, key_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config.get("head_dim")
    size = size or hidden // heads
    out = gguf.GGUFWriter(str(file), "llama")
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(hidden)
    out.add_block_count(layers)
    out.add_feed_forward_length(middle)
    out.add_head_count(heads)
    out.add_head_count_kv(key_heads)
    out.add_key_length(size)
    out.add_value_length(size)
    out.add_rope_dimension_count(size)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(config["vocab_size"])
    out.add_tokenizer_model("none")
    out.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    draw = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        out.add_tensor(name, (draw.standard_normal((rows, columns), dtype=np.float32) / columns**0.5).astype(np.float16))

    matrix("token_embd.weight", config["vocab_size"], hidden)
    for i in range(layers):
        block = f"blk.{i}."
        for norm in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"{block}{norm}.weight", np.ones(hidden, np.float32))
        matrix(f"{block}attn_q.weight", heads * size, hidden)
        matrix(f"{block}attn_k.weight", key_heads * size, hidden)
        matrix(f"{block}attn_v.weight", key_heads * size, hidden)
        matrix(f"{block}attn_output.weight", hidden, heads * size)
        matrix(f"{block}ffn_gate.weight", middle, hidden)
        matrix(f"{block}ffn_up.weight", middle, hidden)
        matrix(f"{block}ffn_down.weight", hidden, middle)
    out.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    if not config.get("tie_word_embeddings"):
        matrix("output.weight", config["vocab_size"], hidden)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


if __name__ == "__main__":
    torch.set_num_threads(1)  # of this process, which only waits
    main()
