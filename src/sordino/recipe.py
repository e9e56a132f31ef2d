"""Recipes: a number format plus an ordered list of moves, typed and validated.

A recipe is a TOML file (the presets are ``recipes/*.toml``). Its ``[format]`` table says how every number is stored:
weights (with one grid and one solver per linear, and overrides by name), activations, KV cache, embeddings, head. Its
``[[moves]]`` say what is done around the rounding, in order. ``[calibration]`` says on how much text.
Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sordino.errors import InputError, nearest

PRESET_DIR = Path(__file__).parent / "recipes"

Bits = Literal[2, 3, 4, 5, 6, 8, 16]
Rate = Annotated[float, Field(ge=0, le=1)]  # a learning rate; 0 leaves what it belongs to as it is
Natural = Annotated[int, Field(ge=0, strict=True)]
PositiveInt = Annotated[int, Field(gt=0, strict=True)]  # strict: `true` is no 1
Clip = Annotated[float, Field(gt=0, le=1)] | Literal["search"]
Group = Literal["channel", "token", "tensor", "head", "auto", "wide"] | PositiveInt


class _Table(BaseModel):
    """A recipe table: frozen, unknown keys refused."""

    # TOML has inf and nan, so the options of a move may; by default pydantic would write None for them.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants", use_attribute_docstrings=True)


class Rtn(_Table):
    """Round to nearest on a grid that is searched by the error of the weight, or by that of the linear's output on text."""

    name: Literal["rtn"] = "rtn"
    search: Literal["weight", "output"] = "weight"
    """What the range of a grid is chosen by: the error of the weight, or that of the linear's output on text."""


class Gptq(_Table):
    """GPTQ: error compensation through the inverse Hessian of the quantized stream."""

    name: Literal["gptq"] = "gptq"
    damp: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the mean diagonal of the Hessian that is added to it; raised tenfold until it factorizes."""
    order: Literal["gar", "none"] = "gar"
    """Order of the columns: by falling activation inside groups that stay whole, or as stored."""
    static_groups: bool = False
    """Fit all grids before the first column is rounded, not when their group is reached."""
    weighted: bool = False
    """Fit grids with every column's error weighed by the diagonal of the Hessian."""
    refit: bool = False
    """Solve for the scales of each row under the full Hessian once the codes are there."""
    cap: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """A massive token counts in the sums for at most about so many median ones."""


class Gptaq(Gptq):
    """GPTAQ: GPTQ whose target is the full-precision stream (asymmetric calibration)."""

    name: Literal["gptaq"] = "gptaq"  # type: ignore[assignment]
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.25
    """How far to go towards the full-precision stream; 0 is GPTQ."""
    target: Literal["columns", "whole"] = "columns"
    """Correct column by column as published, or move the whole weight to the least-squares target first."""


def _by_name(value: Any) -> Any:
    """Let ``solver = "gptq"`` stand for the solver with its default options."""
    return {"name": value} if isinstance(value, str) else value


Solver = Annotated[Rtn | Gptq | Gptaq, Field(discriminator="name"), BeforeValidator(_by_name)]


class WeightOverride(_Table):
    """Other numbers for the linears whose name matches; what is not given stays as in the weights table."""

    match: str
    """Pattern of full names, with `*` and `?`, e.g. `*.down_proj`."""
    bits: Bits | None = None
    group: Group | None = None
    symmetric: bool | None = None
    grid: Literal["affine", "additive"] | None = None
    column_scale: bool | None = None
    solver: Solver | None = None


class WeightFormat(_Table):
    """How the block linears are stored and which solver rounds them."""

    bits: Bits = 16
    """Of a code; 16 leaves the weights as they are."""
    group: Group = "auto"
    """Columns that share a scale: a number, `channel` (a whole row), `auto`, the largest of 128, 64, 32 that divides, or
    `wide`, the largest multiple of 32 up to 576 that does."""
    symmetric: bool = False
    """No zero point."""
    grid: Literal["affine", "additive"] = "affine"
    """Scale and zero point, or a sum of signed row scales (D²Quant; own runtime only)."""
    column_scale: bool = False
    """One more scale for each input column: of down_proj merged into up_proj, of others stored (own runtime only)."""
    search: Annotated[int, Field(ge=0, le=200, strict=True)] = 24
    """How many shrunken ranges are tried for a grid; 0 takes the full range."""
    solver: Solver = Rtn()
    """What rounds: `"gptq"`, or a table of a name and options."""
    override: tuple[WeightOverride, ...] = ()
    """Other numbers for some linears; later ones win."""
    ignore: tuple[str, ...] = ()
    """Patterns of linears that stay in full precision."""

    def resolve(self, name: str) -> WeightFormat:
        """Format of one linear, by its full name: overrides apply in order, ignored linears stay at 16 bits."""
        update: dict[str, Any] = {"override": (), "ignore": ()}
        for o in self.override:
            if fnmatch.fnmatch(name, o.match):
                update |= {
                    k: getattr(o, k)
                    for k in ("bits", "group", "symmetric", "grid", "column_scale", "solver")
                    if getattr(o, k) is not None
                }
        if any(fnmatch.fnmatch(name, pattern) for pattern in self.ignore):
            update["bits"] = 16
        return self.model_copy(update=update)


