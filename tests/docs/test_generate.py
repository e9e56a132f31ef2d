"""The made pages of the site: nothing of the command line, the recipe, the moves or the presets is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal

import typer.main
from pydantic import BaseModel, Field

import sordino
from sordino import recipe as recipes
from sordino.cli import app
from sordino.moves import MOVES

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
assert _spec is not None and _spec.loader is not None
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


def test_every_command_and_option_is_told() -> None:
    page = generate.cli_page()
    sections = {part.partition("\n")[0]: part for part in page.split("\n## ")[1:]}
    commands: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert list(sections) == list(commands)
    for name, command in commands.items():
        for parameter in command.params:
            shown = parameter.name.upper() if parameter.param_type_name == "argument" else parameter.opts[-1]
            assert f"`{shown}`" in sections[name] and (parameter.help or "") in sections[name]
    assert (
        "| `-r`, `--recipe` |" in sections["quantize"] and "| `--seqlen` |" in sections["eval"] and "`2048`" in sections["eval"]
    )
    assert "```bash\nsordino quantize smollm2 -r gptq-w4" in sections["quantize"]


def test_every_table_and_key_of_a_recipe_is_told() -> None:
    tables = {t for t in vars(recipes).values() if isinstance(t, type) and issubclass(t, recipes._Table)}
    assert set(generate.TABLES.values()) == tables - {recipes._Table, recipes._Rounded}
    sections = generate.recipe_page().split("\n## ")[1:]
    for part, model in zip(sections, generate.TABLES.values(), strict=False):
        rows = [line.split(" | ") for line in part.splitlines() if line.startswith("| `")]
        assert [row[0] for row in rows] == [f"| `{name}`" for name in model.model_fields]
        assert all(len(row) == 4 and row[3].strip(" |") for row in rows), part  # everyone has words


def test_every_move_and_option_is_told_with_its_meaning() -> None:
    page = generate.recipe_page()
    parts = {part.partition("\n")[0]: part for part in page.partition("## `[[moves]]`")[2].split("\n### ")[1:]}
    assert list(parts) == sorted(MOVES)
    for name, part in parts.items():
        rows = [line.split(" | ") for line in part.splitlines() if line.startswith("| `")]
        assert all(row[3].strip(" |") for row in rows), f"{name}: an option without words in the docstring's Args"
    assert "| `epochs` | whole number > 0 | `2` | passes over the calibration windows. |" in parts["tune"]


def test_values_in_words() -> None:
    class Table(BaseModel):
        x: int

    assert generate.kind(Literal[2, 3]) == "`2`, `3`" and generate.kind(bool) == "`true`, `false`"
    assert generate.kind(Annotated[float, Field(gt=0, le=1)] | None) == "number > 0 and ≤ 1"
    assert generate.kind(Table | None) == "table" and generate.kind(tuple[str, ...]) == "list of texts"
    assert generate.kind(recipes.Solver) == "table" and generate.kind(Literal["a"]) == '`"a"`'


def test_every_preset_is_shown_whole() -> None:
    page = generate.presets_page()
    for name in sordino.presets():
        assert (recipes.PRESET_DIR / f"{name}.toml").read_text(encoding="utf-8").strip() in page
        assert f"| [`{name}`](#{name}) |" in page
    assert "| 4/4/4 | channel | rtn | rotate, rotate-inner, prefix, tune |" in page


def test_api_names_everything_public() -> None:
    assert all(f"::: sordino.{name}\n" in generate.api_page() for name in sordino.__all__ if not name.startswith("_"))


def test_pages_that_the_navigation_does_not_name_find_a_place() -> None:
    nav: list[dict[str, Any]] = [{"Home": "index.md"}, {"Methods": ["methods/a.md"]}, {"More": ["other.md"]}]
    found = ["index.md", "inspect.md", "methods/a.md", "methods/b.md", "other.md"]
    placed = generate.placed(nav, found)
    assert placed[1:] == [{"Methods": ["methods/a.md", "methods/b.md"]}, {"More": ["other.md", "inspect.md"]}]


def test_marks_are_taken_off_fences() -> None:
    assert generate.on_page_markdown("```bash no-run\nx\n```\n```bash check-only\n") == "```bash\nx\n```\n```bash\n"
    assert generate.on_page_markdown("a ```bash no-run` b") == "a ```bash no-run` b"
