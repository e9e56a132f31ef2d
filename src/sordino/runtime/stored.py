"""What a checkpoint's ``quantization_config`` may hold: anybody may have written it, and kernels trust its numbers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sordino.errors import InputError
from sordino.numerics.hadamard import has_hadamard
from sordino.recipe import Natural, PositiveInt

Inner = Literal["values", "keys", "down", "key-means", "channels"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class StoredInputs(_Part):
    """As :meth:`sordino.numerics.inputs.InputGrid.of` reads it."""

    bits: Literal[3, 4, 8]
    mode: Literal["static", "dynamic"]
    group: PositiveInt | None = None
    symmetric: bool = True

    @model_validator(mode="after")
    def _plain_if_static(self) -> StoredInputs:
        if self.mode == "static" and (self.group is not None or not self.symmetric):
            raise ValueError("static scales have neither groups nor zero points")
        return self


class StoredGroup(_Part):
    """Linears of one format."""

    bits: Literal[2, 3, 4, 5, 6, 8]
    group: Literal["channel"] | PositiveInt
    symmetric: bool
    modules: list[str]
    grid: Literal["affine", "additive"] = "affine"
    inputs: StoredInputs | None = None
    kept: Natural = 0
    side: Natural = 0
    column: bool = False


class StoredKv(_Part):
    """Keys and values of some blocks."""

    bits: Literal[2, 3, 4, 8]
    symmetric: bool
    static: bool
    blocks: Annotated[list[Natural], Field(min_length=2, max_length=2)]

    @model_validator(mode="after")
    def _symmetric_if_static(self) -> StoredKv:
        if self.static and not self.symmetric:
            raise ValueError("static scales have no zero points")
        return self


class StoredBasis(_Part):
    """Of the residual stream."""

    size: PositiveInt
    signs: Annotated[str, Field(pattern="^[0-9a-f]+$")] | None

    @model_validator(mode="after")
    def _constructed(self) -> StoredBasis:
        if self.signs is not None and (not has_hadamard(self.size) or int(self.signs, 16) >> self.size):
            raise ValueError("no Hadamard matrix of that size, or more signs than rows")
        return self


class StoredPrompt(_Part):
    """A system prompt that the prefix ends in."""

    text: str
    tokens: PositiveInt


class Stored(_Part):
    """All of it; of unknown keys nothing is known."""

    groups: list[StoredGroup]
    embeddings: Literal[8, 16]
    head: Literal[4, 8, 16]
    biases: list[str]
    basis: StoredBasis | None
    prefix: list[Natural]
    inner: list[Inner]
    kv: StoredKv | None
    system_prompt: StoredPrompt | None

    @model_validator(mode="after")
    def _prompt_in_prefix(self) -> Stored:
        if self.system_prompt is not None and self.system_prompt.tokens > len(self.prefix):
            raise ValueError("system_prompt has more tokens than the prefix")
        return self


def check_stored(said: dict[str, Any]) -> None:
    """Refuse what no Sordino writes.

    Raises:
        InputError: naming the first entry that is wrong.
    """
    try:
        Stored.model_validate(said)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(("quantization_config", *map(str, first["loc"])))
        raise InputError(f"the checkpoint's {place}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
