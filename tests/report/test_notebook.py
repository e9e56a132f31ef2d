"""How results show themselves in a notebook: tables and figures that are well formed, complete and harmless."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sordino.api import Result
from sordino.errors import InputError
from sordino.measure.bench import Bench
from sordino.measure.compare import Comparison
from sordino.measure.evaluate import Evaluation
from sordino.measure.tasks import TaskScore, TaskScores
from sordino.measure.workers import Speed
from sordino.report.heat import Heat
from sordino.report.notebook import Figure, figure, picture, table
from sordino.report.svg import Series

EVIL = "<script>alert(1)</script>&\"'"
SVG = "{http://www.w3.org/2000/svg}"
TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs", "Cn")))  # what XML can hold


def evaluation(**figures: Any) -> Evaluation:
    sizes = {"bits_per_weight": 3.26, "bits_per_parameter": 5.9, "bytes": 1 << 21, "windows": 2, "seqlen": 32, "seconds": 1.0}
    text = {"ppl": 20.5, "ppl_stderr": 1.5, "kl": 0.25, "kl_stderr": 0.01, "top1_agreement": 0.8, "top1_agreement_stderr": 0.1}
    return Evaluation(**sizes | text | figures)


def result() -> Result:
    manifest = {
        "recipe": EVIL, "coverage": EVIL, "bits_per_weight": 3.26, "bytes": 123456, "finish": {},
        "guard": {"kl": 0.5, "rtn_kl": 1.5}, "prefix": {"tokens": [EVIL], "outlier_ratios": [2.0, 99.0]},
        "blocks": [{"block": i, "error": 0.1 + i, "rtn_error": 0.4 + i} for i in range(3)],
    }  # fmt: skip
    return Result(Path("out"), manifest, {"seconds": 3.0, "cpu_seconds": 2.0, "peak_memory_bytes": 1 << 30})


def comparison() -> Comparison:
    return Comparison(((EVIL, evaluation()), ("second", evaluation(ppl=40.0, bytes=1 << 20))), EVIL)


def bench() -> Bench:
    speed = Speed(EVIL, [1.0, 2.0, 3.0], [0.5, 0.5, 0.5], 1 << 28)
    return Bench([speed], {EVIL: {p: replace(speed, name=f"{p} twin") for p in ("bf16", "fp32")}}, 16, 8, 1)


def cells(html: str) -> list[list[str]]:
    """Rows of a table, header included; fails on markup that is not well formed, and on tags but a table's."""
    root = ET.fromstring(html)
    assert {e.tag for e in root.iter()} <= {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    return [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]


@pytest.mark.parametrize("make", [result, comparison, bench])
def test_results_show_a_table_in_which_names_do_nothing(make: Callable[[], Any]) -> None:
    html = make()._repr_html_()
    assert "<script" not in html
    assert EVIL in [cell for row in cells(html) for cell in row]


@pytest.mark.parametrize("make", [result, comparison, bench])
def test_results_have_a_figure_in_which_names_do_nothing(make: Callable[[], Any]) -> None:
    root = drawn(make().figure())
    shown = [e.text for e in root.iter(f"{SVG}text")]
    assert EVIL in shown or make is result  # what it draws carries no names


def drawn(shown: Figure) -> ET.Element:
    """The document of a figure: well formed, elements and attributes that do nothing, no address but the namespace's."""
    svg = shown._repr_svg_()
    root = ET.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    tags = {"svg", "style", "text", "line", "g", "polyline", "circle", "title", "rect"}
    assert {e.tag.removeprefix(SVG) for e in root.iter()} <= tags
    assert not any(name.startswith("on") or "href" in name for e in root.iter() for name in e.attrib)
    assert "url(" not in svg and svg.count("http") == 1
    return root


def test_tables_hold_the_figures() -> None:
    rows = dict(map(tuple, cells(result()._repr_html_())))  # type: ignore[arg-type]
    assert rows["bytes"] == "123,456" and rows["peak memory"] == "1.00 GiB" and rows["time"] == "3 s wall, 2 s CPU"
    assert rows["KL to full precision, held out"] == "0.5000 (RTN of the same format: 1.5000)"
    assert rows["prefix"].endswith("(largest over median token: 99, in block 1)")
    rows = dict(map(tuple, cells(evaluation()._repr_html_())))  # type: ignore[arg-type]
    assert rows["ppl"] == "20.5000 ± 1.5000" and "tasks" not in rows
    assert cells(comparison()._repr_html_())[0][:4] == ["checkpoint", "bits/weight", "bits/parameter", "MiB"]
    assert cells(bench()._repr_html_())[1][4] == "16 ±0%"  # 8 tokens in half a second


def test_tasks_are_in_the_table_of_an_evaluation() -> None:
    def scores(right: list[float]) -> TaskScores:
        figures = {"acc": sum(right) / len(right), "acc_stderr": 0.25}
        return TaskScores({EVIL: TaskScore(figures, {"acc": tuple(right)}, len(right))}, 1.0)

    shown = evaluation(tasks=scores([1.0, 0.0, 1.0, 1.0]), tasks_against=scores([1.0, 0.0, 0.0, 1.0]))._repr_html_()
    assert "<script" not in shown
    rows = [tuple(row) for row in cells(shown)]
    assert any(name == f"{EVIL}: acc" and value.startswith("0.7500") for name, value in rows)
    assert any("to the reference" in name and value.startswith("+0.2500") for name, value in rows)


def test_figure_of_a_comparison_names_what_was_measured(tmp_path: Path) -> None:
    both = comparison()
    assert list(both.plots()) == ["perplexity", "KL to the reference, nats a token"]
    assert both.plots()["perplexity"].points == ((2.0, 20.5, EVIL), (1.0, 40.0, "second"))
    assert both.figure("KL to the reference, nats a token") != both.figure()
    with pytest.raises(InputError, match="no figure 'speed'; there are perplexity"):
        both.figure("speed")
    both.figure().save(tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text(encoding="utf-8") == both.figure().svg


def test_a_legend_names_several_series_and_all_is_inside() -> None:
    series = [Series(f"{EVIL}{i}", [(0, 1.0 + i, ""), (1, 2.0, "")]) for i in range(3)]
    root = drawn(figure(series, "x", "y", lines=True))
    assert [e.text for e in root.iter(f"{SVG}text")][-3:] == [s.name for s in series]
    height = float(root.attrib["viewBox"].split()[3])
    assert all(float(e.attrib["y"]) < height for e in root.iter(f"{SVG}rect"))
    assert len(list(root.iter(f"{SVG}polyline"))) == 3
    assert "Nothing to draw" in drawn(figure([Series("a", [])], "x", "y", lines=True)).findtext(f"{SVG}text", "")


def test_a_map_is_a_figure_with_its_words_inside() -> None:
    root = drawn(picture(Heat([[1.0, 4.0], [2.0, 3.0]], "x", "y", EVIL)))
    assert len(list(root.iter(f"{SVG}rect"))) == 3  # 1 stays empty
    assert f"{EVIL}; full colour: 4 times the median channel" in [e.text for e in root.iter(f"{SVG}text")]
    height = float(root.attrib["viewBox"].split()[3])
    assert all(float(e.attrib["y"]) < height for tag in ("text", "rect") for e in root.iter(SVG + tag))


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1), TEXT)
def test_any_text_comes_out_as_it_went_in(rows: list[tuple[str, str]], name: str) -> None:
    assert cells(table(rows)) == [list(row) for row in rows]
    points = [(0.0, 1.0, name), (1.0, 2.0, name)]
    root = drawn(figure([Series(name, points)], name, name, lines=False))
    assert [e.text or "" for e in root.iter(f"{SVG}text")].count(name) >= 2  # both axes
    assert [e.text or "" for e in root.iter(f"{SVG}title")] == [name, name]  # both points; beside them long names are cut


def test_table_without_header_or_title() -> None:
    assert cells(table([("a", EVIL)])) == [["a", EVIL]]
    assert "caption" not in table([]) and "thead" not in table([])
    assert f">{'a'}</th>" in table([], ("a",)) and "<caption>t</caption>" in table([], title="t")
