"""Zero-shot tasks: the figures of plain lm-evaluation-harness, paired intervals, one clear line for what is wrong."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.evaluator import evaluate as plain_evaluate
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import sordino
from sordino.cli import app
from sordino.errors import InputError
from sordino.measure.compare import compare
from sordino.measure.evaluate import reference
from sordino.measure.local_tasks import LOCAL_TASKS
from sordino.measure.tasks import TaskScore, TaskScores, open_tasks
from sordino.runtime.attention import attach
from tiny import make_tiny

NAMES = ("piqa", "arc_easy", "arc_challenge", "winogrande", "hellaswag", "boolq", "openbookqa", "lambada", "mmlu")
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "it", "was", "in", "rain", "for", "other", "time", "stones", "sing"]
ITEMS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All nine tasks with random sentences of very different lengths: made here, so that the test needs no download."""
    folder, rng = tmp_path_factory.mktemp("zeroshot"), random.Random(0)

    def some(low: int = 1, high: int = 12) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    def rows(make: Callable[[], dict[str, Any]], file: str) -> None:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("".join(json.dumps(make()) + "\n" for _ in range(ITEMS)))

    def four() -> list[str]:
        return [some() for _ in range(4)]

    rows(lambda: {"goal": some(), "sol1": some(), "sol2": some(), "label": rng.randrange(2)}, "piqa/valid.jsonl")
    for name in ("arc_easy", "arc_challenge"):
        rows(lambda: {"question": some(), "choices": four(), "gold": rng.randrange(4)}, f"{name}/test.jsonl")
    blank = {"option1": "cat", "option2": "the other cat"}
    rows(lambda: {"sentence": f"{some()} _ {some()}", "answer": rng.choice("12")} | blank, "winogrande/dev.jsonl")
    rows(lambda: {"query_cap": f"Cat: {some()}", "endings": four(), "label": rng.randrange(4)}, "hellaswag/val.jsonl")
    rows(lambda: {"question": some(), "passage": some(9, 30), "answer": rng.random() < 0.5}, "boolq/dev.jsonl")
    rows(lambda: {"question_stem": some(), "choices": four(), "gold": rng.randrange(4)}, "openbookqa/test.jsonl")
    rows(lambda: {"text": some(5, 20)}, "lambada/test.jsonl")
    subjects = ["anatomy", "virology"]
    rows(
        lambda: {"subject": rng.choice(subjects), "question": some(), "choices": four(), "answer": rng.randrange(4)},
        "mmlu/test.jsonl",
    )
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "model", layers=2)


@pytest.fixture(scope="module")
def checkpoint(model: Path) -> Path:
    out = model.parent / "out"
    sordino.quantize(str(model), "rtn-w4", out, overrides=("format.weights.bits=2", "format.embeddings=8"))
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_plain_lm_eval_to_the_last_digit(model: Path, data: Path, dtype: torch.dtype) -> None:
    """Figures of every task and every log-likelihood, against the harness' own wrapper at its own batch size."""
    tasks = open_tasks(NAMES, data)
    ours = tasks.run(*sordino.load(model, dtype=dtype))
    answers = {name: [i.resps for i in task.instances] for name, task in tasks.suite.tasks.items()}
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    suite = {"tasks": tasks.suite.tasks, "groups": tasks.suite.groups, "group_map": {}}
    theirs = plain_evaluate(HFLM(pretrained=plain, tokenizer=AutoTokenizer.from_pretrained(model)), suite, limit=None)
    assert list(ours.tasks) == [n if n != "lambada" else "lambada_openai" for n in NAMES]
    for name, score in ours.tasks.items():
        for metric in score.figures:
            if "perplexity" not in metric or (dtype == torch.bfloat16 and "stderr" not in metric):
                assert score.figures[metric] == theirs["results"][name][f"{metric},none"]
            # The error of a perplexity is bootstrapped with random numbers of the moment.
    for name, task in tasks.suite.tasks.items():
        found = [answer for i in task.instances for answer, _ in i.resps]
        want = [answer for resps in answers[name] for answer, _ in resps]
        assert found == want if dtype == torch.bfloat16 else found == pytest.approx(want, rel=1e-6)


