"""The Python API: ``quantize`` and ``load``; ``evaluate`` is in measure/evaluate.py. The command line is thin above it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from sordino.contract import Progress
from sordino.corpus import DEFAULT_TEXT
from sordino.errors import InputError, SordinoError, reason
from sordino.heap import keep_freed_memory
from sordino.numerics.machine import fast
from sordino.recipe import Recipe, load_recipe
from sordino.report.notebook import Figure, figure, table
from sordino.report.quantize import block_series, quantize_page, result_lines
from sordino.walk.assemble import publish
from sordino.walk.job import Job, make_job, run_facts, run_job, windows_of
from sordino.walk.source import locate, without_bars
from sordino.walk.store import WORK, Work, claim, write_text

_PENDING = "the run was stopped before they were made; the same command makes them"


@dataclass(frozen=True)
class Result:
    """What a run left behind.

    Attributes:
        out: the checkpoint.
        manifest: what ``sordino.json`` says (bits, per-block errors, guard).
        run: what ``run.json`` says (seconds, memory, host).
    """

    out: Path
    manifest: dict[str, Any]
    run: dict[str, Any]

    def lines(self) -> list[tuple[str, str]]:
        """What is worth knowing, as (figure, value)."""
        return result_lines(self.manifest, self.run)

    def figure(self) -> Figure:
        """Held-out error of every block over depth, beside plain rounding's."""
        return figure(block_series(self.manifest), "block", "relative error", lines=True)

    def _repr_html_(self) -> str:
        return table(self.lines(), title=f"{self.manifest['recipe']} → {self.out}")