class _Rounded(_Table):
    """What activations, keys and values have in common: rounded as they appear, at scales of the moment or found before."""

    bits: Bits = 16
    mode: Literal["static", "dynamic"] = "dynamic"
    """Scales found once on calibration text, or taken from every token as it comes."""
    clip: Clip = 1.0
    """Share of the largest entry that the codes reach; `search` lets calibration choose."""

    @property
    def rounded(self) -> bool:
        """Whether there is any rounding."""
        return self.bits != 16

    @property
    def static(self) -> bool:
        """Whether there is, with scales that calibration finds."""
        return self.rounded and self.mode == "static"

    @property
    def searched(self) -> bool:
        """Whether calibration text is looked at for it."""
        return self.static or (self.rounded and self.clip == "search")


class ActivationFormat(_Rounded):
    """How the inputs of the rounded block linears are rounded at run time; 16 bits means not at all.

    Dynamic ones with a scale (and unless symmetric a zero point) for each token (``clip`` of its extremes) or each token and
    ``group`` of channels ("auto": as for weights, the whole token where none divides), static ones with one number a site.
    ``clip = "search"`` chooses the share by the error of the block's output; static scales are always searched so.
    """

    bits: Literal[3, 4, 8, 16] = 16
    """Of an input's code."""
    group: Literal["token", "auto"] | PositiveInt = "token"
    """Channels of a token that share a dynamic scale: "token" for all of them, "auto", or a number."""
    symmetric: bool = True
    """No zero point. Dynamic ones with groups are multiplied in floating point anyway and do better with one."""


class KvFormat(_Rounded):
    """How keys (after the rotary embedding) and values are stored in the cache; 16 bits means not rounded.

    Dynamic ones with a scale (and unless symmetric a zero point) for each token and head, static ones with one number a head;
    ``clip`` as for activations, searched by the error of attention's probabilities (keys) and of the values.
    """

    bits: Literal[2, 3, 4, 8, 16] = 16
    """Of a code of keys and values."""
    symmetric: bool = False
    """No zero point."""


class Format(_Table):
    """Every stored number."""

    weights: WeightFormat = WeightFormat()
    """The linears of the blocks."""
    activations: ActivationFormat = ActivationFormat()
    """Their inputs."""
    kv: KvFormat = KvFormat()
    """The cache."""
    embeddings: Literal[16, 8] = 16
    """Bits of the embedding table, one scale a row."""
    head: Literal[16, 8, 4] = 16
    """Bits of the output head; leave it at 16 where it is the embedding table itself."""


class Calibration(_Table):
    """How much text the run looks at; the text itself is an option of the command."""

    windows: PositiveInt = 128
    """How many; `--windows` in the command. An eighth as many more, at least four, are held out for the guards."""
    seqlen: Annotated[int, Field(ge=2, strict=True)] = 512
    """Tokens of a window; `--seqlen` in the command."""


class MoveSpec(BaseModel):
    """One move by name; its options are validated by the move itself."""

    model_config = ConfigDict(extra="allow", frozen=True)
    move: str

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


class Recipe(_Table):
    """A number format plus an ordered list of moves."""

    name: str
    """The file's name without `.toml`, if not given."""
    summary: str = ""
    """One line for `sordino recipes`."""
    format: Format = Format()
    """How numbers are stored."""
    calibration: Calibration = Calibration()
    """How much text is looked at."""
    moves: tuple[MoveSpec, ...] = ()
    """What is done around the rounding, in this order."""
    guard: Literal["on", "tell", "off"] = "on"
    """Whether blocks and the result are held against RTN of the same format, on text held out. `on`: a block that is worse
    gives way to RTN. `tell`: it stays, for ablations; moves still undo what does not help. `off`: nothing is held out."""

    @property
    def digest(self) -> str:
        """Hash of everything that the result depends on (name and summary left out), 16 hex digits."""
        body = self.model_dump(mode="json", exclude={"name", "summary"})
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]

    def to_toml(self) -> str:
        """The recipe as TOML, every default written out; reading it gives the same recipe."""
        return to_toml(self.model_dump(mode="json"))