def test_prompts_are_the_harness_own(data: Path) -> None:
    tasks = open_tasks(["piqa", "arc_easy"], data).suite.tasks
    doc = next(iter(tasks["arc_easy"].eval_docs))
    assert tasks["arc_easy"].doc_to_text(doc) == f"Question: {doc['question']}\nAnswer:"


def test_limit_takes_the_first_items(model: Path, data: Path) -> None:
    loaded = sordino.load(model)
    whole, part = (open_tasks(["piqa", "mmlu"], data, limit).run(*loaded) for limit in (None, 5))
    assert part.tasks["piqa"].items["acc"] == whole.tasks["piqa"].items["acc"][:5]
    assert whole.tasks["mmlu"].samples == ITEMS and part.tasks["piqa"].samples == 5


@pytest.mark.parametrize("more", [{}, {"format.kv.bits=4": "Be brief."}], ids=["prefix", "packed cache and system prompt"])
def test_what_a_checkpoint_does_stays_on(model: Path, data: Path, tmp_path: Path, more: dict[str, str]) -> None:
    """Log-likelihoods of a checkpoint equal a plain forward of the checkpoint, one request at a time."""
    recipe = ("format.activations.bits=8", 'moves=[{move="prefix"}]', "guard=off", *more)
    prompt = next(iter(more.values()), None)
    sordino.quantize(str(model), "rtn-w4", tmp_path / "out", overrides=recipe, windows=8, seqlen=64, system_prompt=prompt)
    loaded, tokenizer = sordino.load(tmp_path / "out")
    from sordino.measure.harness import run_suite

    suite = open_tasks(["piqa"], data, 4).suite
    rows = run_suite(suite, loaded, tokenizer, 4, None)["samples"]["piqa"]
    fresh, _ = sordino.load(tmp_path / "out")
    for row in rows:
        for (context, answer), [(score, _)] in zip(row["arguments"], row["resps"], strict=True):
            first, ids = tokenizer(context).input_ids, tokenizer(context + answer, return_tensors="pt").input_ids
            with torch.no_grad():
                logp = torch.log_softmax(fresh(ids).logits[0], -1)
            want = sum(float(logp[i - 1, ids[0, i]]) for i in range(len(first), ids.shape[1]))
            assert score == pytest.approx(want, rel=1e-4)


def test_a_prefix_takes_places_and_what_is_written_is_not_scored(model: Path, data: Path, tmp_path: Path) -> None:
    from sordino.measure import harness

    loaded, tokenizer = sordino.load(model)
    free = harness.Reader(loaded, tokenizer).max_length
    attach(loaded, (1, 2, 3))
    assert harness.Reader(loaded, tokenizer).max_length == free - 3
    tasks = open_tasks(["piqa"], data).suite.tasks
    tasks["piqa"].OUTPUT_TYPE = "generate_until"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "_open_local", lambda task, folder: {"tasks": tasks})
        with pytest.raises(InputError, match="scored by what a model writes"):
            open_tasks(["piqa"], data)


