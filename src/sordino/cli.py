"""The command line: parse, call, print. Nothing is computed here.

Results go to stdout, progress and errors to stderr. Exit codes: 0 success, 1 a failure, 2 bad input.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sordino.errors import InputError, SordinoError
from sordino.heap import keep_freed_memory
from sordino.progress import Bars, quiet_libraries
from sordino.version import __version__

app = typer.Typer(
    name="sordino",
    help="Quantize large language models to few bits, and measure what is left of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_out = Console()

Model = Annotated[str, typer.Argument(help="Hugging Face directory or hub name, .gguf file, or 'smollm2'.")]
RecipeName = Annotated[str, typer.Option("-r", "--recipe", help="Preset name (see 'sordino recipes') or TOML file.")]
TextSpec = Annotated[str, typer.Option("--text", help="Text or jsonl file, builtin:pydoc, builtin:docstrings or hub:NAME.")]
EvalText = Annotated[
    str | None,
    typer.Option("--text", help="As in quantize; builtin:docstrings if not given, or no text at all if there are --tasks."),
]
SystemPrompt = Annotated[
    str | None, typer.Option(metavar="TEXT|@FILE", help="Protect this system prompt: its keys and values stay exact.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one value of the recipe, e.g. format.weights.bits=3. Repeatable."),
]
WindowsOption = Annotated[int | None, typer.Option(min=1, help="How many windows of text.")]
TasksOption = Annotated[
    str | None,
    typer.Option("--tasks", help="Zero-shot tasks of lm-evaluation-harness, e.g. piqa,arc_easy (needs the extra 'eval')."),
]
TaskData = Annotated[Path | None, typer.Option("--task-data", help="Folder of local task files; without it, from the hub.")]
Limit = Annotated[int | None, typer.Option(min=1, help="How many items of each task.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]


def _version(value: bool) -> None:
    if value:
        print(f"sordino {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    quiet_libraries()


@app.command()
def quantize(
    model: Model,
    recipe: RecipeName,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the checkpoint.")],
    text: TextSpec = "builtin:pydoc",
    windows: WindowsOption = None,
    seqlen: Annotated[int | None, typer.Option(min=2, help="Tokens of a calibration window.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the windows; same seed, same bytes.")] = 0,
    set_: SetOption = None,
    blocks: Annotated[str | None, typer.Option(help="A:B quantizes these blocks only; the rest stays as it is.")] = None,
    system_prompt: SystemPrompt = None,
    samples: Annotated[bool, typer.Option(help="Let both models speak in the report, if the model is small.")] = True,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of continuing an interrupted run.")] = False,
) -> None:
    """Quantize MODEL by a recipe into a folder that transformers loads.

    An interrupted run continues where it stopped when the same command is given again.

    Example: sordino quantize smollm2 -r gptq-w4 -o out --text wiki.valid.raw
    """
    from sordino.api import quantize as run

    with Bars() as bars:
        result = run(
            model, recipe, out, text=text, windows=windows, seqlen=seqlen, seed=seed,
            overrides=tuple(set_ or ()), blocks=_blocks(blocks), fresh=fresh, system_prompt=system_prompt,
            samples=samples, progress=bars,
        )  # fmt: skip
    _print_result(result)


@app.command("eval")
def evaluate(
    model: Model,
    text: EvalText = None,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 2048,
    windows: WindowsOption = None,
    against: Annotated[str | None, typer.Option(help="Reference model for KL and agreement.")] = None,
    prefix_from: Annotated[
        str | None, typer.Option(help="Checkpoint whose prefix stands before every window of MODEL too.")
    ] = None,
    tasks: TasksOption = None,
    task_data: TaskData = None,
    limit: Limit = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Compute dtype: bfloat16, float32; auto: the model's own, but float32 on CPUs without products of bf16."
        ),
    ] = "auto",
    json_: JsonFile = None,
) -> None:
    """Measure perplexity and zero-shot tasks (and the distance from a reference) of a checkpoint or model.

    Example: sordino eval out --text wiki.test.raw --windows 32 --against smollm2

    Example: sordino eval out --tasks piqa,arc_easy --task-data zeroshot --limit 200 --against smollm2
    """
    from sordino.measure.evaluate import evaluate as run

    _check_writable(json_)
    with Bars() as bars:
        options = {"against": against, "prefix_from": prefix_from, "dtype": _dtype(dtype)}
        options |= {"tasks": _tasks(tasks, task_data, limit), "text": text, "seqlen": seqlen, "windows": windows}
        result = run(model, progress=bars, **options)
    if json_:
        _write_json(json_, result.to_json())
    on = f" on {text or 'builtin:docstrings'}, {result.windows} windows of {result.seqlen}" if result.windows else ""
    _print_lines(f"{model}{on}", result.lines())


@app.command()
def compare(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoints or models.")],
    text: EvalText = None,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 2048,
    windows: WindowsOption = None,
    against: Annotated[str | None, typer.Option(help="Reference model for KL, agreement and paired differences.")] = None,
    prefix_from: Annotated[
        str | None, typer.Option(help="Checkpoint whose prefix stands before the full-precision models among them too.")
    ] = None,
    tasks: TasksOption = None,
    task_data: TaskData = None,
    limit: Limit = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure speed too, all models in turns.")] = False,
    json_: JsonFile = None,
    csv: Annotated[Path | None, typer.Option(help="Also write a CSV file.")] = None,
    md: Annotated[Path | None, typer.Option(help="Also write a Markdown table.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with plots of quality over size and speed.")] = None,
) -> None:
    """Measure several checkpoints on the same text and tasks and set them side by side.

    Example: sordino compare out-w4 out-w3 --against smollm2 --text wiki.test.raw --windows 8
    """
    from sordino.measure.compare import compare as run
    from sordino.report.compare import comparison_page

    _check_writable(json_, csv, md, html)
    with Bars() as bars:
        options: dict[str, Any] = {"against": against, "prefix_from": prefix_from, "text": text}
        options |= {"tasks": _tasks(tasks, task_data, limit), "speed": speed}
        comparison = run(checkpoints, seqlen=seqlen, windows=windows, progress=bars, **options)
    for path, content in ((csv, comparison.to_csv()), (md, comparison.to_markdown())):
        if path:
            _write(path, content)
    if json_:
        _write_json(json_, comparison.to_json())
    if html:
        _write(html, comparison_page(comparison))
    _print_comparison(comparison)


@app.command()
def generate(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint or model.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens at most.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
) -> None:
    """Continue a prompt greedily.

    Example: sordino generate out --prompt "The capital of France is" --max-new-tokens 20
    """
    from sordino.runtime.generate import generate as run

    print(run(checkpoint, prompt, max_new_tokens, chat=chat))


@app.command()
def doctor(
    model: Model,
    recipe: RecipeName,
    for_: Annotated[str, typer.Option("--for", help="Engines to check the format against: vllm,gguf.")] = "",
    set_: SetOption = None,
    system_prompt: SystemPrompt = None,
) -> None:
    """Say in seconds whether a run will fit and divide, and what it will make; no work is done.

    Example: sordino doctor smollm2 -r gptq-w3 --for vllm,gguf
    """
    from sordino.walk.doctor import examine

    engines = tuple(e for e in for_.split(",") if e)
    findings = examine(model, recipe, tuple(set_ or ()), engines, system_prompt)
    _print_table(("check", "finding"), findings, f"{model} with {recipe}")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Model in full precision, or a checkpoint with --against.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Page to write.")],
    text: TextSpec = "builtin:pydoc",
    windows: Annotated[int, typer.Option(min=1, help="How many windows of text.")] = 4,
    seqlen: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = 512,
    against: Annotated[str | None, typer.Option(help="Full-precision model that MODEL, a checkpoint, was made from.")] = None,
    json_: JsonFile = None,
) -> None:
    """Look at a model before quantizing it: outliers, sensitivity, how errors travel, which recipes suit.

    Example: sordino inspect smollm2 -o look.html --text wiki.valid.raw

    Example: sordino inspect out --against smollm2 -o errors.html
    """
    from sordino.measure.inspect import inspect as run
    from sordino.report.inspect import inspect_page

    _check_writable(out, json_)
    with Bars() as bars:
        found = run(model, against=against, text=text, windows=windows, seqlen=seqlen, progress=bars)
    _write(out, inspect_page(found))
    if json_:
        _write_json(json_, found.to_json())
    _print_table(("recipe", "why"), [(row.recipe or "–", row.reason) for row in found.advice])


@app.command()
def bench(
    models: Annotated[list[str] | None, typer.Argument(help="Checkpoints or models.")] = None,
    shapes: Annotated[
        list[str] | None, typer.Option("--shape", help="Also random checkpoints of this shape, e.g. llama-3.2-1b.")
    ] = None,
    recipes: Annotated[
        list[str] | None, typer.Option("-r", "--recipe", help="As what --shape is stored; rtn-w4 if not given.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after it.")] = 32,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of every model; all cores if not given.")] = None,
    json_: JsonFile = None,
) -> None:
    """Measure speed and memory of checkpoints beside full precision of the same shape, all in one run.

    Examples: sordino bench out-w4 out-w3 --prompt-tokens 512 --new-tokens 64 --threads 2

    sordino bench --shape llama-3.2-1b -r rtn-w4 -r prefixquant-w4a8kv4-static
    """
    from sordino.measure.bench import bench as run

    _check_writable(json_)
    if recipes and not shapes:
        raise InputError("-r belongs to --shape; a model is quantized first, and its checkpoint named")
    with Bars() as bars:
        result = run(
            models or [],
            shapes=shapes or [],
            recipes=recipes or ["rtn-w4"],
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            threads=threads,
            progress=bars,
        )
    if json_:
        _write_json(json_, result.to_json())
    _print_table(result.header, result.cells())
    _print_table(result.where_header, result.where_cells())
    if result.ceilings is not None:
        best = result.ceilings.to_json()
        print(
            f"this machine, {result.threads} threads: reads {best['read_gb_per_s']:.1f} GB/s, torch multiplies "
            f"{best['int8_gop_per_s']:.0f} GOP/s in int8, {best['bf16_gop_per_s']:.0f} in bf16"
        )


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Print this one as TOML.")] = None) -> None:
    """List the presets, or print one as TOML to start your own from."""
    from sordino.recipe import load_recipe, presets

    if name:
        print(load_recipe(name).to_toml(), end="")
        return
    _print_table(("recipe", "what it does"), [(preset, load_recipe(preset).summary) for preset in presets()])


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the checkpoint and figures.")] = Path("demo"),
    model: Annotated[str, typer.Option(help="Model to use.")] = "smollm2",
) -> None:
    """The main job end to end on a small real model: quantize, measure against full precision, generate."""
    from sordino.demo import run_demo

    run_demo(model, out, _out, _print_result, _print_comparison)


def main() -> None:
    """Entry point: turns Sordino's errors into one line and an exit code."""
    keep_freed_memory()
    try:
        app()
    except SordinoError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        os._exit(1)  # the reader of our output is gone; there is nobody to tell


