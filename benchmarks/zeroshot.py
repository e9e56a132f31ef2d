"""Zero-shot tasks of full precision, by the tool and by plain lm-evaluation-harness, and of recipes, with paired differences.

python benchmarks/zeroshot.py --calibrate wiki.valid.raw --task-data zeroshot [--limit N] [--only NAME …]

One JSON row a recipe in benchmarks/rows/zeroshot.jsonl, with the score of every item, so that any two can be paired later.
Takes a quarter of an hour a row on two cores with all 6653 items. Needs the extra [eval].
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch

import sordino
from ladder import ROWS, add_checkpoints, called, code_version, keep, made, read, there
from sordino.measure.tasks import Tasks, TaskScore, TaskScores, open_tasks, score_of
from sordino.recipe import load_recipe

TASKS = ("piqa", "arc_easy", "arc_challenge", "winogrande")
PLAIN, EXACT = "full precision, plain lm-evaluation-harness", "full precision"
ROTATED = ["format.weights.override=[]", 'moves=[{move="rotate"}]']
# name -> (recipe, overrides)
LADDER: dict[str, tuple[str, list[str]]] = {
    **{name: (name, []) for name in ("w4", "w3", "w2")},
    "rotated gptaq-w2": ("d2quant-w2", ROTATED),
    **{name: (name, []) for name in ("d2quant-w2", "d2quant-paper-w2")},
    **{name: (name, ["guard=off"]) for name in ("quarot-w4a4kv4", "spinquant-w4a4kv4")},  # as in prefixquant.py
    **{name: (name, ["guard=off"]) for name in (f"prefixquant-w4a4kv4-{mode}-tuned" for mode in ("static", "dynamic"))},
    "w4a4kv4": ("w4a4kv4", []),
}
# What the papers claim: the first one's mean over the second one's.
PAIRS = (
    ("d2quant-w2", "rotated gptaq-w2"),
    ("d2quant-paper-w2", "rotated gptaq-w2"),
    ("prefixquant-w4a4kv4-static-tuned", "prefixquant-w4a4kv4-dynamic-tuned"),
    ("prefixquant-w4a4kv4-static-tuned", "quarot-w4a4kv4"),
    ("prefixquant-w4a4kv4-static-tuned", "spinquant-w4a4kv4"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", required=True, help="calibration text")
    parser.add_argument("--task-data", required=True, help="folder of local task files, see docs/tasks.md")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--limit", type=int, help="items of each task")
    parser.add_argument("--only", nargs="*", help="names of rows, in this order")
    add_checkpoints(parser)
    args = parser.parse_args()
    names = args.only or [PLAIN, EXACT, *LADDER]
    if unknown := set(names) - {PLAIN, EXACT, *LADDER}:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    tasks = open_tasks(TASKS, args.task_data, args.limit)
    for name in names:
        measure(name, tasks, args)


def measure(name: str, tasks: Tasks, args: argparse.Namespace) -> None:
    """One row, unless it is there."""
    recipe, overrides = LADDER.get(name, (None, []))
    digest = load_recipe(recipe, overrides).digest if recipe else "full"
    key = {"name": name, "digest": digest, "version": code_version(), "model": called(args.model), "limit": args.limit}
    if there(ROWS / "zeroshot.jsonl", key):
        return
    row: dict[str, Any] = key | {"recipe": recipe, "overrides": overrides, "cores": os.cpu_count()}
    with made(args, recipe, overrides, "--seed", "0") as (subject, cost, manifest):
        if recipe:
            row |= {"quantize": cost, "bits_per_weight": manifest["bits_per_weight"]}
        model, tokenizer = sordino.load(subject)
        cpu, started = time.process_time(), time.time()
        scores = plainly(model, tokenizer, tasks) if name == PLAIN else tasks.run(model, tokenizer)
        row |= {"cpu_seconds": round(time.process_time() - cpu), "seconds": round(time.time() - started)}
        row["threads"] = torch.get_num_threads()
    row["tasks"] = {}
    for task, t in scores.tasks.items():
        items = {m: packed(x) for m, x in t.items.items()}
        row["tasks"][task] = {"figures": t.figures, "samples": t.samples, "content": t.content, "items": items}
    keep(ROWS / "zeroshot.jsonl", row)
    print(f"{name}: mean {scores.mean:.4f} in {row['cpu_seconds']} CPU s", flush=True)


def plainly(model: Any, tokenizer: Any, tasks: Tasks) -> TaskScores:
    """The harness' own wrapper of a transformers model at its default of one request at a time, on the same data."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    suite = {"tasks": tasks.suite.tasks, "groups": tasks.suite.groups, "group_map": {}}
    found = evaluate(HFLM(pretrained=model, tokenizer=tokenizer), suite, limit=tasks.limit, log_samples=True)
    scores = {n: score_of(n, found["results"][n], found["samples"], leaves) for n, leaves in tasks.suite.tops.items()}
    return TaskScores(scores, 0.0)