def short_of_positions(model: Path, to: Path, positions: int) -> Path:
    """The model with fewer positions."""
    shutil.copytree(model, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
    return to


def test_contexts_that_are_cut_are_counted_and_answers_never_are(model: Path, data: Path, tmp_path: Path) -> None:
    short = short_of_positions(model, tmp_path / "short", 60)
    tasks = open_tasks(["boolq", "piqa"], data)
    tokenizer = AutoTokenizer.from_pretrained(model)
    table = compare([short, model], tasks=tasks, against=str(model))
    cut, whole = (e.tasks for _, e in table.rows)
    assert cut is not None and whole is not None
    boolq = [i.args for i in tasks.suite.tasks["boolq"].instances]
    want = sum(len(tokenizer(context + answer).input_ids) > 61 for context, answer in boolq)
    assert cut.tasks["boolq"].cut == want > 0 and not any(t.cut for t in whole.tasks.values())
    assert cut.to_json()["boolq"]["contexts_cut"] == want and "contexts_cut" not in whole.to_json()["boolq"]
    assert [note for note in table.notes() if f"boolq: {want} contexts" in note] and str(model) not in "".join(table.notes())
    alone = sordino.evaluate(short, tasks=tasks)
    assert ("boolq: contexts too long, cut on the left", str(want)) in alone.lines()
    with pytest.raises(InputError, match=r"piqa: item \d has an answer of \d+ tokens, the model 10 positions$"):
        sordino.evaluate(short_of_positions(model, tmp_path / "shorter", 10), tasks=tasks)


def test_scores_that_are_no_numbers_are_shown_as_such(model: Path, data: Path, tmp_path: Path) -> None:
    """Else the harness would take the first answer for the likeliest."""
    shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * math.nan}, tmp_path / "broken/model.safetensors")
    table = compare([tmp_path / "broken", model], tasks="piqa, arc_easy", task_data=data, against=str(model))
    broken, same = (e for _, e in table.rows)
    assert broken.tasks is not None and math.isnan(broken.tasks.tasks["piqa"].value) and math.isnan(broken.tasks.mean)
    assert table.cells()[0][-1] == table.cells()[1][-1] == "–"  # nothing to compare; and with itself
    assert ["NaN" in note and "broken" in note for note in table.notes()] == [True]
    assert [cells[1:] for cells in table.differences()[0][1]] == [("–", "–"), ("–", "–")]
    assert same.tasks is not None
    assert table.plots()["mean of tasks"].frontier == [(same.bytes / 2**20, same.tasks.mean)]


def test_differences_task_by_task(model: Path, checkpoint: Path, data: Path) -> None:
    table = compare(checkpoint, tasks=["piqa", "arc_easy"], task_data=data, against=str(model))
    [(header, [row])] = table.differences()
    figures = table.to_json()[0]["tasks"]
    for name, cell in zip(("piqa", "arc_easy"), row[1:], strict=True):
        assert cell.startswith(f"{figures[name]['acc_norm_difference']:+.3f} [")
    assert len(header) == len(row) and table.tables()[-1] == (header, [row])


def test_a_tokenizer_that_neither_begins_nor_ends_texts(model: Path, data: Path) -> None:
    loaded, tokenizer = sordino.load(model)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match="begins or ends a text"):
        open_tasks(["piqa"], data).run(loaded, tokenizer)


def test_rows_that_the_harness_cannot_take_and_a_byte_order_mark(data: Path, tmp_path: Path) -> None:
    (tmp_path / "hellaswag").mkdir()
    row = {"query_cap": "Cat: it", "endings": ["[x]", "b", "c", "d"], "label": 0}  # its clean-up leaves nothing of the first
    (tmp_path / "hellaswag" / "val.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match="hellaswag: lm-evaluation-harness cannot make items of these rows"):
        open_tasks(["hellaswag"], tmp_path)
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "valid.jsonl").write_text("\ufeff" + (data / "piqa" / "valid.jsonl").read_text())
    assert open_tasks("piqa", tmp_path).suite.tops == {"piqa": ("piqa",)}


def test_boolq_with_its_title_apart() -> None:
    row = {"question": "is it", "passage": "It is.", "answer": True}
    convert = LOCAL_TASKS["boolq"].convert
    assert convert(row)["passage"] == "It is."
    assert convert(row | {"title": "Being"})["passage"] == "Being -- It is."
    assert convert(row | {"title": "Being", "passage": "Being -- It is."})["passage"] == "Being -- It is."


