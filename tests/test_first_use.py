"""What people try who have only read the README."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sordino
from sordino.cli import _strict, app
from sordino.errors import InputError
from sordino.measure.compare import compare
from sordino.measure.evaluate import reference
from sordino.recipe import load_recipe
from sordino.runtime.generate import generate
from tiny import make_tiny, run

TEXT = Path(json.__file__).with_name("decoder.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "model", layers=2)


@pytest.fixture(scope="module")
def checkpoint(model: Path) -> Path:
    """Rotated, with embeddings of 8 bits."""
    made = load_recipe("quarot-w4a4kv4", ["format.embeddings=8", "guard=off"])
    return sordino.quantize(model, made, model.parent / "made", text=TEXT, windows=4, seqlen=32).out  # paths everywhere


def test_speed_is_measured_from_a_plain_script(checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from sordino.measure.bench import bench\n"
        "print('once')\n"
        f"found = bench([{str(checkpoint)!r}], prompt_tokens=8, new_tokens=2, threads=1)\n"
        "print(len(found.models))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["once", "1"]


def test_help_does_not_wait_for_torch() -> None:
    """What needs no model takes a moment: the command line imports what it needs, when it needs it."""
    script = """
import sys
sys.argv = ["sordino", "quantize", "--help"]
from sordino_cli import main
try:
    main()
finally:
    print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "--recipe" in done.stdout and done.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    ("change", "meant"),
    [
        ("ignore=['down_proj']", "'*.down_proj'"),
        ("ignore=['*.q_prj']", "'*.q_proj'"),
        ("ignore=['lm_head']", "none of the block linears"),
        ("override=[{match='*.dwn_proj', bits=8}]", "'*.down_proj'"),
    ],
)
def test_patterns_that_match_nothing_are_refused(model: Path, change: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"matches none") as error:
        sordino.quantize(model, "rtn-w4", tmp_path / "out", overrides=f"format.weights.{change}")
    assert meant in str(error.value)


def test_numbers_that_make_no_sense_are_refused(model: Path) -> None:
    for options in ({"windows": 0}, {"windows": -1}, {"seqlen": 0}, {"seqlen": 1}):
        with pytest.raises(InputError, match="at least one of two"):
            sordino.evaluate(model, text=TEXT, **options)
    assert len(compare(str(model), text=TEXT, seqlen=32, windows=1).rows) == 1


def test_prompts_longer_than_the_model_are_refused(model: Path) -> None:
    with pytest.raises(InputError, match="the model 512 positions"):
        generate(model, "a b" * 600, 4)


def test_a_table_of_codes_keeps_its_size(checkpoint: Path) -> None:
    loaded, _ = sordino.load(checkpoint)
    assert loaded.resize_token_embeddings(300) is loaded.get_input_embeddings()
    with pytest.raises(InputError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
        loaded.resize_token_embeddings(301)


@pytest.mark.parametrize("recipe", ["quarot-w4a4kv4", "spinquant-w4a4kv4"])
def test_a_rotated_model_can_be_pickled(recipe: str, model: Path, tmp_path: Path) -> None:
    steps = ["moves.2.steps=1", "moves.2.windows=1", "moves.2.length=16"] if recipe.startswith("spin") else []
    made = load_recipe(recipe, [*steps, "guard=off"])
    loaded, _ = sordino.load(sordino.quantize(model, made, tmp_path / "out", text=TEXT, windows=4, seqlen=32).out)
    torch.save(loaded, tmp_path / "model.pt")
    again, ids = torch.load(tmp_path / "model.pt", weights_only=False), torch.arange(2, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, loaded(ids).logits)


def test_a_model_with_nan_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[3] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="NaN"):
        sordino.quantize(broken, "gptq-w4", tmp_path / "out", text=TEXT, windows=4, seqlen=32)
    assert not list((tmp_path / "out").iterdir())
    assert sordino.quantize(model, "gptq-w4", tmp_path / "out", text=TEXT, windows=4, seqlen=32).out == tmp_path / "out"


def test_a_report_that_is_gone_or_lacks_its_samples_is_made_again(model: Path, tmp_path: Path) -> None:
    """Nothing else of a finished run is touched; the text it read is named where paths may be."""
    out = tmp_path / "out"

    def again(samples: bool = True) -> str:
        sordino.quantize(model, "gptq-w4", out, text=TEXT, windows=16, seqlen=32, samples=samples)
        return (out / "report.html").read_text()

    def others() -> dict[str, int]:
        return {f.name: f.stat().st_mtime_ns for f in out.iterdir() if f.name != "report.html"}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sordino.report.samples.samples", stop)
        with pytest.raises(KeyboardInterrupt):
            again()
    before, page = others(), (out / "report.html").read_text()
    assert "the same command makes them" in page and again(samples=False) == page
    assert str(TEXT) in page and str(TEXT) not in (out / "sordino.json").read_text()
    whole = again()
    assert "sky blue" in whole and "the same command makes them" not in whole
    written = (out / "report.html").stat().st_mtime_ns
    assert again() == whole and (out / "report.html").stat().st_mtime_ns == written
    (out / "report.html").unlink()
    assert "sky blue" not in again(samples=False)
    assert others() == before


def test_json_has_no_words_of_its_own() -> None:
    said = {"ppl": float("nan"), "rows": [{"kl": float("inf"), "n": 3}, (0.5, None, "nan")]}
    assert _strict(said) == {"ppl": None, "rows": [{"kl": None, "n": 3}, [0.5, None, "nan"]]}


def test_the_demo_takes_a_base_model_with_few_positions(model: Path, tmp_path: Path) -> None:
    plain = Path(shutil.copytree(model, tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()
    said = run("demo", "--model", str(plain), "-o", str(tmp_path / "demo"))
    assert "Why is the sky blue?" in said and (tmp_path / "demo" / "figures.json").is_file()


def test_a_system_prompt_stands_before_the_reference_too(model: Path, tmp_path: Path) -> None:
    """Nothing is rounded, so nothing is lost, and a checkpoint without a prompt beside it has its own reference."""
    plain = load_recipe("rtn-w4", ["format.weights.bits=16"])
    made = [
        sordino.quantize(model, plain, tmp_path / n, system_prompt=p).out for n, p in (("with", "be brief"), ("without", None))
    ]
    options = {"text": TEXT, "seqlen": 32, "windows": 2}
    assert sordino.evaluate(made[0], against=model, **options).kl < 1e-9
    rows = dict(compare([made[1], *made], against=model, **options).rows)
    assert all(figures.kl < 1e-9 for figures in rows.values())
    assert sordino.evaluate(made[0], against=reference(model, **options), **options).kl > 1e-3


def test_recipes_without_shapes_are_refused(checkpoint: Path) -> None:
    error = CliRunner().invoke(app, ["bench", str(checkpoint), "-r", "w3"]).exception
    assert isinstance(error, InputError) and "--shape" in str(error)