def quantize(
    model: str,
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    text: str | Path = DEFAULT_TEXT,
    windows: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    overrides: Sequence[str] = (),
    blocks: tuple[int, int] | None = None,
    fresh: bool = False,
    system_prompt: str | None = None,
    samples: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Quantize a model into a folder; the same call continues an interrupted run.

    Args:
        model: Hugging Face directory or hub name, ``.gguf`` file, or ``smollm2``.
        recipe: preset name, TOML file or recipe.
        out: folder of the checkpoint; made if missing.
        text: calibration text, see :func:`sordino.corpus.load_text`.
        windows: calibration windows, instead of the recipe's.
        seqlen: tokens of a window, instead of the recipe's.
        seed: of the windows' choice and the moves' random numbers.
        overrides: ``key=value`` changes to the recipe.
        blocks: range of blocks to quantize; the others keep full precision.
        fresh: start over, removing what an earlier run left in ``out``.
        system_prompt: text, or ``@FILE``, that stands protected before every text from now on.
        samples: let both models speak in the report, if the full-precision one is small (report/samples.py).
        progress: called with (what, done, total).

    Returns:
        The result; its manifest is what the checkpoint carries.

    Raises:
        InputError: if something given cannot be used; nothing loadable is left behind.
        SordinoError: if the run fails, or the final guard finds the result worse than RTN.

    Example:
        >>> quantize("smollm2", "gptq-w4", "out")  # doctest: +SKIP
    """
    cpu = time.process_time()
    keep_freed_memory()
    out, tell = Path(out), progress or _silent
    changes = [overrides] if isinstance(overrides, str) else overrides
    chosen = load_recipe(recipe, (*changes, *_calibration(windows, seqlen)))
    _check_owner(out)
    job = make_job(str(model), chosen, out, text, seed, blocks, system_prompt)
    done = None if fresh else _finished(out, job.fingerprint)
    if done is not None and not _lacks_report(out, samples):
        return _judged(done)
    drawn = windows_of(job) if done is None else None
    mend = done is not None
    try:
        with claim(out):
            if done is None:
                if fresh:  # not before everything given is known to be usable
                    _clear(out)
                done = _make(job, drawn, out, cpu, tell, _PENDING if samples else None)
            if samples or mend:
                _write_report(job.model, done, _samples(job.model, done, tell) if samples else None)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write to {out}: {reason(error)}") from None
    return _judged(done)


def load(path: str | Path, **options: Any) -> tuple[Any, Any]:
    """Load a checkpoint (or any model that :func:`quantize` takes) and its tokenizer.

    Args:
        path: Sordino checkpoint, Hugging Face directory or hub name, ``.gguf`` file or ``smollm2``.
        options: passed on to ``AutoModelForCausalLM.from_pretrained``, e.g. ``dtype=torch.float32``. Without a ``dtype``, or
            with "auto", it is the model's own; on CPUs that have no products of bf16, fp32 takes its place.

    Returns:
        The transformers model in eval mode, and its tokenizer.

    Raises:
        InputError: if it cannot be loaded.
    """
    folder = locate(path)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json: not a model directory")
    options = {"dtype": "auto", "trust_remote_code": False} | options
    try:
        if options["dtype"] == "auto" and "device_map" not in options:
            options["dtype"] = _dtype_for(folder)
        auto: Any = transformers.AutoModelForCausalLM
        with without_bars():
            model, info = auto.from_pretrained(folder, **options, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except SordinoError:
        raise
    except Exception as error:
        raise InputError(f"{folder} cannot be loaded: {reason(error)}") from None
    if info["missing_keys"]:  # transformers makes up random numbers for them
        raise InputError(f"{folder} lacks tensor '{min(info['missing_keys'])}' that its config.json calls for")
    return model.eval(), tokenizer


def _dtype_for(folder: Path) -> torch.dtype | str:
    """Of forwards on the CPU."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named: str | None = config.get("dtype") or config.get("torch_dtype")
    return fast(torch.bfloat16) if named == "bfloat16" else "auto"


def _make(job: Job, windows: Tensor | None, out: Path, cpu: float, progress: Progress, samples: str | None) -> Result:
    """Run it, or go on with it, to a checkpoint that can be loaded; ``samples`` stand in the report for now."""
    begun = (out / WORK / "state.json").is_file()
    work = Work(out, job.fingerprint, cpu)
    work.save()
    try:
        manifest = run_job(job, work, windows, out, progress)
    except InputError:  # a tensor with NaN: there is nothing to go on with
        if not begun:
            work.remove()
        raise
    done = Result(out, manifest, run_facts(work, job))
    write_text(out / "run.json", json.dumps(done.run, indent=1) + "\n")
    _write_report(job.model, done, samples)
    publish(work, out)
    work.remove()
    return done


def _calibration(windows: int | None, seqlen: int | None) -> list[str]:
    given = {"windows": windows, "seqlen": seqlen}
    return [f"calibration.{k}={v}" for k, v in given.items() if v is not None]


def _check_owner(out: Path) -> None:
    """Refuse a folder that holds what Sordino did not write."""
    manifest = out / "sordino.json"
    if (out / "config.json").is_file() and not manifest.is_file():
        raise InputError(f"{out} holds a model that Sordino did not write; choose another folder")
    if out.is_dir() and not manifest.is_file() and not (out / WORK).is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and holds no Sordino run; choose another folder")


def _finished(out: Path, fingerprint: dict[str, Any]) -> Result | None:
    """The result of an identical run that is complete; refuses the result of another one."""
    if not (out / "config.json").is_file():
        return None
    stored = _read_json(out / "sordino.json")
    if stored.get("run") != fingerprint:
        raise InputError(f"{out} holds the result of another run; use --fresh to replace it, or another folder")
    if not (out / "run.json").is_file():
        return None
    Work(out, fingerprint).remove()
    return Result(out, stored, _read_json(out / "run.json"))


def _judged(result: Result) -> Result:
    """The result, unless the final guard found it worse than RTN."""
    guard = result.manifest["guard"]
    if guard.get("failed"):
        raise SordinoError(
            f"the result is worse than RTN of the same format (KL {guard['kl']:.5f} against {guard['rtn_kl']:.5f} on held-out "
            f"text); it is kept in {result.out} and marked in sordino.json; try more --windows or another --text"
        )
    return result


def _clear(out: Path) -> None:
    """Remove what Sordino itself wrote into a folder: config.json first, the list of the files last."""
    manifest = out / "sordino.json"
    if manifest.is_file():
        files = _read_json(manifest).get("files", [])
        for name in sorted(
            {*files, "run.json", "report.html", "sordino.json"}, key=lambda n: (n != "config.json", n == "sordino.json")
        ):
            (out / Path(name).name).unlink(missing_ok=True)
    if (out / WORK).is_dir():
        (out / WORK / "state.json").unlink(missing_ok=True)
        shutil.rmtree(out / WORK)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{file} cannot be read: {reason(error)}; choose another folder") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no table; choose another folder")
    return content


def _write_report(model: str, done: Result, samples: Any) -> None:
    write_text(done.out / "report.html", quantize_page(done.out, model, done.manifest, done.run, samples))


def _lacks_report(out: Path, samples: bool) -> bool:
    """Whether the page of a finished run is gone, or was never given the samples that are asked for."""
    file = out / "report.html"
    return not file.is_file() or (samples and _PENDING in file.read_text(encoding="utf-8", errors="replace"))


def _samples(model: str, done: Result, progress: Progress) -> Any:
    """Answers of both models for the report, or why there are none."""
    from sordino.report.samples import samples  # which loads models by this file

    progress("samples", 0, 1)
    said = samples(model, done.out, done.manifest["full_precision_bytes"])
    progress("samples", 1, 1)
    return said


def _silent(what: str, done: int, total: int) -> None:
    """No progress."""
