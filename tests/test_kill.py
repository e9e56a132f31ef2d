"""A4: a run killed with SIGKILL at any moment goes on where it stopped and ends in the same bytes.

Kills come from outside at seeded random times, and from inside at chosen points: an audit hook sees every file that
Python is about to open, rename or remove and kills the process right there, as a power switch would.
"""

import functools
import hashlib
import heapq
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sordino.errors import InputError
from sordino.walk.store import Work, write_tensors
from tiny import Done, Sordino, make_tiny

BLOCKS = 6
TEXT = ("--text", heapq.__file__)  # any text will do; a short one is tokenized sooner
OPTIONS = ("-r", "gptq-w4", "--set", "format.weights.group=32", "--windows", "16", "--seqlen", "64", *TEXT)
UNTIMED = {"run.json", "report.html"}  # what may say how long it took
WORK = ".sordino-work"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "model", layers=BLOCKS)


@pytest.fixture(scope="module")
def whole(model: Path) -> Path:
    """The result of an uninterrupted run, to be looked at only."""
    return finish(model, model.parent / "whole")


# Running


def start(model: Path, out: Path, *more: object, prepare: Callable[[], None] | None = None) -> Sordino:
    return Sordino("quantize", model, *OPTIONS, *more, "-o", out, log=out.with_suffix(".log"), prepare=prepare)


def finish(model: Path, out: Path, *more: object, prepare: Callable[[], None] | None = None) -> Path:
    done = start(model, out, *more, prepare=prepare).wait()
    assert done.code == 0, done.err
    assert not (out / WORK).exists()
    return out


def killed(done: Done) -> bool:
    assert done.code in (0, -signal.SIGKILL), done.err
    return done.code != 0


def state(out: Path) -> int:
    """How many blocks a killed run says are finished; -1 if it had not begun."""
    file = out / WORK / "state.json"
    return json.loads(file.read_text())["done"] if file.is_file() else -1


def hashes(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir() if p.name not in UNTIMED}


