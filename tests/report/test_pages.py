"""The pages: whole in one file, nothing from a network, nothing that a model's name can do, all sections there."""

from __future__ import annotations

import heapq
import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import median

import pytest
import torch
from markupsafe import escape
from typer.testing import CliRunner

import sordino
from sordino.api import Result
from sordino.cli import app
from sordino.corpus import DEFAULT_TEXT, calibration_windows, load_text, tokenize
from sordino.measure.activations import OutlierToken
from sordino.measure.advice import Advice
from sordino.measure.compare import compare
from sordino.measure.inspect import inspect
from sordino.measure.size import stored_split
from sordino.recipe import load_recipe
from sordino.report import samples as module
from sordino.report.compare import comparison_page
from sordino.report.heat import Heat
from sordino.report.inspect import inspect_page
from sordino.report.quantize import quantize_page
from sordino.report.samples import LARGEST, Sample, samples
from sordino.report.svg import Series, plot
from tiny import make_tiny

EVIL = "<script>alert(1)</script>"
VOID = {"meta"}
PROSE = {"h1", "h2", "p", "section", "div", "span", "ul", "li", "pre", "code", "details", "summary", "footer", "h3"}
TABLE = {"table", "thead", "tbody", "tr", "th", "td"}
TAGS = {"html", "head", "meta", "title", "style", "body", "main"} | PROSE | TABLE
TAGS |= {"svg", "text", "line", "g", "polyline", "circle", "rect"}


class Page(HTMLParser):
    """Elements, their ids, attributes and text; refuses tags that are not closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def ids(self) -> set[str]:
        return {v for k, v in self.attributes if k == "id"}


def harmless(html: str) -> Page:
    """No script, no handler, no link or request; known elements only; both colour schemes, phones and paper thought of."""
    page = Page(html)
    assert set(page.tags) <= TAGS
    names = {k for k, _ in page.attributes}
    assert not names & {"src", "href", "srcset", "action", "xlink:href", "style-src"} and not any(
        n.startswith("on") for n in names
    )
    for word in ("http://", "https://", "url(", "@import", "javascript:"):
        assert word not in html
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert "prefers-color-scheme: dark" in html and "@media print" in html and 'name="viewport"' in html
    return page


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A model in a folder, and a recipe with a summary, that hold HTML."""
    folder = tmp_path_factory.mktemp("report")
    model = make_tiny(folder / EVIL, layers=3)
    recipe = folder / "a<b>&c.toml"
    recipe.write_text(
        f'summary = "{EVIL}"\n[format.weights]\nbits = 3\nsolver = "gptq"\nignore = ["*.0.mlp.down_proj"]\n'
        '[[moves]]\nmove = "tune"\nepochs = 1\n'
    )
    return model, sordino.quantize(str(model), recipe, folder / "out", windows=8, seqlen=32)


def test_every_run_leaves_a_page(run: tuple[Path, Result]) -> None:
    _model, result = run
    html = (result.out / "report.html").read_text(encoding="utf-8")
    page = harmless(html)
    assert page.ids == {"headline", "warnings", "bits", "blocks", "linears", "moves", "run", "recipe", "manifest"}
    assert page.tags.count("svg") == 2 and page.tags.count("polyline") == 2 + 7
    assert EVIL not in html and page.text.count(EVIL) >= 3  # in title, headline and recipe, as text
    shown = " ".join(page.text.split())
    assert f"{result.manifest['guard']['kl']:.4f}" in shown and result.manifest["coverage"] in shown
    assert "stayed in full precision: model.layers.0.mlp.down_proj" in shown and "0.mlp.down_proj" in shown
    assert "report.html" not in result.manifest["files"]  # it holds times, the manifest lists what never changes


def test_shares_are_all_of_the_checkpoint(run: tuple[Path, Result]) -> None:
    _, result = run
    split = stored_split(result.out)
    size = (result.out / "model.safetensors").stat().st_size
    assert size - 20_000 < sum(split.values()) < size
    assert {"codes of weights", "scales", "zero points", "norms", "embeddings and head", "weights in full precision"} == set(
        split
    )
    assert list(split.values()) == sorted(split.values(), reverse=True)


