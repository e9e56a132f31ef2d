"""The demo: quantize a small real model, measure it against full precision, let both speak."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from sordino.api import load, quantize
from sordino.measure.bench import positions
from sordino.measure.compare import compare
from sordino.progress import Bars
from sordino.runtime.generate import answer

Show = Callable[[Any], None]

_PROMPT = "Why is the sky blue?"


def run_demo(model: str, out: Path, console: Console, show_result: Show, show_comparison: Show) -> None:
    """Run it; figures are printed and written to ``OUT/figures.json``.

    Calibrates on CPython's help topics and evaluates on other text, the docstrings of its standard library.
    """
    console.rule(f"1. quantize {model} with gptq-w4")
    with Bars() as bars:
        result = quantize(model, "gptq-w4", out / "gptq-w4", windows=32, progress=bars)
    show_result(result)
    console.rule("2. measure against full precision")
    with Bars() as bars:
        options: dict[str, Any] = {"seqlen": min(1024, positions(model) or 1024), "windows": 6, "progress": bars}
        figures = compare([model, result.out], text="builtin:docstrings", against=model, **options)
    show_comparison(figures)
    (out / "figures.json").write_text(json.dumps(figures.to_json(), indent=1) + "\n", encoding="utf-8")
    console.rule("3. generate")
    for name in (model, str(result.out)):
        loaded, tokenizer = load(name)
        said = answer(loaded, tokenizer, _PROMPT, 48, chat=bool(getattr(tokenizer, "chat_template", None)))
        console.print(f"[bold]{escape(name)}[/bold]: {_PROMPT}\n  {escape(said.strip())}\n", highlight=False)
