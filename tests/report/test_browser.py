"""The pages in a real browser: silent, alone, readable on phones and screens; nothing that a name holds runs."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page
from transformers import AutoTokenizer

from tiny import STORIES, make_tiny, run

MEASURE = (Path(__file__).parent / "measure.js").read_text(encoding="utf-8")
SHOTS = Path(__file__).parents[2] / "build" / "screenshots"
SIZES = {"phone": (390, 844), "screen": (1280, 900)}
PLOTS = {"quantize": 2, "inspect": 12, "compare": 4}
NAMES = ("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg onload=alert(1)>")
RECIPE = '[format]\nembeddings = 8\n[format.weights]\nbits = 3\nsolver = "gptq"\n[[moves]]\nmove = "tune"\nepochs = 1\n'
WINDOWS = ("--seqlen", "32", "--windows", "2")


def write_pages(folder: Path, model: Path, recipe: Path, text: str, *extra: str) -> dict[str, Path]:
    """A page of each kind, by the command line."""
    out = folder / "out"
    make = ["quantize", str(model), "-r", str(recipe), "-o", str(out), "--text", heapq.__file__]
    make += ["--windows", "8", "--seqlen", "32"]
    pages = {"quantize": out / "report.html", "inspect": folder / "inspect.html", "compare": folder / "compare.html"}
    look = ["inspect", str(model), "-o", str(pages["inspect"]), "--text", text, *WINDOWS]
    both = ["compare", str(model), str(out), "--against", str(model)]
    compare = [*both, "--html", str(pages["compare"]), "--text", text, *WINDOWS, *extra]
    for command in (make, look, compare):
        run(*command)
    return pages


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of a trained model."""
    folder = tmp_path_factory.mktemp("pages")
    recipe = folder / "gptq-w3-tuned.toml"
    recipe.write_text(RECIPE)
    return write_pages(folder, STORIES, recipe, heapq.__file__, "--speed")


@pytest.fixture(scope="module", params=NAMES)
def evil(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Path]]:
    """Of a model whose folder, recipe and tokens are called by something that would run."""
    name = request.param
    folder = tmp_path_factory.mktemp("evil")
    model = make_tiny(folder / name, layers=2, vocab_size=301)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([name])
    tokenizer.save_pretrained(model)
    recipe = folder / f"{name.replace('/', '')}.toml"
    recipe.write_text(f'summary = "{name}"\n{RECIPE}')
    text = folder / "text.txt"
    text.write_text(f"{name} a" * 200)
    return name, write_pages(folder, model, recipe, str(text))


@dataclass
class Opened:
    """A page and what it did so far."""

    page: Page
    said: list[str] = field(default_factory=list)  # on the console, or as errors
    asked: list[str] = field(default_factory=list)  # requests
    shown: list[str] = field(default_factory=list)  # dialogs


@contextmanager
def opened(browser: Browser, file: Path, **options: Any) -> Iterator[Opened]:
    """Open a page from disk, in a context of its own."""
    context = browser.new_context(**options)
    found = Opened(context.new_page())
    found.page.on("console", lambda m: found.said.append(f"{m.type}: {m.text}"))
    found.page.on("pageerror", lambda e: found.said.append(str(e)))
    found.page.on("request", lambda r: found.asked.append(r.url))
    found.page.on("dialog", lambda d: (found.shown.append(d.message), d.dismiss()))
    found.page.goto(file.as_uri(), wait_until="load")
    yield found
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", PLOTS)
def test_a_page_reads_well(browser: Browser, pages: dict[str, Path], kind: str, size: str, scheme: str) -> None:
    width, height = SIZES[size]
    with opened(browser, pages[kind], color_scheme=scheme, viewport={"width": width, "height": height}) as at:
        page = at.page
        page.screenshot(path=SHOTS / f"{kind}-{size}-{scheme}.png", full_page=True)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        found = page.evaluate(MEASURE)
        page.screenshot(path=SHOTS / f"{kind}-{size}-{scheme}-unfolded.png", full_page=True)
    assert at.said == [] and at.shown == [] and at.asked == [pages[kind].as_uri()]
    assert len(found["plots"]) == PLOTS[kind] and all(w > 300 and h > 90 for w, h in found["plots"])
    assert found["overflow"] <= 0
    if (kind, size) == ("compare", "screen"):  # no column is out of sight
        assert found["scrolled"] == 0
    assert {key: found[key] for key in ("faint", "overlapping", "outside", "small", "cut") if found[key]} == {}
    assert found["hidden"] == 0


@pytest.mark.parametrize("kind", PLOTS)
def test_schemes_differ_and_paper_shows_everything(browser: Browser, pages: dict[str, Path], kind: str) -> None:
    with opened(browser, pages[kind], color_scheme="light") as at:
        light = at.page.evaluate(MEASURE)
        at.page.emulate_media(color_scheme="dark")
        dark = at.page.evaluate(MEASURE)
        assert light["background"] != dark["background"] and light["ink"] != dark["ink"]
        at.page.emulate_media(color_scheme="dark", media="print")
        at.page.set_viewport_size({"width": 720, "height": 1000})  # about A4
        printed = at.page.evaluate(MEASURE)
        at.page.screenshot(path=SHOTS / f"{kind}-print.png", full_page=True)
    assert (printed["background"], printed["ink"]) == (light["background"], light["ink"])  # dark on white
    assert printed["hidden"] == 0 and printed["overflow"] <= 0 and printed["faint"] == []
    assert len(printed["plots"]) == PLOTS[kind] and all(w > 300 and h > 90 for w, h in printed["plots"])
    assert light["hidden"] > 0 or kind == "compare"  # what is folded on a screen


FOREIGN = "script, img, iframe, object, embed, link, a, form, input, svg svg, [onload], [onerror]"


def test_names_that_hold_html_do_nothing(browser: Browser, evil: tuple[str, dict[str, Path]]) -> None:
    name, files = evil
    for kind, file in files.items():
        for bypass in (False, True):  # escaping holds without the page's own policy too
            with opened(browser, file, bypass_csp=bypass) as at:
                at.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
                text, foreign = at.page.inner_text("body"), at.page.locator(FOREIGN).count()
                assert at.page.locator("svg").count() == (2 if kind == "compare" else PLOTS[kind])  # without speed
            assert (at.shown, at.said, at.asked, foreign) == ([], [], [file.as_uri()], 0), (kind, bypass)
            assert text.count(name) >= 1 and at.page.is_closed()
        if kind == "inspect":
            assert repr(name) in text  # the token, in the table of the loudest
        if kind == "quantize":
            assert f'summary = "{name}"' in text


def test_unescaped_it_would_run(browser: Browser, evil: tuple[str, dict[str, Path]], tmp_path: Path) -> None:
    """The tests above can fail: the same page without escaping opens dialogs, if only where the policy is not heeded."""
    _, files = evil
    bare = tmp_path / "bare.html"
    bare.write_text(files["quantize"].read_text(encoding="utf-8").replace("&lt;", "<").replace("&gt;", ">"), encoding="utf-8")
    with opened(browser, bare, bypass_csp=True) as at:
        at.page.wait_for_timeout(200)
    assert "1" in at.shown
    with opened(browser, bare) as at:
        at.page.wait_for_timeout(200)
    assert at.shown == [] and at.said