# What happens inside the killed process

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def watch(out: Path, see: Callable[[str, str], None]) -> None:
    """Call ``see(event, path inside out)`` before every change that Python makes to a file under ``out``."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        changes = event in _CHANGES or (event == "open" and "w" in str(args[1]))
        if changes and os.fspath(args[0]).startswith(f"{out}/"):
            see(event, os.path.relpath(args[0], out))

    sys.addaudithook(hook)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(out: Path, event: str, name: str, nth: int = 1) -> None:
    """Die before the ``nth`` change of that kind to that file."""
    seen = iter(range(1, nth))
    watch(out, lambda e, path: next(seen, None) is None and die() if (e, path) == (event, name) else None)


def die_after(out: Path, changes: int) -> None:
    """Die before the change after so many changes, whatever it is."""
    seen = iter(range(changes))
    watch(out, lambda *_: None if next(seen, None) is not None else die())


def die_writing(module: str, nth: int) -> None:
    """Die with half of the ``nth`` safetensors file of a module written."""
    where, seen = sys.modules[module], iter(range(1, nth))

    def save_file(tensors: Any, path: Path, **options: Any) -> None:
        real(tensors, path, **options)
        if next(seen, None) is None:
            os.truncate(path, path.stat().st_size // 2)
            die()

    real, where.save_file = where.save_file, save_file  # type: ignore[attr-defined]


def record(out: Path, log: Path) -> None:
    """Write down every change."""
    file = open(log, "w", buffering=1)  # noqa: SIM115
    watch(out, lambda event, path: print(event, path, file=file) and None)


# Tests

# In this order in one folder: what the process is about to do when it dies, and how many blocks are finished then.
PHASES: list[tuple[str, Callable[..., None], tuple[Any, ...], int]] = [
    ("beginning", die_at, ("os.mkdir", WORK), -1),
    ("embedding", die_at, ("open", f"{WORK}/streams/fp-00000.bin"), 0),
    ("block 0", die_at, ("open", f"{WORK}/streams/q-00001.bin"), 0),
    ("writing block 0", die_writing, ("sordino.walk.store", 1), 0),
    ("renaming block 1", die_at, ("os.rename", f"{WORK}/blocks/.00001.safetensors.tmp"), 1),
    ("writing block 3", die_writing, ("sordino.walk.store", 3), 3),
    ("writing the state after block 3", die_at, ("open", f"{WORK}/.state.json.tmp", 2), 3),
    ("renaming the state after block 3", die_at, ("os.rename", f"{WORK}/.state.json.tmp", 2), 3),
    ("removing the streams before block 4", die_at, ("os.remove", f"{WORK}/streams/q-00003.bin"), 4),
    ("writing the shard", die_writing, ("sordino.walk.assemble", 1), 6),
    ("writing the tokenizer", die_at, ("open", f"{WORK}/final/tokenizer.json"), 6),
    ("writing the config", die_at, ("open", f"{WORK}/final/config.json"), 6),
    ("moving the manifest", die_at, ("os.rename", f"{WORK}/final/sordino.json"), 6),
    ("moving the shard", die_at, ("os.rename", f"{WORK}/final/model.safetensors"), 6),
    ("writing the run's figures", die_at, ("open", ".run.json.tmp"), 6),
    ("moving the config", die_at, ("os.rename", f"{WORK}/final/config.json"), 6),
    ("removing the work folder", die_at, ("os.remove", f"{WORK}/state.json"), 6),
]


def test_killed_in_every_phase(model: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, how, args, done in PHASES:
        there = () if how is die_writing else (out,)
        assert killed(start(model, out, prepare=functools.partial(how, *there, *args)).wait()), name
        assert state(out) == done, name
        assert (out / "config.json").exists() == (name == "removing the work folder"), name
    assert hashes(finish(model, out)) == hashes(whole)


SHIFTED = ("--set", "moves=[{move='mean-shift', always=true, final=true}, {move='distill', epochs=1}]")


def test_what_the_last_block_gave_the_final_norm_survives(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for event, name in (
        ("os.rename", f"{WORK}/.norm.safetensors.tmp"),
        ("os.rename", f"{WORK}/finished/.00003.safetensors.tmp"),
        ("os.rename", f"{WORK}/final/model.safetensors"),
    ):
        assert killed(start(model, out, *SHIFTED, prepare=functools.partial(die_at, out, event, name)).wait()), name
    assert hashes(finish(model, out, *SHIFTED)) == hashes(finish(model, tmp_path / "whole", *SHIFTED))


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_after_any_number_of_changes(model: Path, whole: Path, tmp_path: Path, seed: int) -> None:
    """Dies again and again after a random number of changes to files, as long as that is too few to finish."""
    out, random_, kills = tmp_path / "out", random.Random(seed), 0
    while killed(start(model, out, prepare=functools.partial(die_after, out, random_.randrange(10, 50))).wait()):
        assert not (out / "config.json").exists() or (out / "run.json").is_file()
        kills += 1
    assert kills >= 3
    assert hashes(finish(model, out)) == hashes(whole)


def test_killed_from_outside_at_random_moments(model: Path, whole: Path, tmp_path: Path) -> None:
    """Five kills, each somewhere in the block after a random one; a run never falls back behind what was finished."""
    out, random_, reached = tmp_path / "out", random.Random(2), 0
    for target in (0, 0, 1, 2, 4):
        run = start(model, out)
        while state(out) < target:
            assert run.process.is_alive()
            time.sleep(0.002)
        time.sleep(random_.uniform(0, 0.1))
        run.process.kill()
        assert killed(run.wait())
        assert not (out / "config.json").exists()
        assert state(out) >= max(target, reached)
        reached = state(out)
    assert hashes(finish(model, out)) == hashes(whole)


@pytest.fixture
def half(model: Path, tmp_path: Path) -> Path:
    """A folder whose run died with three blocks finished."""
    out = tmp_path / "out"
    assert killed(start(model, out, prepare=functools.partial(die_writing, "sordino.walk.store", 4)).wait())
    assert state(out) == 3
    return out


def test_finished_blocks_are_not_done_again(model: Path, whole: Path, half: Path, tmp_path: Path) -> None:
    kept = {p: p.stat().st_mtime_ns for p in sorted((half / WORK / "blocks").glob("0*.safetensors"))}
    assert [p.stem for p in kept] == ["00000", "00001", "00002"]
    done = start(model, half, prepare=functools.partial(record, half, tmp_path / "changes")).wait()
    assert done.code == 0, done.err
    written = [line.split()[1] for line in (tmp_path / "changes").read_text().splitlines() if "rename" in line]
    assert [p for p in written if "blocks" in p] == [f"{WORK}/blocks/.{i:05d}.safetensors.tmp" for i in (3, 4, 5)]
    assert hashes(half) == hashes(whole)


@pytest.mark.parametrize("change", [["--seed", "1"], ["--windows", "15"], ["--set", "format.weights.bits=3"]], ids=" ".join)
def test_another_run_is_refused(model: Path, half: Path, change: list[str]) -> None:
    done = start(model, half, *change).wait()
    assert done.code == 2
    assert "another unfinished run" in done.err and "--fresh" in done.err and len(done.err.splitlines()) == 1
    assert state(half) == 3


def test_fresh_starts_over(model: Path, whole: Path, half: Path) -> None:
    """First over an unfinished run, then over a finished one; then killed in between, when the old one is half gone."""
    first = hashes(finish(model, half, "--seed", "1", "--fresh"))
    assert first["model.safetensors"] != hashes(whole)["model.safetensors"]
    for file in ("README.md", "sordino.json"):
        prepare = functools.partial(die_at, half, "os.remove", file)
        assert killed(start(model, half, "--fresh", prepare=prepare).wait())
        assert not (half / "config.json").exists()
    assert hashes(finish(model, half, "--fresh")) == hashes(whole)


def test_model_may_have_moved(model: Path, whole: Path, half: Path, tmp_path: Path) -> None:
    """What the model's folder is called is no part of a run."""
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    assert hashes(finish(moved, half)) == hashes(whole)


