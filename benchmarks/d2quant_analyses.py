"""The analyses behind D²Quant (spec section 5, protocols A to D, and M) on a real model; E, the ablation, is d2quant.py.

    python benchmarks/d2quant_analyses.py --calibrate wiki.valid.raw --other c4.txt [--parts A B C D]

A  projection sensitivity: only one kind of linear at 2 bits, and all kinds but one, as the change of held-out loss
B  column heterogeneity: how uneven the columns of each kind are, and what a column scale could gain, before and after rotation
C  heavy tails: largest over median input energy of each site, and kurtosis of down_proj's input
D  mean shift: signal to noise at the post-attention norm, fitted on one text and measured on both
M  merging the column scale: what rounding the merged scales costs

One JSON row a part goes to benchmarks/rows/d2quant_analyses.jsonl; render.py makes tables of them. Loss is measured on the
windows of the calibration text that calibration did not use.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sordino
from ladder import ROWS, code_version, keep
from sordino.anatomy import anatomy_of
from sordino.contract import BlockContext, Move
from sordino.corpus import calibration_windows, load_text, tokenize
from sordino.moves import MOVES
from sordino.numerics.additive import AdditiveGrid
from sordino.numerics.basis import Basis
from sordino.recipe import load_recipe
from sordino.walk.context import Context

KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", required=True)
    parser.add_argument("--other", required=True, help="text of another domain, for the hold-out of D")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--parts", nargs="*", default=["A", "B", "C", "D", "M"])
    args = parser.parse_args()
    parts = {"A": sensitivity, "B": heterogeneity, "C": heavy_tails, "D": mean_shift, "M": merge}
    for part in args.parts:
        result = {"part": part, "model": args.model, "version": code_version(), **parts[part](args)}
        keep(ROWS / "d2quant_analyses.jsonl", result)
        print(part, json.dumps(result)[:400], flush=True)


# A


def sensitivity(args: argparse.Namespace) -> dict[str, Any]:
    """Loss of 2-bit models in which one kind of linear is rounded, or one is left out."""
    held = windows(args, args.calibrate)[args.windows :]
    base = loss(args.model, held)
    out: dict[str, Any] = {}
    for solver in ("rtn", "gptq"):
        for kind in KINDS:
            others = [f"*.{k}" for k in KINDS if k != kind]
            for label, ignored in (("only", others), ("all but", [f"*.{kind}"])):
                recipe = load_recipe(
                    f"{solver}-w4" if solver == "rtn" else "gptq-w2",
                    ["format.weights.bits=2", f"format.weights.ignore={json.dumps(ignored)}", "guard=off"],
                )
                with tempfile.TemporaryDirectory() as folder:
                    sordino.quantize(args.model, recipe, Path(folder) / "out", text=args.calibrate, windows=args.windows)
                    delta = loss(str(Path(folder) / "out"), held) - base
                out[f"{solver} {label} {kind}"] = {
                    "mean": float(delta.mean()),
                    "stderr": float(delta.std() / len(delta) ** 0.5),
                }
                print("A", solver, label, kind, out[f"{solver} {label} {kind}"], flush=True)
    model, _ = sordino.load(args.model)
    sizes = {x.name.rpartition(".")[2]: x.in_features * x.out_features for x in anatomy_of(model).linears}
    return {"nll": float(base.mean()), "share": {k: n / sum(sizes.values()) for k, n in sizes.items()}, "delta": out}


@torch.no_grad()
def loss(model: str, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of every window."""
    loaded, _ = sordino.load(model)
    return torch.stack([loaded(input_ids=w[None], labels=w[None]).loss.float() for w in ids])


# B and C


@torch.no_grad()
def heterogeneity(args: argparse.Namespace) -> dict[str, Any]:
    """Coefficient of variation of columns' mean size in a group, and the squared error that a column scale takes away."""
    model, _ = sordino.load(args.model)
    anatomy = anatomy_of(model)
    basis = Basis.draw(model.config.hidden_size, 0)
    out: dict[str, Any] = {}
    for rotated in (False, True):
        for linear in anatomy.linears:
            spread, gain = [], []
            for i in range(0, anatomy.n_blocks, 3):
                w: Tensor = model.get_submodule(anatomy.full_name(i, linear.name)).weight.float()
                if rotated:
                    w = basis.apply(w) if linear.site in anatomy.norms else basis.apply(w.T).T
                group = next(g for g in (128, 64, 32, w.shape[1]) if w.shape[1] % g == 0)
                part = w[:, :group].contiguous()
                size = part.abs().mean(0)
                spread.append(float(size.std() / size.mean()))
                errors = []
                for grid in (AdditiveGrid(2), AdditiveGrid(2, column=False)):
                    errors.append(float((grid.nearest(part, grid.fit(part))[1] - part).square().sum()))
                gain.append(1 - errors[0] / errors[1])
            kind = linear.name.rpartition(".")[2] + (" rotated" if rotated else "")
            out[kind] = {"cv": sum(spread) / len(spread), "gain": sum(gain) / len(gain)}
    return {"kinds": out}


