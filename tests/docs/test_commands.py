"""Every command in README and docs, run on a tiny model as it stands there.

What differs from a reader's machine is all here: ``smollm2`` is a tiny random model, the texts, tasks and models that pages
name lie in the working folder (tiny too), each command gets the sizes in ``SIZES`` on top of its own options, and tasks
that a reader has from the hub come from the local files.
Commands on one page run in order in one folder, like a reader's.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
import tomllib
import unittest.mock
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main
from typer.testing import CliRunner

from docs_blocks import SHELL, Block, blocks
from sordino.cli import app
from sordino.errors import SordinoError
from sordino.moves import build_moves
from sordino.recipe import load_recipe
from tiny import make_tiny

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES = {str(p.relative_to(ROOT)): p for p in FILES}
SIZES = {
    "quantize": "--windows 8 --seqlen 32",
    "eval": "--windows 2 --seqlen 32",
    "compare": "--windows 2 --seqlen 32",
    "inspect": "--windows 2 --seqlen 32",
    "generate": "--max-new-tokens 4",
    "bench": "--prompt-tokens 4 --new-tokens 2 --threads 1",
}
# Commands that are not run, page by page. `make` is only asked whether it knows the target: CI runs these very targets.
NOT_RUN = {
    "README.md": ["make demo", "make setup"],
    "docs/tutorial.md": ["make setup", "source .venv/bin/activate"],
}

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
USAGE_ERROR: Any = typer.BadParameter.__base__  # what typer's own copy of click raises; it has no public name


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages take for granted: models, texts and tasks by the names they use."""
    folder = tmp_path_factory.mktemp("desk")
    make_tiny(folder / "smollm2", layers=3)
    make_tiny(folder / "Qwen" / "Qwen3-0.6B", "qwen3", layers=2)
    (folder / "wiki.valid.raw").write_text(inspect.getsource(inspect), encoding="utf-8")
    (folder / "wiki.test.raw").write_text(inspect.getsource(unittest.mock), encoding="utf-8")
    tasks = {
        "piqa/valid.jsonl": {"goal": "to cut", "sol1": "use a knife", "sol2": "use the sun", "label": 0},
        "arc_easy/test.jsonl": {"question": "What is hot?", "choices": ["ice", "fire", "rain"], "gold": 1},
        "arc_challenge/test.jsonl": {"question": "What is cold?", "choices": ["ice", "fire", "rain"], "gold": 0},
        "winogrande/dev.jsonl": {"sentence": "The _ sat.", "option1": "cat", "option2": "stone", "answer": "1"},
    }
    for name, row in tasks.items():
        (folder / "zeroshot" / name).parent.mkdir(parents=True)
        (folder / "zeroshot" / name).write_text(3 * (json.dumps(row) + "\n"))
    return folder


@pytest.fixture
def work(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the desk's things in it."""
    for thing in desk.iterdir():
        (tmp_path / thing.name).symlink_to(thing)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [name for name, path in PAGES.items() if any(b.commands for b in blocks(path))])
def test_commands_of_a_page(page: str, work: Path) -> None:
    left_out = []
    for block in blocks(PAGES[page]):
        if block.title:
            (work / block.title).write_text(block.body, encoding="utf-8")
        for words in block.commands:
            if words[0] == "make" or "no-run" in block.marks:
                left_out.append(" ".join(words[:2]))
            elif "check-only" in block.marks:
                check(words)
            else:
                run(words)
        if block.language == "python" and "no-run" not in block.marks:
            exec(compile(block.body.replace('"smollm2"', '"./smollm2"'), page, "exec"), {})
    assert left_out == NOT_RUN.get(page, [])