def test_what_went_wrong_is_told_in_words(run: tuple[Path, Result]) -> None:
    model, result = run
    blocks = [dict(b) for b in result.manifest["blocks"]]
    blocks[1] |= {"fallback": "rtn"}
    blocks[2] = {"block": 2, "left": "full precision"}
    blocks[0] |= {"moves": {"tune": {"kept": False, "before": 1.0, "after": 2.0}}}
    extra = {"guard": {"kl": 2.0, "rtn_kl": 1.0, "failed": True}, "blocks": blocks}
    extra |= {"finish": {"distill": {"kept": False, "kl_before": 0.1, "kl_after": float("nan")}}}
    extra |= {"prefix": {"ids": [0], "tokens": [EVIL], "outlier_ratios": [99.0]}}
    page = harmless(quantize_page(result.out, str(model), result.manifest | extra, result.run))
    shown = " ".join(page.text.split())
    for words in (
        "worse than plain rounding",
        "better in block 1 and was taken",
        "'tune' made block 0 no better",
        "'distill' made the whole model no better",
        "Not quantized: block 2",
    ):
        assert words in shown
    plain = harmless(quantize_page(result.out, str(model), result.manifest | {"guard": {}, "blocks": []}, result.run))
    assert "not compared with full precision" in " ".join(plain.text.split())


def test_fresh_removes_the_page(run: tuple[Path, Result], tmp_path: Path) -> None:
    model, _ = run
    sordino.quantize(str(model), "rtn-w4", tmp_path / "out")
    first = (tmp_path / "out" / "report.html").read_bytes()
    sordino.quantize(str(model), "rtn-w4", tmp_path / "out", overrides=("format.weights.bits=3",), fresh=True)
    assert first != (tmp_path / "out" / "report.html").read_bytes()
    assert not list((tmp_path / "out").glob(".*"))


def test_comparison_page(run: tuple[Path, Result], tmp_path: Path) -> None:
    model, result = run
    files = {kind: tmp_path / f"table.{kind}" for kind in ("html", "csv", "json")}
    words = [w for kind, file in files.items() for w in (f"--{kind}", str(file))]
    text = ["--text", heapq.__file__, "--seqlen", "32", "--windows", "2", "--against", str(model)]
    done = CliRunner().invoke(app, ["compare", str(model), str(result.out), *text, *words], catch_exceptions=False)
    assert done.exit_code == 0
    html = files["html"].read_text(encoding="utf-8")
    page = harmless(html)
    assert EVIL not in html and str(model) in page.text and page.tags.count("svg") == 2 and page.tags.count("circle") == 4
    rows = json.loads(files["json"].read_text())
    assert f"{rows[1]['ppl']:.3f}" in page.text


def test_figures_that_are_not_finite_are_left_out(run: tuple[Path, Result]) -> None:
    model, _ = run
    table = compare([str(model)], text=heapq.__file__, seqlen=32, windows=2)
    name, figures = table.rows[0]
    page = harmless(comparison_page(replace(table, rows=((name, figures), ("broken", replace(figures, ppl=float("inf")))))))
    assert page.tags.count("circle") == 1 and "broken" in page.text


def test_plot_places_points_in_order_and_inside() -> None:
    drawn = Page(str(plot([Series("a", [(1, 1.0, "low"), (2, 10.0, "mid"), (3, 100.0, "high")])], "x", EVIL, lines=True)))
    at = [(float(v)) for k, v in drawn.attributes if k == "cy"]
    assert at == sorted(at, reverse=True) and at[0] - at[1] == pytest.approx(at[1] - at[2], abs=0.2)  # logarithmic
    assert all(0 < float(v) < 640 for k, v in drawn.attributes if k == "cx")
    assert "Nothing to draw" in plot([Series("a", [(1, float("nan"), "")])], "x", "y", lines=True)
    assert plot([Series("a", [(1, 5.0, "one")])], "x", "y", lines=False).count("<circle") == 1


def test_inspection_page(run: tuple[Path, Result], tmp_path: Path) -> None:
    model, result = run
    words = ["--text", heapq.__file__, "--seqlen", "24", "--windows", "2"]
    out, figures = tmp_path / "look.html", tmp_path / "look.json"
    done = CliRunner().invoke(
        app, ["inspect", str(model), "-o", str(out), *words, "--json", str(figures)], catch_exceptions=False
    )
    assert done.exit_code == 0
    html = out.read_text(encoding="utf-8")
    page = harmless(html)
    sections = {"headline", "advice", "tokens", "lower", "channels", "ranges", "sensitivity", "depth", "across"}
    assert page.ids == sections and EVIL not in html and EVIL in page.text
    assert page.tags.count("svg") == 12 and page.tags.count("rect") > 20
    found = json.loads(figures.read_text())
    assert all(row["reason"] in " ".join(page.text.split()) for row in found["advice"])
    assert len(found["vertical"]["accumulated"]) == 3 and found["checkpoint"] is None
    kinds = ["inspect", str(result.out), "--against", str(model), "-o", str(out), *words]
    assert CliRunner().invoke(app, kinds, catch_exceptions=False).exit_code == 0
    assert "Of the checkpoint" in harmless(out.read_text(encoding="utf-8")).text


