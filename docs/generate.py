"""The pages of the site that nobody writes: made from the code when the site is built (a hook of mkdocs).

`reference/cli.md` comes from the commands' own help, `reference/recipe.md` from the recipe's pydantic models and the moves'
signatures, `reference/presets.md` from `recipes/*.toml`, `reference/api.md` names what mkdocstrings reads docstrings of.
Pages that `mkdocs.yml` does not place are found here, so that a new method is one new file.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import typer.main
from pydantic import BaseModel, TypeAdapter

import sordino
from sordino import recipe as recipes
from sordino.cli import app
from sordino.moves import MOVES
from sordino.recipe import PRESET_DIR, load_recipe, presets

ROOT = Path(__file__).parents[1]
TABLES: dict[str, type[BaseModel]] = {
    "": recipes.Recipe,
    "[format]": recipes.Format,
    "[format.weights]": recipes.WeightFormat,
    "[[format.weights.override]]": recipes.WeightOverride,
    "format.weights.solver, name = \"rtn\"": recipes.Rtn,
    "format.weights.solver, name = \"gptq\"": recipes.Gptq,
    "format.weights.solver, name = \"gptaq\"": recipes.Gptaq,
    "[format.activations]": recipes.ActivationFormat,
    "[format.kv]": recipes.KvFormat,
    "[calibration]": recipes.Calibration,
}  # fmt: skip
# What mkdocstrings shows beside the package's own names.
FURTHER = {
    "Measuring": ("sordino.measure.compare", "sordino.measure.bench", "sordino.measure.tasks", "sordino.measure.inspect"),
    "Generating": ("sordino.runtime.generate", "sordino.measure.prompt"),
    "Text": ("sordino.corpus",),
    "Notebooks": ("sordino.report.notebook",),
    "Extending": ("sordino.contract", "sordino.rounding"),
}
MADE = "<!-- made by docs/generate.py when the site is built -->\n\n"


def pages() -> dict[str, str]:
    """Path in the site -> Markdown of every page that is made."""
    made = {"cli": cli_page(), "api": api_page(), "recipe": recipe_page(), "presets": presets_page()}
    copied = {name.lower() + ".md": (ROOT / f"{name}.md").read_text(encoding="utf-8") for name in ("CHANGELOG", "CONTRIBUTING")}
    return {f"reference/{name}.md": MADE + page for name, page in made.items()} | copied


def cli_page() -> str:
    """Every command: usage, help, arguments and options, as `--help` has them."""
    group: Any = typer.main.get_command(app)
    parts = ["# Command line\n", "What `sordino COMMAND --help` says.\n"]
    for name, command in group.commands.items():
        context = command.make_context(f"sordino {name}", [], resilient_parsing=True)
        pieces = re.sub(r"{(\w+)}", lambda m: m[1].upper(), " ".join(command.collect_usage_pieces(context)))
        parts += [f"## {name}\n", f"    {context.command_path} {pieces}\n", _examples(inspect.cleandoc(command.help or ""))]
        rows = [_option(parameter, context) for parameter in command.params]
        parts.append(_table(("argument or option", "meaning", "default"), rows))
    return "\n".join(parts)


def _option(parameter: Any, context: Any) -> tuple[str, str, str]:
    words = parameter.opts if parameter.param_type_name == "option" else [parameter.name.upper()]
    names = ", ".join(f"`{word}`" for word in words)
    default = "" if callable(parameter.default) else parameter.get_default(context)
    shown = "required" if parameter.required else "" if default in (None, False, "") else f"`{default}`"
    return names, parameter.help or "", shown


def _examples(text: str) -> str:
    """Lines of a help that are examples as blocks of commands."""
    return re.sub(r"^(?:Examples?: )?(sordino .+)$", r"```bash\n\1\n```", text, flags=re.MULTILINE) + "\n"


def recipe_page() -> str:
    """Every table and key of a recipe, then every move and its options."""
    parts = ["# Recipes: every key\n", f"{_prose(_about(recipes))}\n"]
    for title, model in TABLES.items():
        parts += [f"## `{title}`\n" if title else "## The top of the file\n", f"{_prose(_about(model))}\n"]
        hints = get_type_hints(model, include_extras=True)
        rows = [
            (f"`{name}`", kind(hints[name]), "required" if f.is_required() else _value(f.default), f.description or _like(name))
            for name, f in model.model_fields.items()
        ]
        parts.append(_table(("key", "values", "default", "meaning"), rows))
    parts += ["## `[[moves]]`\n", "Each entry has the key `move`, one of the names below, and its options.\n"]
    for name, move in sorted(MOVES.items()):
        parts += [f"### {name}\n", f"{_prose(_about(move).partition('Args:')[0].strip())}\n"]
        parts.append(_table(("option", "values", "default", "meaning"), list(_move_options(move))) or "No options.\n")
    return "\n".join(parts)


def _like(name: str) -> str:
    """What a key without words of its own says: overrides repeat the keys of the weights table."""
    field = recipes.WeightFormat.model_fields.get(name)
    return (field and field.description) or "Of the solver."


def _move_options(move: Any) -> Iterator[tuple[str, str, str, str]]:
    init = move.__init__
    if init is object.__init__:
        return
    hints, told = get_type_hints(init, include_extras=True), _args(_about(move))
    for name, parameter in inspect.signature(init).parameters.items():
        if name != "self":
            default = "required" if parameter.default is parameter.empty else _value(parameter.default)
            yield f"`{name}`", kind(hints[name]), default, told.get(name, "")


def _args(docstring: str) -> dict[str, str]:
    """The entries of a docstring's section "Args:"."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", docstring, re.MULTILINE)
    found = re.findall(r"^    (\w+): ((?:.*\n?)(?:^     +.*\n?)*)", section[1] if section else "", re.MULTILINE)
    return {name: _prose(" ".join(text.split())) for name, text in found}


