"""What no Sordino writes into a checkpoint's ``quantization_config`` is refused before kernels see it."""

from __future__ import annotations

import copy
from functools import reduce
from typing import Any

import pytest

from sordino.errors import InputError
from sordino.runtime.plugin import SordinoConfig

VALID: dict[str, Any] = {
    "groups": [
        {
            "bits": 4,
            "group": 64,
            "symmetric": False,
            "modules": ["*.q_proj"],
            "inputs": {"bits": 4, "mode": "dynamic", "group": 64, "symmetric": False},
        },
        {"bits": 3, "group": "channel", "symmetric": True, "modules": ["*.o_proj"], "inputs": {"bits": 8, "mode": "static"}},
    ],
    "embeddings": 8,
    "head": 16,
    "biases": ["*.norm"],
    "basis": {"size": 8, "signs": "5a"},
    "prefix": [3, 1],
    "system_prompt": {"text": "be brief", "tokens": 1},
    "inner": ["values", "keys", "down", "key-means"],
    "kv": {"bits": 4, "symmetric": False, "static": False, "blocks": [0, 4]},
    "format_version": 5,
}
WRONG: list[tuple[str, Any]] = [
    *(("kv.bits", x) for x in (0, 1, 5, 7, 9, 16, 64, -4, "4", 4.5, True, None)),
    *(("kv", x) for x in ([], "static", {"bits": 4}, VALID["kv"] | {"static": True})),
    *(("kv.blocks", x) for x in ([0], [0, 1, 2], [-1, 2], "04")),
    *(("groups.0.inputs.bits", x) for x in (0, 1, 9, 12, "8")),
    *(("groups.0.inputs", x) for x in ([], {"bits": 8, "mode": "lively"}, {"bits": 8, "mode": "static", "group": 64})),
    *(("groups.0.bits", x) for x in (0, 7, 16, "4")),
    *(("groups.0.group", x) for x in (0, -64, "token", 1.5)),
    *(("groups.0.modules", x) for x in ("*", [1], None)),
    *(("groups", x) for x in ({"bits": 4}, [1], "all")),
    *(("inner", x) for x in (["keys", "doors"], "keys", [1])),
    *(("prefix", x) for x in ("31", {"a": 1}, [1.5], [-1], [True])),
    *(("basis", x) for x in ({"size": 7, "signs": "5a"}, {"size": 8, "signs": "zz"}, {"size": 8, "signs": "fff"}, 8)),
    *(("basis.signs", x) for x in (5, "", "-1")),
    *(("system_prompt", x) for x in ("abc", {"tokens": 1}, {"text": "x", "tokens": 50}, {"text": "x", "tokens": "1"})),
    *(("embeddings", x) for x in (4, "8")),
    *(("head", x) for x in (2, "8")),
    *(("biases", x) for x in ("*", [1])),
    *(("format_version", x) for x in ("5", None, 5.0, True, 99)),
]  # fmt: skip


def test_what_sordino_writes_is_read() -> None:
    said = SordinoConfig(**copy.deepcopy(VALID)).to_dict()
    assert {k: v for k, v in said.items() if k != "quant_method"} == VALID
    assert SordinoConfig(**said).to_dict() == said


@pytest.mark.parametrize(("place", "value"), WRONG, ids=str)
def test_what_it_does_not_write_is_refused(place: str, value: object) -> None:
    said = copy.deepcopy(VALID)
    *parents, last = place.split(".")
    table = reduce(lambda t, key: t[int(key) if isinstance(t, list) else key], parents, said)
    table[last] = value
    with pytest.raises(InputError) as error:
        SordinoConfig(**said)
    assert "\n" not in str(error.value) and (place.split(".")[0] in str(error.value) or "format" in str(error.value))