@torch.no_grad()
def heavy_tails(args: argparse.Namespace) -> dict[str, Any]:
    """Largest over median channel energy at the input of every site, and kurtosis of down_proj's input, by block."""
    model, _ = sordino.load(args.model)
    anatomy = anatomy_of(model)
    sites = {x.site: x.name for x in anatomy.linears}
    sums: dict[tuple[int, str], list[Tensor]] = {}
    hooks = []
    for i in range(anatomy.n_blocks):
        for site, name in sites.items():

            def look(_: Any, inputs: Any, key: tuple[int, str] = (i, site)) -> None:
                x = inputs[0].flatten(0, 1).float()
                sums.setdefault(key, []).append(torch.stack([x.square().sum(0), x.square().square().sum(0)]))

            hooks.append(model.get_submodule(anatomy.full_name(i, name)).register_forward_pre_hook(look))
    ids = windows(args, args.calibrate)[: args.windows]
    for w in ids:
        model(input_ids=w[None])
    for hook in hooks:
        hook.remove()
    out: dict[str, Any] = {}
    for site in sites:
        energy = [torch.stack(sums[i, site]).sum(0) for i in range(anatomy.n_blocks)]
        out[site] = {
            "max_over_median": [round(float(e[0].max() / e[0].median()), 1) for e in energy],
            "kurtosis": [round(float(ids.numel() * e[1].sum() / e[0].sum() ** 2 * e.shape[1]), 1) for e in energy],
        }
    return {"sites": out}


# D


class Signal(Move):
    """Watch the deviation at the post-attention norm before it is corrected."""

    name = "signal"
    found: list[dict[str, Any]]
    skip_first = False

    def __init__(self) -> None:
        Signal.found = []

    def after(self, ctx: BlockContext, site: Any) -> None:
        """Mean and variance of the deviation by channel, on calibration and on held-out windows."""
        if site != "o":
            return
        row: dict[str, Any] = {"block": ctx.index}
        mu = None
        for split in ("calib", "heldout"):
            pairs = zip(ctx.inputs("fp", "gate_up", split, stream="q"), ctx.inputs("q", "gate_up", split), strict=True)
            delta = torch.cat([(a.float() - b.float()).flatten(0, 1) for (_, a), (_, b) in pairs])
            later = torch.cat([(a.float() - b.float())[:, 1:].flatten(0, 1) for (_, a), (_, b) in zip(
                ctx.inputs("fp", "gate_up", split, stream="q"), ctx.inputs("q", "gate_up", split), strict=True)])  # fmt: skip
            if mu is None:
                mu = delta.mean(0)
                ratio = mu.abs() / delta.std(0).clamp(min=1e-12)
                quantiles = torch.tensor([0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0])
                row["snr_quantiles"] = [round(float(v), 4) for v in ratio.quantile(quantiles)]
            for label, d in (("", delta), (" without token 0", later)):
                row[split + label] = 1 - float((d - mu).square().mean() / d.square().mean())
        Signal.found.append(row)


def mean_shift(args: argparse.Namespace) -> dict[str, Any]:
    """Share of the squared deviation that the shift takes away, on the text it was fitted on and on further windows."""
    MOVES["signal"] = Signal
    recipe = load_recipe("d2quant-w2", ['moves=[{move="rotate"},{move="signal"},{move="mean-shift",always=true}]'])
    out: dict[str, Any] = {}
    for label, text in (("calibrated on this text", args.calibrate), ("calibrated on the other text", args.other)):
        with tempfile.TemporaryDirectory() as folder:
            sordino.quantize(args.model, recipe, Path(folder) / "out", text=text, windows=4 * args.windows)
        out[label] = Signal.found
    return {"texts": out}


# M


def merge(args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of `d2quant-w2` in fp32, with up_proj's merged scales as stored and as they were before their rounding."""
    scales: list[Tensor] = []
    absorb = Context._absorb

    def record(self: Context, linear: str, column: Tensor) -> None:
        scales.append(self.solved["mlp.up_proj"].scale * column[:, None])
        absorb(self, linear, column)

    Context._absorb = record  # type: ignore[method-assign]
    held = windows(args, args.calibrate)[args.windows :]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        sordino.quantize(args.model, load_recipe("d2quant-w2", ["guard=off"]), out, text=args.calibrate, windows=args.windows)
        model, _ = sordino.load(out, dtype=torch.float32)
    ppl = {"as stored": perplexity(model, held)}
    for layer, scale in zip(model.model.layers, scales, strict=True):
        up = layer.mlp.up_proj
        exact = nn.Linear(up.in_features, up.out_features, bias=False)
        steps = up.codes().float().view(*scale.shape, -1) - up.zeros().float()[..., None]
        exact.weight = nn.Parameter((steps * scale[..., None]).view(up.out_features, -1))
        layer.mlp.up_proj = exact
    ppl["before rounding"] = perplexity(model, held)
    change = ppl["as stored"] / ppl["before rounding"] - 1
    return {"ppl": ppl, "change": change}


@torch.no_grad()
def perplexity(model: Any, ids: Tensor) -> float:
    """Of all windows together."""
    return float(torch.stack([model(input_ids=w[None], labels=w[None]).loss for w in ids]).mean().exp())


def windows(args: argparse.Namespace, text: str) -> Tensor:
    """Calibration windows and as many held-out ones, [2N, 512]."""
    _, tokenizer = sordino.load(args.model)
    return calibration_windows(tokenize(load_text(text), tokenizer), 512, args.windows, args.windows, 0)


if __name__ == "__main__":
    main()
