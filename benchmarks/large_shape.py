"""Memory at the size of a large model: two blocks of a random Llama-3-8B, quantized from disk.

    python benchmarks/large_shape.py [--folder DIR] [--recipes rtn-w4 gptq-w4]

Writes a checkpoint of that shape in bf16 (16 GB, shard by shard; deleted afterwards), quantizes blocks 0:2 with four
windows through the public command line, and appends one row per recipe with the process's peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from ladder import ROWS, code_version, keep, run
from sordino.walk.source import copy_tokenizer, open_source

LLAMA3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 500000.0,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where 32 GB fit for a while")
    parser.add_argument("--checkpoint", help="a checkpoint that an earlier run was told to --keep")
    parser.add_argument("--keep", action="store_true", help="do not delete the checkpoint")
    parser.add_argument("--recipes", nargs="*", default=["rtn-w4", "gptq-w4"])
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="sordino-8b-", dir=args.folder))
    try:
        model = Path(args.checkpoint or work / "model")
        if not args.checkpoint:
            write_checkpoint(model)
        for recipe in args.recipes:
            command = ["quantize", str(model), "-r", recipe, "-o", str(work / "out"), "--blocks", "0:2"]
            cost = run([*command, "--windows", "4"])
            size = sum(p.stat().st_size for p in (work / "out").glob("*.safetensors"))
            row = {"recipe": recipe, "version": code_version(), "cores": os.cpu_count(), **cost, "output_bytes": size}
            keep(ROWS / "large_shape.jsonl", row)
            print(f"{recipe}: peak {cost['peak_bytes'] / 2**30:.2f} GiB, {cost['seconds']:.0f} s", flush=True)
            shutil.rmtree(work / "out")
    finally:
        if not args.keep:
            shutil.rmtree(work, ignore_errors=True)


def write_checkpoint(folder: Path) -> None:
    """A random Llama-3-8B in bf16, one shard a block, so that no more than a block is ever in memory."""
    folder.mkdir(parents=True)
    config = LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16", **LLAMA3_8B)
    config.save_pretrained(folder)
    copy_tokenizer(open_source("smollm2").path, folder)  # its ids are a subset of this vocabulary
    d, f, kv = config.hidden_size, config.intermediate_size, config.hidden_size // 4
    shapes = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, d)}
    shapes |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    ends = {"model.embed_tokens": (config.vocab_size, d), "lm_head": (config.vocab_size, d)}
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for i in range(config.num_hidden_layers + 1):
        last, prefix = i == config.num_hidden_layers, f"model.layers.{i}."
        names = ends if last else {prefix + k: v for k, v in shapes.items()}
        shard = {f"{k}.weight": (torch.randn(v, generator=generator) * 0.02).bfloat16() for k, v in names.items()}
        norms = ["model.norm"] if last else [prefix + "input_layernorm", prefix + "post_attention_layernorm"]
        shard |= {f"{n}.weight": torch.ones(d, dtype=torch.bfloat16) for n in norms}
        file = f"model-{i + 1:05d}-of-{config.num_hidden_layers + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


if __name__ == "__main__":
    main()
