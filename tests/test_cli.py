"""The public command line on a tiny model: tables, JSON, exit codes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from sordino.recipe import presets
from tiny import make_tiny, run

KEYS = {"ppl", "kl", "top1_agreement", "bits_per_weight", "bits_per_parameter", "bytes", "tasks", "seconds"}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("cli")
    model, out = str(make_tiny(folder / "model", layers=2)), str(folder / "out")
    result = run("quantize", model, "-r", "gptq-w4", "-o", out, "--windows", "32", "--seqlen", "64", "--seed", "3")
    assert "14 of 14 block linears quantized" in " ".join(result.replace("│", " ").split())
    return model, out


def test_eval_writes_the_fixed_json(quantized: tuple[str, str], tmp_path: Path) -> None:
    model, out = quantized
    file = tmp_path / "figures.json"
    shown = run("eval", out, "--seqlen", "64", "--windows", "3", "--against", model, "--json", str(file))
    figures = json.loads(file.read_text())
    assert set(figures) >= KEYS and figures["tasks"] is None and figures["kl_stderr"] > 0
    assert f"{figures['ppl']:.4f}" in shown
    run("eval", model, "--seqlen", "64", "--windows", "3", "--json", str(file))
    plain = json.loads(file.read_text())
    assert plain["kl"] is None and plain["bits_per_weight"] == 32.0


def test_compare_writes_every_table(quantized: tuple[str, str], tmp_path: Path) -> None:
    model, out = quantized
    files = {kind: tmp_path / f"table.{kind}" for kind in ("json", "csv", "md")}
    options = [word for kind, file in files.items() for word in (f"--{kind}", str(file))]
    run("compare", model, out, "--seqlen", "64", "--windows", "2", "--against", model, *options)
    rows = json.loads(files["json"].read_text())
    assert [r["checkpoint"] for r in rows] == [model, out]
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6) and rows[0]["top1_agreement"] == 1.0
    assert float(list(csv.DictReader(files["csv"].open()))[1]["ppl"]) == pytest.approx(rows[1]["ppl"])
    assert files["md"].read_text().count("\n") == 4


def test_recipes_lists_all_and_prints_one(tmp_path: Path) -> None:
    listed = run("recipes")
    assert all(name in listed for name in presets())
    (tmp_path / "mine.toml").write_text(run("recipes", "gptq-w3"))
    from sordino.recipe import load_recipe

    assert load_recipe(tmp_path / "mine.toml").digest == load_recipe("gptq-w3").digest


def test_doctor_tells_what_will_be_made(quantized: tuple[str, str]) -> None:
    model, _ = quantized
    shown = " ".join(run("doctor", model, "-r", "gptq-w3", "--for", "gguf").replace("│", " ").split())
    assert "14 of 14 block linears" in shown and "128 windows of 512" in shown and "gguf" in shown


def test_generate_and_version(quantized: tuple[str, str]) -> None:
    assert run("generate", quantized[1], "--prompt", "once", "--max-new-tokens", "3").startswith("once")
    assert run("--version").startswith("sordino 0.")


def test_brackets_and_bars_in_names_are_text(quantized: tuple[str, str], tmp_path: Path) -> None:
    """A folder may be named like rich's markup, or like the end of a Markdown cell."""
    model, out = quantized
    odd, recipe, md = tmp_path / "out[v2]|[b]", tmp_path / "r[v2].toml", tmp_path / "table.md"
    odd.symlink_to(out)
    recipe.write_text(run("recipes", "rtn-w4").replace('summary = "', 'summary = "[/b] '))
    assert "r[v2].toml" in joined(run("doctor", model, "-r", str(recipe)))
    assert "[v2]|[b]" in joined(run("compare", str(odd), "--seqlen", "64", "--windows", "2", "--md", str(md)))
    assert "[v2]\\|[b]" in md.read_text()
    assert "[v2]|[b]" in joined(run("eval", str(odd), "--seqlen", "64", "--windows", "2"))


def joined(shown: str) -> str:
    """What a table shows, without its borders and line breaks."""
    return "".join(shown.replace("│", "").split())
