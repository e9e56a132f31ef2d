"""The public command line on a trained model small enough for every run: stories260k, on stories that it tells itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sordino
from tiny import STORIES, run, tell_stories


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("stories")
    return tell_stories(folder / "calibrate.txt", 0), tell_stories(folder / "evaluate.txt", 1)


def evaluate(model: str, text: str, file: Path) -> dict[str, float]:
    run("eval", model, "--text", text, "--windows", "16", "--seqlen", "256", "--against", str(STORIES), "--json", str(file))
    return json.loads(file.read_text())


# At most so many times the full-precision perplexity. Keys of eight channels lose most: rounded to 4 bits by plain
# minimum and maximum, with everything else exact, they alone cost 2.4 times.
@pytest.mark.parametrize(
    ("recipe", "most"), [("prefixquant-w4a8kv4-static-tuned", 3.0), ("prefixquant-w4a4kv4-static-tuned", 3.5), ("w2", 5.0)]
)
def test_what_is_quantized_still_tells_stories(recipe: str, most: float, texts: tuple[str, str], tmp_path: Path) -> None:
    calibrate, test = texts
    made = str(tmp_path / "made")
    run("quantize", str(STORIES), "-r", recipe, "-o", made, "--text", calibrate, "--windows", "16", "--seqlen", "256")
    ours, exact = (evaluate(m, test, tmp_path / "figures.json") for m in (made, str(STORIES)))
    assert ours["ppl"] < most * exact["ppl"]
    assert ours["bits_per_weight"] < 5
    assert "Once upon a time" in run("generate", made, "--prompt", "Once upon a time", "--max-new-tokens", "16")


def test_a_prefix_that_was_searched_for(texts: tuple[str, str], tmp_path: Path) -> None:
    """Its loudest tokens are no outliers by the move's own threshold; with a lower one they are found, and parked exactly."""
    made = tmp_path / "made"
    options = ["--set", "format.weights.bits=16", "--set", 'moves=[{move="prefix", threshold=3.0}]']
    run(
        "quantize",
        str(STORIES),
        "-r",
        "rtn-w4",
        *options,
        "-o",
        str(made),
        "--text",
        texts[0],
        "--windows",
        "16",
        "--seqlen",
        "256",
    )
    found = json.loads((made / "sordino.json").read_text())["prefix"]["ids"]
    ours, tokenizer = sordino.load(made)
    exact, _ = sordino.load(STORIES)
    first = exact.config.bos_token_id
    assert len(found) > 1 and found[-1] == first
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert ids[0, 0] != first
    with torch.no_grad():
        behind = exact(torch.cat([torch.tensor([found]), ids], 1)).logits[:, len(found) :]
        torch.testing.assert_close(ours(ids).logits, behind, rtol=1e-4, atol=1e-4)