def run(words: list[str]) -> None:
    """Run a command line of ours; `> file` keeps what it prints."""
    assert words[0].removeprefix(".venv/bin/") == "sordino", f"not a command of ours, mark its block: {' '.join(words)}"
    words, target = (words[:-2], words[-1]) if words[-2:-1] == [">"] else (words, None)
    given = ["./smollm2" if w == "smollm2" else w for w in words[1:]] + SIZES.get(words[1], "").split()
    given += ["--task-data", "zeroshot"] if "--tasks" in words and "--task-data" not in words else []
    try:
        done = CliRunner().invoke(app, given, catch_exceptions=False)
    except SordinoError as error:
        raise AssertionError(f"{' '.join(words)}: {error}") from error
    assert done.exit_code == 0, f"{' '.join(words)}: {done.output}"
    if target:
        Path(target).write_text(done.stdout, encoding="utf-8")


def check(words: list[str]) -> Any:
    """Parse a command line of ours; its recipe with all `--set`, and the moves' options, must be valid."""
    assert words[0] == "sordino", f"not a command of ours: {' '.join(words)}"
    with COMMANDS[words[1]].make_context(words[1], words[2:]) as context:
        given = context.params.get("recipe") or context.params.get("recipes") or ()
        for name in [given] if isinstance(given, str) else given:
            moves = load_recipe(name, context.params.get("set_") or ()).moves
            assert len(build_moves(moves)) == len(moves)
        return context.params


def test_check_finds_what_is_wrong() -> None:
    sound = ["sordino", "quantize", "m", "-r", "w3", "-o", "out"]
    assert check([*sound, "--set", "moves.0.epochs=2"])["out"] == Path("out")
    for wrong in (["--set", "moves.0.epoch=2"], ["--set", "format.weight.bits=2"], ["--window", "3"], ["-r", "w33"]):
        with pytest.raises((SordinoError, USAGE_ERROR)):
            check([*sound, *wrong])


def test_examples_of_the_commands_help_are_valid() -> None:
    helps = "\n".join(inspect.cleandoc(command.help) for command in COMMANDS.values())
    examples = re.findall(r"^(?:Examples?: )?(sordino .+)$", helps, re.MULTILINE)
    assert len(examples) == helps.count("sordino ") >= 8
    for example in examples:
        check(shlex.split(example))


def test_make_knows_every_target_that_is_named() -> None:
    targets = {line.partition(":")[0] for line in (ROOT / "Makefile").read_text().splitlines()}
    named = {w[1] for path in PAGES.values() for b in blocks(path) for w in b.commands if w[0] == "make"}
    assert "demo" in named and named <= targets


def test_no_command_hides_from_the_parser() -> None:
    """None stands in an indented block, where no mark can be; marks are known ones; blocks of commands have some."""
    for name, path in PAGES.items():
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not line.startswith(("    sordino ", "    make ", "    pip ", "    python ")), f"{name}: fence it: {line}"
        for block in blocks(path):
            known = {"no-run", "check-only"} | {m for m in block.marks if m.startswith("title=")}
            assert set(block.marks) <= known, f"{name}: unknown mark {block.marks}"
            assert block.commands or block.language not in SHELL, f"{name}: no command in {block.body}"


@pytest.mark.parametrize("page", [name for name, path in PAGES.items() if any(b.language == "toml" for b in blocks(path))])
def test_recipes_on_a_page_are_valid(page: str, tmp_path: Path) -> None:
    for block in blocks(PAGES[page]):
        if block.language == "toml":
            (tmp_path / "shown.toml").write_text(block.body, encoding="utf-8")
            build_moves(load_recipe(tmp_path / "shown.toml").moves)
            assert tomllib.loads(block.body)


def test_blocks_are_parsed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        '```console\n$ sordino eval a \\\n    --json "b c"  # why\nfigure 1\n```\ntext\n```toml title="x.toml"\na = 1\n```\n'
        "```bash no-run\nmake demo\n\n# nothing\n```\n```\nsordino recipes > y\n```\n```\noutput\n```\n"
    )
    found = blocks(page)
    commands = [["sordino", "eval", "a", "--json", "b c"]], [], [["make", "demo"]], [["sordino", "recipes", ">", "y"]], []
    assert [b.commands for b in found] == list(commands)
    assert found[1] == Block("toml", ('title="x.toml"',), "a = 1\n") and found[1].title == "x.toml"
    assert found[2].marks == ("no-run",)