def test_evaluate_gives_paired_differences(model: Path, checkpoint: Path, data: Path) -> None:
    figures = sordino.evaluate(checkpoint, against=str(model), tasks=["piqa", "arc_easy"], task_data=data)
    row = figures.to_json()
    assert row["ppl"] is None and row["kl"] is None and row["bits_per_weight"] > 0
    ours, theirs = (t.tasks["piqa"].items["acc"] for t in (figures.tasks, figures.tasks_against))  # type: ignore[union-attr]
    piqa = row["tasks"]["piqa"]
    assert piqa["acc_difference"] == pytest.approx(sum(ours) / ITEMS - sum(theirs) / ITEMS)
    assert piqa["acc_difference_low"] <= piqa["acc_difference"] <= piqa["acc_difference_high"]
    assert row["tasks_mean"]["mean"] == pytest.approx((piqa["acc_norm"] + row["tasks"]["arc_easy"]["acc_norm"]) / 2)


def scores(**items: list[float]) -> TaskScores:
    tasks = {n: TaskScore({"acc": sum(v) / len(v), "acc_stderr": 0.1}, {"acc": tuple(v)}, len(v)) for n, v in items.items()}
    return TaskScores(tasks, 0.0)


def test_interval_agrees_with_mcnemar_and_with_the_formula() -> None:
    rng = random.Random(1)
    theirs = [float(rng.random() < 0.6) for _ in range(400)]
    ours = [1 - x if rng.random() < 0.1 else x for x in theirs]
    found = scores(a=ours).difference(scores(a=theirs), "a", "acc")
    assert found is not None
    d = torch.tensor(ours) - torch.tensor(theirs)
    assert found.value == pytest.approx(float(d.mean()))
    half = 1.96 * float(d.std()) / 20
    assert found.low == pytest.approx(found.value - half, abs=0.004) and found.high == pytest.approx(
        found.value + half, abs=0.004
    )
    wins, losses = int((d > 0).sum()), int((d < 0).sum())
    assert (binomtest(wins, wins + losses).pvalue < 0.05) == (not found.low <= 0 <= found.high)
    mean = scores(a=ours, b=theirs).mean_difference(scores(a=theirs, b=theirs))
    assert mean is not None and mean.value == pytest.approx(found.value / 2)
    assert mean.high - mean.low == pytest.approx((found.high - found.low) / 2, rel=0.05)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (3, 0), (4, 0), (6, 0), (7, 1), (9, 2), (10, 2), (3, 9), (20, 8)])
def test_interval_of_few_differing_items(wins: int, losses: int) -> None:
    """Never surer than half as sure again as McNemar's exact test, and the other way round; never of no width."""
    n = 200
    ours, theirs = [1.0] * wins + [0.0] * (n - wins), [0.0] * wins + [1.0] * losses + [0.0] * (n - wins - losses)
    found = scores(a=ours).difference(scores(a=theirs), "a", "acc")
    assert found is not None and found.low < found.high
    want = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert found.p == pytest.approx(want)
    if want > 0.075:
        assert found.low <= 0 <= found.high
    if want < 0.025:
        assert not found.low <= 0 <= found.high


def test_interval_covers() -> None:
    """Of samples from a known difference, about 95 in 100 intervals hold it, few differing items or many."""
    rng = random.Random(5)
    for rate in (0.03, 0.2):
        held = 0
        for _ in range(400):
            signs = [(rng.random() < rate) * (1 if rng.random() < 0.7 else -1) for _ in range(150)]
            found = scores(a=[float(s > 0) for s in signs]).difference(scores(a=[float(s < 0) for s in signs]), "a", "acc")
            assert found is not None
            held += found.low - 1e-9 <= rate * 0.4 <= found.high + 1e-9
        assert 0.92 <= held / 400 <= 0.99


def test_tasks_are_drawn_independently() -> None:
    """The mean of four tasks with equal counts is twice as sure as one of them."""
    ours, theirs = [1.0] * 30 + [0.0] * 170, [0.0] * 30 + [1.0] * 20 + [0.0] * 150
    one = scores(a=ours).difference(scores(a=theirs), "a", "acc")
    four = scores(a=ours, b=ours, c=ours, d=ours).mean_difference(scores(a=theirs, b=theirs, c=theirs, d=theirs))
    assert one is not None and four is not None and one.value == four.value and four.p is None
    assert (four.high - four.low) == pytest.approx((one.high - one.low) / 2, rel=0.06)


