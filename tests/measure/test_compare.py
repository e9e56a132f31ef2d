"""Models side by side, with a prefix before those that have none."""

from __future__ import annotations

import heapq
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import sordino
from sordino.cli import app
from sordino.errors import InputError
from sordino.measure import evaluate
from sordino.measure.compare import MEAN, Trade, compare
from sordino.measure.evaluate import final_states, reference
from tiny import make_tiny


@pytest.mark.parametrize(
    ("cost", "figure", "kept"),
    [
        ("MiB", "perplexity", [(1, 9), (2, 5), (4, 4)]),
        ("MiB", MEAN, [(1, 9)]),
        ("decode tokens/s", "perplexity", [(4, 4)]),
        ("decode tokens/s", MEAN, [(4, 7), (2, 8), (1, 9)]),
    ],
)
def test_frontier_is_what_no_other_point_beats(cost: str, figure: str, kept: list[tuple[float, float]]) -> None:
    points = [(2, 8, "a"), (1, 9, "b"), (2, 5, "c"), (4, 4, "d"), (4, 7, "e"), (3, 6, "f"), (1, 9, "again")]
    assert Trade(cost, figure, tuple(points)).frontier == kept
    signs = (1 if cost == "MiB" else -1), (-1 if figure == MEAN else 1)
    goods = [(signs[0] * x, signs[1] * y) for x, y, _ in points]
    best = {p for p in goods if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in goods)}
    assert {(signs[0] * x, signs[1] * y) for x, y in kept} == best


def test_speed_is_measured_where_asked_for(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    sordino.quantize(str(model), "rtn-w4", tmp_path / "out")
    page, figures = tmp_path / "page.html", tmp_path / "figures.json"
    words = ["compare", str(model), str(tmp_path / "out"), "--speed", "--text", heapq.__file__, "--seqlen", "32"]
    done = CliRunner().invoke(
        app, [*words, "--windows", "2", "--html", str(page), "--json", str(figures)], catch_exceptions=False
    )
    assert done.exit_code == 0 and "decode" in done.output
    rows = json.loads(figures.read_text())
    assert all(r["decode_tokens_per_s"] > 0 and r["ratio_to_bf16"]["prefill"] > 0 and r["ppl"] > 1 for r in rows)
    assert "Speed and perplexity" in page.read_text() and "Size and perplexity" in page.read_text()


def test_full_precision_with_the_prefix_is_compared(tmp_path: Path) -> None:
    model, out = make_tiny(tmp_path / "model", layers=2), tmp_path / "out"
    text = {"text": heapq.__file__}  # a short one
    made = sordino.quantize(str(model), "rtn-w4", out, system_prompt="Be kind.", windows=8, seqlen=48, **text).manifest
    options: dict[str, Any] = {"seqlen": 32, "windows": 2} | text
    rows = dict(compare([out, model], prefix_from=out, **options).rows)
    assert list(rows) == [str(out), f"{model} + prefix"]
    assert rows[f"{model} + prefix"].ppl == sordino.evaluate(model, prefix_from=out, **options).ppl
    assert rows[str(out)].ppl == sordino.evaluate(out, **options).ppl
    assert list(dict(compare([model], **options).rows)) == [str(model)]
    with pytest.raises(InputError, match="has no prefix"):
        compare([model], prefix_from=model, **options)
    refused = CliRunner().invoke(app, ["compare", str(out), "--prefix-from", str(out)]).exception
    assert isinstance(refused, InputError) and "none among these" in str(refused)
    # Prefix and window together may take the model's 512 positions and no more.
    taken = len(made["prefix"]["ids"])
    for subject, prefix in ((out, None), (model, out)):
        assert sordino.evaluate(subject, prefix_from=prefix, seqlen=512 - taken, windows=1, **text).ppl is not None
        with pytest.raises(InputError, match=f"of which its prefix takes {taken}"):
            sordino.evaluate(subject, prefix_from=prefix, seqlen=513 - taken, windows=1, **text)


def test_a_model_that_is_the_reference_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(make_tiny(tmp_path / "model", layers=1))
    alone, runs = sordino.evaluate(model, seqlen=32, windows=2), []

    def counted(*args: Any) -> Any:
        runs.append(args)
        return final_states(*args)

    monkeypatch.setattr(evaluate, "final_states", counted)
    _, figures = compare([model], seqlen=32, windows=2, against=model).rows[0]
    assert len(runs) == 2
    assert figures.ppl == alone.ppl and figures.kl == 0 and figures.top1_agreement == 1
    sordino.evaluate(model, seqlen=32, windows=2, against=reference(model, seqlen=32, windows=2), dtype=torch.bfloat16)
    assert len(runs) == 6  # another dtype is another model