def test_tokens_and_reasons_that_hold_html_do_nothing(run: tuple[Path, Result]) -> None:
    found = inspect(run[0], text=heapq.__file__, windows=1, seqlen=24)
    found.plain.loudest[0].token = EVIL
    found.plain.tokens[5] = OutlierToken(5, times=2, ratio=99.0, token=EVIL)
    html = inspect_page(replace(found, advice=[Advice("", EVIL)], prefix_tokens=[EVIL]))
    page = harmless(html)
    assert EVIL not in html and page.text.count(EVIL) >= 5  # model, prefix, reason, both tables of tokens
    assert EVIL not in found._repr_html_() and "&lt;script&gt;" in found._repr_html_()


def test_map_is_empty_where_nothing_stands_out() -> None:
    drawn = Page(escape(Heat([[1.0, 4.0], [float("nan"), 2.0]], "x", "y", EVIL)))
    strengths = [float(v) for k, v in drawn.attributes if k == "fill-opacity"]
    assert strengths == [1.0, 0.5]  # logarithmic
    assert ("aria-label", f"{EVIL}: largest 4") in drawn.attributes


def test_samples_of_both_models_or_why_there_are_none(run: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch) -> None:
    model, result = run
    said = samples(str(model), result.out, result.manifest["full_precision_bytes"])
    assert isinstance(said, list) and len(said) == 2 and all(s.exact and s.ours for s in said)
    page = harmless(quantize_page(result.out, str(model), result.manifest, result.run, [Sample(EVIL, EVIL, EVIL)]))
    assert "samples" in page.ids and page.text.count(EVIL) >= 6
    large = samples(str(model), result.out, LARGEST + 1)
    assert isinstance(large, str) and "2.0 GiB" in large
    monkeypatch.setattr(module, "answer", lambda *_: 1 / 0)
    failed = samples(str(model), result.out, 1)
    assert isinstance(failed, str) and "ZeroDivisionError" in failed
    assert failed in " ".join(harmless(quantize_page(result.out, "m", result.manifest, result.run, failed)).text.split())


def test_what_each_part_took_and_did(run: tuple[Path, Result]) -> None:
    model, result = run
    assert set(result.run["parts"]) == {"tune", "rounding", "guards"} and all(s >= 0 for s in result.run["parts"].values())
    assert sum(result.run["parts"].values()) <= result.run["seconds"]
    notes = [b["moves"]["tune"] for b in result.manifest["blocks"]]
    shown = " ".join(harmless(quantize_page(result.out, str(model), result.manifest, result.run)).text.split())
    assert f"{sum(n['kept'] for n in notes)} of 3 blocks" in shown
    assert f"held-out error {median(n['before'] for n in notes):.4g} → {median(n['after'] for n in notes):.4g}" in shown


def test_headline_figures_are_those_of_the_windows(run: tuple[Path, Result]) -> None:
    """Perplexity, KL and agreement of the final guard, against plain forwards of both models on the same held-out text."""
    model, result = run
    guard = result.manifest["guard"]
    recipe = load_recipe(result.out / "recipe.toml")
    exact, tokenizer = sordino.load(model)
    ids = calibration_windows(tokenize(load_text(DEFAULT_TEXT), tokenizer), 32, recipe.calibration.windows, 4, 0, 0)[8:]
    ours, _ = sordino.load(result.out)
    with torch.no_grad():
        logs = [torch.log_softmax(m(ids).logits.double(), -1) for m in (exact, ours)]
    ppl = [float(-log[:, :-1].gather(-1, ids[:, 1:, None]).mean()) for log in logs]
    assert [guard["fp_ppl"], guard["ppl"]] == pytest.approx([math.exp(x) for x in ppl], rel=1e-3)
    assert guard["kl"] == pytest.approx(float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()), rel=1e-3)
    assert guard["top1_agreement"] == pytest.approx(float((logs[0].argmax(-1) == logs[1].argmax(-1)).double().mean()))
