"""Models side by side, with a prefix before those that have none."""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import sordino
from sordino.cli import app
from sordino.errors import InputError
from sordino.measure.compare import compare
from tiny import make_tiny


def test_full_precision_with_the_prefix_is_compared(tmp_path: Path) -> None:
    model, out = make_tiny(tmp_path / "model", layers=2), tmp_path / "out"
    text = {"text": heapq.__file__}  # a short one
    made = sordino.quantize(str(model), "rtn-w4", out, system_prompt="Be kind.", windows=8, seqlen=48, **text).manifest
    options: dict[str, Any] = {"seqlen": 32, "windows": 2} | text
    rows = dict(compare([out, model], prefix_from=out, **options).rows)
    assert list(rows) == [str(out), f"{model} + prefix"]
    assert rows[f"{model} + prefix"].ppl == sordino.evaluate(model, prefix_from=out, **options).ppl
    assert rows[str(out)].ppl == sordino.evaluate(out, **options).ppl
    assert list(dict(compare([model], **options).rows)) == [str(model)]
    with pytest.raises(InputError, match="has no prefix"):
        compare([model], prefix_from=model, **options)
    refused = CliRunner().invoke(app, ["compare", str(out), "--prefix-from", str(out)]).exception
    assert isinstance(refused, InputError) and "none among these" in str(refused)
    # Prefix and window together may take the model's 512 positions and no more.
    taken = len(made["prefix"]["ids"])
    for subject, prefix in ((out, None), (model, out)):
        assert sordino.evaluate(subject, prefix_from=prefix, seqlen=512 - taken, windows=1, **text).ppl is not None
        with pytest.raises(InputError, match=f"of which its prefix takes {taken}"):
            sordino.evaluate(subject, prefix_from=prefix, seqlen=513 - taken, windows=1, **text)
