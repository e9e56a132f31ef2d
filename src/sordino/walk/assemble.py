"""From finished blocks to a checkpoint: shards, config, tokenizer, recipe, manifest, model card.

Everything is written inside the work folder first and then renamed into OUT, ``sordino.json`` first (it tells ``--fresh``
what to remove), ``config.json`` last: without it nothing loads the folder, so a killed run never leaves a checkpoint
that looks whole. Names, sizes and order depend on the
recipe and the model only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sordino.contract import having
from sordino.numerics.basis import Dense
from sordino.recipe import Recipe
from sordino.runtime.modules import BASIS
from sordino.runtime.plugin import SordinoConfig, compress_names
from sordino.runtime.prefix import opening
from sordino.walk.ends import Ends
from sordino.walk.linears import input_grid
from sordino.walk.plan import Plan
from sordino.walk.prefix import first_token
from sordino.walk.source import Source, copy_files, copy_tokenizer
from sordino.walk.store import Work

SHARD_BYTES = 1 << 30


def assemble(source: Source, plan: Plan, work: Work, ends: Ends, out: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the checkpoint, all but its ``config.json``; returns the manifest as stored.

    Raises:
        OSError: if the disk is full or read-only; OUT then holds no ``config.json``.
    """
    final = work.path / "final"
    final.mkdir(parents=True, exist_ok=True)
    for stale in final.iterdir():
        stale.unlink()
    stored = _write_shards(source, plan, work, ends, final)
    copy_tokenizer(source.path, final)
    prefix = manifest.get("prefix", {}).get("ids", [])
    prompt = manifest.get("system_prompt")
    begins = opening(prefix, prompt["tokens"] if prompt else 0)
    if begins is not None and begins == first_token(source.config):
        _begin_once(final, source.tokenizer().convert_ids_to_tokens(begins))
    copy_files(source.path, final, ["generation_config.json"])
    (final / "recipe.toml").write_text(plan.recipe.to_toml(), encoding="utf-8")
    (final / "README.md").write_text(model_card(plan.recipe, manifest), encoding="utf-8")
    config = json.loads(source.config.to_json_string(use_diff=True))
    config.pop("_name_or_path", None)
    config["quantization_config"] = storage_config(plan, prefix, prompt).to_dict()
    names = sorted([p.name for p in final.iterdir()] + ["sordino.json", "config.json"])
    manifest = manifest | {"bytes": stored, "files": names}
    (final / "sordino.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (final / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for shard in final.glob("*.safetensors"):  # safetensors makes files that nobody but their owner may read
        shutil.copymode(final / "config.json", shard)
    for name in sorted(set(names) - {"config.json"}, key=lambda n: (n != "sordino.json", n)):
        (final / name).replace(out / name)
    return manifest


def publish(work: Work, out: Path) -> None:
    """Put ``config.json`` where it belongs: from here on the checkpoint can be loaded."""
    (work.path / "final" / "config.json").replace(out / "config.json")


def storage_config(plan: Plan, prefix: list[int], prompt: dict[str, Any] | None = None) -> SordinoConfig:
    """The ``quantization_config`` of a plan's checkpoint with some prefix tokens."""
    kinds: dict[tuple[int, int | str, bool, str, int | None, int, int, bool], list[str]] = {}
    for p in plan.quantized():
        group: int | str = "channel" if p.group == p.linear.in_features else int(p.group or 0)
        kind = (p.format.bits, group, p.format.symmetric, p.format.grid, p.inputs, p.kept, p.side, p.column)
        kinds.setdefault(kind, []).append(p.name)
    fmt, anatomy = plan.recipe.format, plan.anatomy
    groups = [
        {"bits": b, "group": g, "symmetric": s, "modules": compress_names(names, anatomy.blocks, anatomy.n_blocks)}
        | ({} if grid == "affine" else {"grid": grid})
        | ({"inputs": input_grid(fmt.activations, of).stored()} if fmt.activations.rounded else {})
        | ({"kept": kept} if kept else {})
        | ({"side": side} if side else {})
        | ({"column": True} if column else {})
        for (b, g, s, grid, of, kept, side, column), names in kinds.items()
    ]
    if fmt.head != 16 and not anatomy.tied:
        groups.append({"bits": fmt.head, "group": "channel", "symmetric": True, "modules": [anatomy.head]})
    first, last = plan.blocks
    added: dict[str, range] = {}
    for move in plan.moves:  # what reshapes a block does so with all of them
        span = range(anatomy.n_blocks) if having([move], "reshape") else range(first, last)
        added |= {name: max(span, added.get(name, span), key=len) for name in move.biases(anatomy)}
    biases = [anatomy.full_name(i, name) for name in sorted(added) for i in added[name]]
    kv = {"bits": fmt.kv.bits, "symmetric": fmt.kv.symmetric, "static": fmt.kv.static, "blocks": list(plan.blocks)}
    basis: dict[str, Any] | None = None
    if isinstance(plan.basis, Dense):
        basis = {"size": len(plan.basis.matrix), "signs": None}
    elif plan.basis is not None:
        basis = {"size": plan.basis.size, "signs": plan.basis.signs}
    return SordinoConfig(
        groups,
        fmt.embeddings,
        fmt.head,
        biases=compress_names(biases, anatomy.blocks, anatomy.n_blocks) + [anatomy.final_norm] * plan.final_bias,
        basis=basis,
        prefix=prefix,
        system_prompt=prompt,
        inner=list(plan.inner),
        kv=kv if fmt.kv.rounded else None,
    )


def model_card(recipe: Recipe, manifest: dict[str, Any]) -> str:
    """README of the checkpoint; its first line is the import that transformers needs."""
    return (
        "`import sordino` before `AutoModelForCausalLM.from_pretrained`: without it transformers loads random weights.\n\n"
        f"# Quantized with Sordino: `{recipe.name}`\n\n{recipe.summary}\n\n"
        "```python\nimport sordino  # registers the format\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".")\ntokenizer = AutoTokenizer.from_pretrained(".")\n```\n\n'
        f"- {manifest['coverage']}\n- {manifest['bits_per_weight']:.3f} bits per quantized weight\n"
        f"- recipe `recipe.toml` (digest {recipe.digest}), details in `sordino.json`\n"
    )


def _tensors(source: Source, plan: Plan, work: Work, ends: Ends) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor, one at a time: blocks, then what surrounds them."""
    for index in range(plan.anatomy.n_blocks):
        path = f"{plan.anatomy.blocks}.{index}"
        block = source.under(path) if work.left_alone(index, plan.blocks) else work.load_block(index)
        yield from ((f"{path}.{name}", tensor) for name, tensor in sorted(block.items()))
        source.close()  # unmap what was read
    learned = (
        {f"{plan.anatomy.final_norm}.{BASIS}": plan.basis.matrix.view(torch.int32)} if isinstance(plan.basis, Dense) else {}
    )
    yield from sorted((ends.tensors | learned).items())


def _begin_once(folder: Path, token: str) -> None:
    """Keep a tokenizer from putting the token that begins a text behind a prefix that ends in it.

    Both places must say so: transformers follows the template in ``tokenizer.json`` whatever ``add_bos_token`` is.
    """

    def without(node: Any) -> Any:
        if isinstance(node, list):
            return [without(x) for x in node if not (isinstance(x, dict) and x.get("SpecialToken", {}).get("id") == token)]
        return {k: v if k == "special_tokens" else without(v) for k, v in node.items()} if isinstance(node, dict) else node

    def edit(name: str, change: Callable[[Any], Any]) -> None:
        file = folder / name
        if file.is_file() and (new := change(old := json.loads(file.read_text(encoding="utf-8")))) != old:
            file.write_text(json.dumps(new, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    edit("tokenizer_config.json", lambda c: c | {"add_bos_token": False} if c.get("add_bos_token") else c)
    edit("tokenizer.json", lambda t: t | {"post_processor": without(t.get("post_processor"))})


def _write_shards(source: Source, plan: Plan, work: Work, ends: Ends, folder: Path) -> int:
    """Write the tensors in shards of about ``SHARD_BYTES``; returns their bytes."""
    weight_map: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    count = total = size = 0

    def flush() -> None:
        nonlocal shard, count, size
        save_file({k: v.contiguous() for k, v in shard.items()}, folder / f"shard-{count}", metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, count))
        shard, size, count = {}, 0, count + 1

    for name, tensor in _tensors(source, plan, work, ends):
        if shard and size + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if count == 1:
        (folder / "shard-0").replace(folder / "model.safetensors")
    else:
        label = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for i, name in enumerate(label):
            (folder / f"shard-{i}").replace(folder / name)
        index = {"metadata": {"total_size": total}, "weight_map": {n: label[i] for n, i in sorted(weight_map.items())}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))