def packed(items: tuple[float, ...]) -> str:
    """Scores that are 0 or 1, a digit each."""
    return "".join(str(int(x)) for x in items)


# Rendering


def scores_of(row: dict[str, Any]) -> TaskScores:
    """What a row holds, to be compared."""
    tasks = {
        name: TaskScore(t["figures"], {m: tuple(map(float, x)) for m, x in t["items"].items()}, t["samples"], t["content"])
        for name, t in row["tasks"].items()
    }
    return TaskScores(tasks, 0.0)


def rendered() -> str:
    """The section of docs/results.md, from the last row of each name; empty without rows."""
    rows = read(ROWS / "zeroshot.jsonl")
    found = {r["name"]: r for r in rows if r["model"] == "smollm2" and r["limit"] is None}
    some = {r["limit"]: r for r in rows if r["model"] == "smollm2" and r["limit"] is not None and r["name"] == EXACT}
    if EXACT not in found:
        return ""
    exact = scores_of(found[EXACT])
    shown = [f"{n} {t.metric}" for n, t in exact.tasks.items()]
    lines = ["", "## Zero-shot tasks (`benchmarks/zeroshot.py`)", ""]
    items = sum(t.samples for t in exact.tasks.values())
    lines += [f"All {items} items, bf16. Differences are paired item by item; an interval that holds 0 tells none.", ""]
    lines += ["| recipe | bits/weight | " + " | ".join(shown) + " | mean | to full precision [95 %] | CPU s |"]
    lines += ["|---" * (len(shown) + 5) + "|"]
    for name in (EXACT, *LADDER):
        if name in found:
            own = scores_of(found[name])
            cells = [name, f"{found[name].get('bits_per_weight', 16):.3f}", *(f"{t.value:.4f}" for t in own.tasks.values())]
            cells += [f"{own.mean:.4f} ± {own.mean_stderr:.4f}", "–" if name == EXACT else difference(own, exact)]
            lines.append(f"| {' | '.join([*cells, str(found[name]['cpu_seconds'])])} |")
    for limit, row in some.items():
        took = f"{row['seconds']} s on {row['threads']} threads, {row['cpu_seconds']} s CPU"
        lines += ["", f"The first {limit} items of each task, full precision: mean {scores_of(row).mean:.4f}, {took}."]
    if PLAIN in found:
        pairs = [(found[PLAIN]["tasks"][n], t) for n, t in found[EXACT]["tasks"].items()]
        verdict = "equal to the last digit" if all(p["figures"] == t["figures"] for p, t in pairs) else "NOT equal"
        same = all(p["items"] == t["items"] for p, t in pairs)
        every = "every item's score is the same" if same else "not every item's score is the same"
        lines += ["", f"Plain lm-evaluation-harness on the same model and data: figures {verdict}, {every}."]
    if claims := [(a, b) for a, b in PAIRS if a in found and b in found]:
        lines += ["", "| one | against | difference of means [95 %] |", "|---|---|---|"]
        lines += [f"| {a} | {b} | {difference(scores_of(found[a]), scores_of(found[b]))} |" for a, b in claims]
    return "\n".join(lines) + "\n"


def difference(ours: TaskScores, theirs: TaskScores) -> str:
    """Of the means, with its interval."""
    d = ours.mean_difference(theirs)
    return "–" if d is None else f"{d.value:+.4f} [{d.low:+.4f}, {d.high:+.4f}]"


if __name__ == "__main__":
    main()