def test_other_items_are_not_compared(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="same data"):
        scores(a=[1.0, 0.0]).difference(scores(a=[1.0]), "a", "acc")
    with pytest.raises(InputError, match="only one of the two"):
        scores(a=[1.0], b=[1.0]).mean_difference(scores(a=[1.0]))
    (tmp_path / "piqa").mkdir()
    lines = (data / "piqa" / "valid.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "piqa" / "valid.jsonl").write_text("".join(reversed(lines)))
    loaded = sordino.load(model)
    ours, theirs = (open_tasks(["piqa"], folder).run(*loaded) for folder in (data, tmp_path))
    with pytest.raises(InputError, match="not the same items"):
        ours.difference(theirs, "piqa", "acc")


def test_command_line(model: Path, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    words = ["eval", str(checkpoint), "--tasks", "piqa, winogrande", "--task-data", str(data), "--limit", "6"]
    result = CliRunner().invoke(app, [*words, "--against", str(model), "--json", str(file)], catch_exceptions=False)
    assert result.exit_code == 0 and "piqa: acc_norm" in result.output and "to the reference" in result.output
    figures = json.loads(file.read_text())
    assert set(figures["tasks"]) == {"piqa", "winogrande"} and figures["tasks"]["piqa"]["samples"] == 6
    assert figures["tasks"]["piqa"]["acc_stderr"] > 0 or figures["tasks"]["piqa"]["acc"] in (0, 1)


def test_one_reference_serves_a_comparison(model: Path, checkpoint: Path, data: Path) -> None:
    tasks = open_tasks(["piqa"], data, 6)
    table = compare([str(model), checkpoint], tasks=tasks, against=str(model))
    same, other = (row for _, row in table.rows)
    assert same.tasks == same.tasks_against or same.tasks.tasks == same.tasks_against.tasks  # type: ignore[union-attr]
    alone = sordino.evaluate(checkpoint, tasks=tasks, against=str(model))
    assert alone.to_json()["tasks"] == other.to_json()["tasks"]
    assert "piqa acc_norm" in table.header and "PPL" not in table.header


def test_a_model_is_not_given_the_scores_that_its_reference_has_on_other_items(model: Path, data: Path) -> None:
    more, fewer = open_tasks(["piqa"], data, 6), open_tasks(["piqa"], data, 4)
    exact = reference(model, text=None, tasks=more)
    found = {n: sordino.evaluate(model, tasks=t, against=exact).tasks for n, t in ((6, more), (4, fewer))}
    assert found[6] is exact.tasks
    assert found[4] is not None and found[4].tasks["piqa"].samples == 4


@pytest.mark.parametrize(
    ("names", "word"), [("piqqa", "did you mean 'piqa'"), ("", "no task is named"), (",", "no task is named")]
)
def test_names(data: Path, names: str, word: str) -> None:
    with pytest.raises(InputError, match=word):
        open_tasks([n for n in names.split(",") if n], data)


def test_unknown_subject_and_missing_folder(tmp_path: Path) -> None:
    row = {"subject": "alchemy", "question": "what", "choices": ["a", "b", "c", "d"], "answer": 0}
    (tmp_path / "mmlu").mkdir()
    (tmp_path / "mmlu" / "test.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match="no subject 'alchemy'"):
        open_tasks(["mmlu"], tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        open_tasks(["mmlu"], tmp_path / "none")


def test_without_the_harness_the_extra_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sordino.measure.harness", raising=False)
    monkeypatch.delattr("sordino.measure.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"\[eval\]"):
        open_tasks(["piqa"], data)


def test_hub_names_offline() -> None:
    """Unknown names are told from data that cannot be had."""
    with pytest.raises(InputError, match=r"data of task 'piqa' cannot be had from the hub .* --task-data"):
        open_tasks(["piqa"])
    with pytest.raises(InputError, match="data of task 'lambada_openai'"):  # there, "lambada" is two tasks
        open_tasks(["lambada"])
    with pytest.raises(InputError, match="did you mean 'hellaswag'"):
        open_tasks(["hellaswagg"])