def _fail(message: str, code: int) -> None:
    print(f"sordino: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _blocks(spec: str | None) -> tuple[int, int] | None:
    if spec is None:
        return None
    first, colon, last = spec.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise InputError(f"--blocks {spec}: write A:B, e.g. 0:2")
    return int(first), int(last)


def _dtype(word: str) -> Any:
    import torch

    kinds = {"auto": "auto", "bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
    if word not in kinds:
        raise InputError(f"--dtype {word}: one of {', '.join(kinds)}")
    return kinds[word]


def _tasks(names: str | None, data: Path | None, limit: int | None) -> Any:
    """The tasks asked for with their data read; nothing if there are none."""
    from sordino.measure.tasks import open_tasks

    if names is None:
        if data is not None or limit is not None:
            raise InputError("--task-data and --limit belong to --tasks; name some, e.g. --tasks piqa,arc_easy")
        return ()
    return open_tasks(names, data, limit)


def _check_writable(*paths: Path | None) -> None:
    """Find out before minutes of measuring, not after."""
    for path in paths:
        if path is not None and (path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK)):
            raise InputError(f"cannot write {path}: it is a folder, or its folder is missing or read-only")


def _write(path: Path, content: str) -> None:
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def _write_json(path: Path, data: Any) -> None:
    _write(path, json.dumps(_strict(data), indent=1, allow_nan=False) + "\n")


def _strict(data: Any) -> Any:
    """With null for what JSON has no word for: NaN and infinity."""
    if isinstance(data, dict):
        return {k: _strict(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_strict(v) for v in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _print_comparison(comparison: Any) -> None:
    for header, rows in comparison.tables():
        _print_table(header, rows)
    for note in comparison.notes():
        _out.print(escape(note))


def _print_table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """A table of plain text: brackets in a name are no markup."""
    table = Table(title=None if title is None else escape(title))
    for name in header:
        table.add_column(escape(name), overflow="fold")  # a name cut off with dots tells nothing
    for row in rows:
        table.add_row(*map(escape, row))
    _out.print(table)


def _print_result(result: Any) -> None:
    _print_lines(f"{result.manifest['recipe']} → {result.out}", result.lines())


def _print_lines(title: str, lines: list[tuple[str, str]]) -> None:
    _print_table(("figure", "value"), lines, title)