def test_two_runs_do_not_share_a_folder(model: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(model, out)
    while state(out) < 0:
        assert first.process.is_alive()
        time.sleep(0.002)
    os.kill(first.process.pid, signal.SIGSTOP)
    for more in ([], ["--fresh"]):
        second = Sordino("quantize", model, *OPTIONS, *more, "-o", out, log=tmp_path / "second").wait()
        assert second.code == 2 and "another process" in second.err and len(second.err.splitlines()) == 1
    os.kill(first.process.pid, signal.SIGCONT)
    assert first.wait().code == 0
    assert hashes(out) == hashes(whole)


def test_finished_run_is_left_as_it_is(model: Path, whole: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.iterdir()}
    done = start(model, out).wait()
    assert done.code == 0 and "quantizing" not in done.err and "gptq-w4" in done.out
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.iterdir()} == before


def test_failed_guard_is_told_again(model: Path, whole: Path, tmp_path: Path) -> None:
    """A result worse than RTN exits with 1; the same command does not turn it into a success."""
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    manifest = json.loads((out / "sordino.json").read_text())
    manifest["guard"]["failed"] = True
    (out / "sordino.json").write_text(json.dumps(manifest))
    done = start(model, out).wait()
    assert done.code == 1 and "worse than RTN" in done.err and len(done.err.splitlines()) == 1


@pytest.mark.parametrize("part", ["prefix", "latents"])
def test_a_damaged_part_of_a_block_is_named(part: str, tmp_path: Path) -> None:
    work = Work(tmp_path, {})
    file = work.path / part / "00002.safetensors"
    write_tensors(file, {"x": torch.ones(4)})
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(InputError, match=f"{part}/00002.safetensors is missing or damaged.*--fresh"):
        work.load_prefix(2) if part == "prefix" else work.load_latents(2)
    assert work.load_prefix(3) == work.load_latents(3) == {}


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("streams/q-00003.bin", lambda p: p.unlink()),
        ("streams/fp-00003.bin", lambda p: os.truncate(p, p.stat().st_size - 4096)),
        ("blocks/00001.safetensors", lambda p: p.unlink()),
        ("blocks/00002.safetensors", lambda p: os.truncate(p, p.stat().st_size - 1)),
        ("state.json", lambda p: p.write_text("{")),
    ],
)
def test_damaged_work_is_refused(model: Path, half: Path, file: str, damage: Callable[[Path], object]) -> None:
    """What a run cannot go on from is named; it is never filled up with zeros."""
    damage(half / WORK / file)
    done = start(model, half).wait()
    assert done.code == 2 and file in done.err and "--fresh" in done.err and len(done.err.splitlines()) == 1
    assert not (half / "config.json").exists()