def presets() -> list[str]:
    """Names of the presets that come with Sordino, sorted."""
    return sorted(p.stem for p in PRESET_DIR.glob("*.toml"))


def load_recipe(spec: str | Path | Recipe, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        spec: preset name, path of a TOML file, or a recipe.
        overrides: ``key=value`` strings, e.g. ``format.weights.bits=3``; values are TOML, bare words are strings.

    Raises:
        InputError: naming the key or file and the nearest known one.
    """
    raw = spec.model_dump(mode="json") if isinstance(spec, Recipe) else _read(str(spec))
    for item in [overrides] if isinstance(overrides, str) else overrides:
        _override(raw, item)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"recipe {raw.get('name', spec)}: {_explain(error)}") from None


def _read(spec: str) -> dict[str, Any]:
    path = PRESET_DIR / f"{spec}.toml"
    if spec not in presets():
        path = Path(spec)
        if not os.path.isfile(path):  # unlike Path.is_file, never raises
            hint = nearest(spec, presets(), f"presets: {', '.join(presets())}")
            raise InputError(f"no recipe '{spec}': neither a preset nor a TOML file{hint}")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:  # a ValueError: not TOML, or not UTF-8
        raise InputError(f"recipe {path} cannot be read: {error}") from None
    return {"name": path.stem, **raw}


def _override(raw: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {item}: write key=value, e.g. --set format.weights.bits=3")
    try:
        value: Any = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    except (ValueError, RecursionError) as error:  # thousands of digits or brackets
        raise InputError(f"--set {key}: {error}") from None
    *parents, last = key.strip().split(".")
    table: Any = raw
    for depth, part in enumerate(parents):
        if isinstance(table, list):
            if part not in map(str, range(len(table))):
                raise InputError(f"--set {item}: '{'.'.join(parents[:depth])}' has no entry {part}")
            child = table[int(part)]
        else:
            child = table.setdefault(part, [] if part in ("moves", "override") else {})
            if isinstance(child, str):  # `solver = "gptq"`, then `--set …solver.damp=…`
                child = table[part] = {"name": child}
        if not isinstance(child, dict | list):
            raise InputError(f"--set {item}: '{'.'.join(parents[: depth + 1])}' is not a table")
        table = child
    if not isinstance(table, dict):
        raise InputError(f"--set {item}: name a key of an entry, e.g. moves.0.{last}")
    table[last] = value


def _explain(error: ValidationError) -> str:
    """One line for the first thing that is wrong."""
    first = error.errors()[0]
    # Tags of unions appear in pydantic's location but not in the recipe.
    path = ".".join(str(p) for p in first["loc"] if p not in ("rtn", "gptq", "gptaq") and not set(str(p)) & set("[-"))
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        known = sorted(_known_keys())
        whole = [p for p in _PATHS if p.rpartition(".")[2] == key]
        return f"unknown key '{path}'" + (f"; did you mean '{whole[0]}'?" if key == path and whole else nearest(key, known))
    return f"{path}: {first['msg'][0].lower()}{first['msg'][1:]} (got {first['input']!r})"


# Where a key stands that was given without its table.
_PATHS = [
    *(f"format.weights.{key}" for key in WeightFormat.model_fields),
    *(f"format.{key}" for key in Format.model_fields),
    *(f"calibration.{key}" for key in Calibration.model_fields),
    *(f"format.activations.{key}" for key in ActivationFormat.model_fields),
]


def _known_keys() -> set[str]:
    tables: tuple[type[BaseModel], ...] = (
        Recipe, Format, WeightFormat, WeightOverride, ActivationFormat, KvFormat, Calibration, Rtn, Gptq, Gptaq,
    )  # fmt: skip
    return {field for table in tables for field in table.model_fields}


def to_toml(table: Mapping[str, Any], prefix: str = "") -> str:
    """Write a nested mapping as TOML, leaving out None; the standard library only reads it."""
    lines, children = [], []
    for key, value in table.items():
        path = f"{prefix}{_toml_key(key)}"
        if isinstance(value, Mapping):
            children.append(f"\n[{path}]\n{to_toml(value, path + '.')}")
        elif isinstance(value, list | tuple) and value and all(isinstance(entry, Mapping) for entry in value):
            children += [f"\n[[{path}]]\n{to_toml(entry, path + '.')}" for entry in value]
        elif value is not None:
            lines.append(f"{_toml_key(key)} = {_toml_value(value)}\n")
    return "".join(lines + children)


def _toml_key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, float):
        return repr(value)  # with inf and nan, which JSON lacks
    # TOML's strings are JSON's, but for pairs of surrogates (never escaped) and DEL (always escaped).
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
