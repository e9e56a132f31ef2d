"""How much of what is rounded is the same for every token, and what taking it off does to 4-bit codes (reshape/center.py).

python benchmarks/means.py --calibrate wiki.valid.raw

One row in benchmarks/rows/means.jsonl. In full precision, by site, means over the blocks: the mean's share of the energy, and
the relative squared error of 4-bit codes behind a rotation, of the whole and of what is left. Means are of 8 windows of 512
tokens, errors of 4 other ones.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import sordino
from ladder import ROWS, code_version, keep
from sordino.corpus import calibration_windows, load_text, tokenize
from sordino.numerics.hadamard import rotation
from sordino.numerics.inputs import InputGrid
from sordino.numerics.kv import KvGrid

LINEARS = {
    "q_proj": "inputs of q, k, v",
    "o_proj": "input of o_proj",
    "gate_proj": "inputs of gate, up",
    "down_proj": "input of down_proj",
}
GRIDS = {"token": InputGrid(4), "groups": InputGrid(4, group=64, symmetric=False)}
SHARE = {"token": 0.75, "groups": 0.95}  # of the extremes: about what calibration finds
OPENING = 8  # tokens of a window, its massive one among them, that are left out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", required=True, help="text")
    parser.add_argument("--model", default="smollm2")
    args = parser.parse_args()
    model, tokenizer = sordino.load(args.model)
    windows = calibration_windows(tokenize(load_text(args.calibrate), tokenizer), 512, 8, 4, 0)
    seen = watch(model)
    with torch.no_grad():
        model(windows[:8])
        means = {key: x[..., OPENING:, :].double().mean((0, -2), keepdim=True).float() for key, x in seen.items()}
        model(windows[8:])
    found: dict[str, list[dict[str, float]]] = {}
    for (index, what), x in seen.items():
        found.setdefault(what, []).append(effect(what, x[..., OPENING:, :], means[index, what]))
    sites = {what: {k: statistics.fmean(r[k] for r in rows) for k in rows[0]} for what, rows in found.items()}
    row = {"name": "means", "model": args.model, "version": code_version(), "sites": sites}
    keep(ROWS / "means.jsonl", row)
    print(row)


def watch(model: Any) -> dict[tuple[int, str], Tensor]:
    """Where the last forward's inputs [B, L, C], keys and values [B, K, L, d] will be, by block and site."""
    seen: dict[tuple[int, str], Tensor] = {}

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        seen[module.layer_idx, "keys"], seen[module.layer_idx, "values"] = key.float(), value.float()
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    def note(key: tuple[int, str], _: Any, args: tuple[Any, ...]) -> None:
        seen[key] = args[0].float()

    AttentionInterface.register("watching", attend)
    model.set_attn_implementation("watching")
    for index, layer in enumerate(model.model.layers):
        for name, module in layer.named_modules():
            if (what := LINEARS.get(name.rpartition(".")[2])) is not None:
                module.register_forward_pre_hook(partial(note, (index, what)))
    return seen


def effect(what: str, x: Tensor, mean: Tensor) -> dict[str, float]:
    """The mean's share of the energy of [B, …, L, C], and errors of codes with it and without."""
    turn, energy = rotation(x.shape[-1]), x.square().mean()
    out = {"share": float(mean.square().mean() / energy)}
    for kind, left in (("whole", x), ("left", x - mean)):
        turned = turn.apply(left)
        if what in ("keys", "values"):
            codes = {"token": KvGrid(4, symmetric=False, static=False).fake(turned, torch.ones(x.shape[1]))}
        else:
            codes = {name: grid.fake(turned, SHARE[name]) for name, grid in GRIDS.items()}
        out |= {f"{kind} {name}": float((c - turned).square().mean() / energy) for name, c in codes.items()}
    return out


if __name__ == "__main__":
    main()