def kind(annotation: Any) -> str:
    """The values that an annotation allows, in words, by way of its JSON schema."""
    schema = TypeAdapter(annotation).json_schema()
    return _kind(schema)


def _kind(schema: dict[str, Any]) -> str:
    if "$ref" in schema or schema.get("type") == "object" or "oneOf" in schema:
        return "table"
    if "const" in schema:
        return _value(schema["const"])
    if "enum" in schema:
        return ", ".join(map(_value, schema["enum"]))
    if "anyOf" in schema:
        return ", ".join(_kind(s) for s in schema["anyOf"] if s.get("type") != "null")
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}s"
    words = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`", "string": "text"}
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {schema[key]:g}" for key, sign in limits.items() if key in schema]
    return " ".join([words[schema["type"]], " and ".join(found)]).strip()


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, BaseModel):
        return f'`"{value.name}"`' if hasattr(value, "name") else "the table's"
    shown = str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
    return "`[]`" if value == () else f"`{shown}`"


def presets_page() -> str:
    """Every preset: a table of what it stores and does, then its file."""
    rows, files = [], []
    for name in presets():
        recipe = load_recipe(name)
        f, w = recipe.format, recipe.format.weights
        bits = "/".join("–" if b == 16 else str(b) for b in (w.bits, f.activations.bits, f.kv.bits))
        moves = ", ".join(m.move for m in recipe.moves) or "–"
        rows.append((f"[`{name}`](#{name})", bits, str(w.group), w.solver.name, moves, recipe.summary))
        toml = (PRESET_DIR / f"{name}.toml").read_text(encoding="utf-8")
        files.append(f"### {name}\n\n```toml\n{toml.rstrip()}\n```\n")
    head = "# Presets\n\nBits are those of weights, inputs, and keys and values; – is not rounded. What they reach is in "
    head += "[results](../results.md), which one to take in [choosing a recipe](../choosing.md).\n\n"
    table = _table(("preset", "bits", "group", "solver", "moves", "what it is"), rows)
    return f"{head}{table}\n## Files\n\n" + "\n".join(files)


def api_page() -> str:
    """Directives for mkdocstrings: what ``import sordino`` offers, then modules for those who build on it."""
    parts = ["# Python\n", "## The package\n"]
    parts += [f"::: sordino.{name}\n" for name in sordino.__all__ if not name.startswith("_")]
    for title, modules in FURTHER.items():
        parts += [f"## {title}\n", *(f"::: {module}\n" for module in modules)]
    return "\n".join(parts)


def _about(thing: Any) -> str:
    return inspect.getdoc(thing) or ""


def _prose(text: str) -> str:
    """Docstring roles and double backticks as Markdown."""
    return re.sub(r"(?::\w+:)?`+~?([^`]+)`+", r"`\1`", text)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    cells = [header, ("---",) * len(header), *([c.replace("|", "\\|").replace("\n", " ") for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells) + "\n"


# Hooks of mkdocs.


def on_files(files: Any, config: Any) -> Any:
    """Add the made pages, and place what the navigation in ``mkdocs.yml`` does not name."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    found = [f.src_uri for f in files.documentation_pages()]
    config.nav = placed(config.nav, found)
    return files


def placed(nav: list[dict[str, Any]], found: list[str]) -> list[dict[str, Any]]:
    """The navigation with every page in it: a folder's in the section that shows pages of it, the rest in the last one."""
    named = set(re.findall(r"[\w./-]+\.md", str(nav)))
    sections = {s.rpartition("/")[0]: entries for e in nav for entries in e.values() if isinstance(entries, list)
                for s in re.findall(r"[\w-]+/[\w-]+\.md", str(entries))}  # fmt: skip
    last = next(iter(nav[-1].values()))
    for page in sorted(set(found) - named):
        sections.get(page.rpartition("/")[0], last).append(page)
    return nav


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Take the marks for the tests off fences (``bash no-run``): the highlighter does not know them."""
    return re.sub(r"^(\s*```\w+) (?:no-run|check-only)$", r"\1", markdown, flags=re.MULTILINE)


def on_page_content(html: str, **_: Any) -> str:
    """Roles of docstrings that mkdocstrings leaves as they are, e.g. ``:func:`sordino.load` ``, as code."""
    return re.sub(r":(?:func|class|mod|meth):<code>~?", "<code>", html)
