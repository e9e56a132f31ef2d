"""A6: what cannot be used is refused in one line with exit code 2, and nothing that loads is left behind."""

import heapq
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tiny import Done, Sordino, make_tiny

TEXT = ("--text", heapq.__file__)  # any text will do; a short one is tokenized sooner
GPTQ = ("-r", "gptq-w4", "--windows", "16", "--seqlen", "32", *TEXT)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def checkpoint(model: Path) -> Path:
    """A finished result, to be looked at only."""
    out = model.parent / "checkpoint"
    assert Sordino("quantize", model, *GPTQ, "-o", out, log=model.parent / "log").wait().code == 0
    return out


def refused(done: Done, *words: str) -> None:
    """One line on stderr that holds ``words``, exit code 2, nothing on stdout."""
    lines = done.err.splitlines()
    assert done.code == 2, done.err
    assert len(lines) == 1 and lines[0].startswith("sordino: "), done.err
    assert all(word in lines[0] for word in words), done.err
    assert done.out == ""


def no_checkpoint(out: Path) -> None:
    assert not out.is_dir() or not (out / "config.json").exists()


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def edit_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        changed = change(tensors.pop(name).clone())
        save_file(tensors | ({} if changed is None else {name: changed}), folder / "model.safetensors", {"format": "pt"})

    return edit


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def with_nan(value: torch.Tensor) -> torch.Tensor:
    value.view(-1)[7] = float("nan")
    return value


def gpt2(folder: Path) -> None:
    AutoConfig.for_model("gpt2", n_layer=2).save_pretrained(folder)


UP = "model.layers.{}.mlp.up_proj.weight"
BROKEN_MODELS = {
    "truncated": (truncate, ["model.safetensors", "no complete safetensors"]),
    "garbage header": (write("model.safetensors", b"\xff" * 4096), ["model.safetensors", "no complete safetensors"]),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ["no model.safetensors"]),
    "pickle only": (pickle_only, ["pytorch_model.bin", "convert it to safetensors"]),
    "broken index": (write("model.safetensors.index.json", b'{"weight_map": []}'), ["index.json cannot be read"]),
    "no config": (lambda m: (m / "config.json").unlink(), ["no config.json"]),
    "config is no JSON": (write("config.json", b"{"), ["config.json cannot be read"]),
    "gpt2": (gpt2, ["unknown architecture 'gpt2'", "llama"]),
    "no layers": (edit_config(num_hidden_layers=0), ["config.json describes no model"]),
    "unknown activation": (edit_config(hidden_act="nope"), ["config.json describes no model", "nope"]),
    "heads do not divide": (edit_config(num_attention_heads=3), ["config.json cannot be read", "64", "3"]),
    "more layers than weights": (edit_config(num_hidden_layers=5), ["lacks tensor 'model.layers.4."]),
    "wider than weights": (edit_config(intermediate_size=128), ["[96, 64]", "[128, 64]"]),
    "already quantized": (edit_config(quantization_config={"quant_method": "gptq", "bits": 4}), ["already quantized"]),
    "NaN in first block": (edit_tensor(UP.format(0), with_nan), [UP.format(0), "NaN"]),
    "NaN in last block": (edit_tensor(UP.format(3), with_nan), [UP.format(3), "NaN"]),
    "infinite norm": (edit_tensor("model.norm.weight", lambda w: w / 0), ["model.norm.weight", "infinity"]),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), ["no tokenizer"]),
    "tokenizer of another model": (
        lambda m: edit_tensor("model.embed_tokens.weight", lambda w: w[:100])(m) or edit_config(vocab_size=100)(m),
        ["tokenizer has token", "100 embeddings"],
    ),
}


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_broken_model(model: Path, tmp_path: Path, name: str) -> None:
    spoil, words = BROKEN_MODELS[name]
    spoil(Path(shutil.copytree(model, tmp_path / "model")))
    refused(Sordino("quantize", tmp_path / "model", *GPTQ, "-o", tmp_path / "out", log=tmp_path).wait(), *words)
    no_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("missing.gguf", None, ["missing.gguf is missing"]),
        ("no.gguf", b"not a gguf file at all", ["is not a GGUF file"]),
        ("empty.gguf", b"", ["is not a GGUF file"]),
        ("header.gguf", b"GGUF\x03\0\0\0", ["cannot be read as a GGUF model"]),
        (
            "truncated.gguf",
            b"GGUF\x03\0\0\0" + b"\x01" + b"\0" * 7 + b"\x02" + b"\0" * 7 + b"\x14",
            ["cannot be read as a GGUF"],
        ),
        ("missing", None, ["no model", "hub name"]),
        ("somebody/nothing", None, ["'somebody/nothing'", "hub"]),
    ],
)
def test_no_model(tmp_path: Path, file: str, content: bytes | None, words: list[str]) -> None:
    given = file if "/" in file else tmp_path / file
    if content is not None:
        (tmp_path / file).write_bytes(content)
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    refused(Sordino("quantize", given, *GPTQ, "-o", tmp_path / "out", log=tmp_path / "log", env=env).wait(), *words)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("cache/sordino/gguf/*"))  # no half-converted model is left either


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\0\0\0")
    args = ("quantize", tmp_path / "model.gguf", *GPTQ, "-o", tmp_path / "out")
    refused(Sordino(*args, log=tmp_path, env={"XDG_CACHE_HOME": "/proc/none"}).wait(), "/proc/none", "XDG_CACHE_HOME")


def _set(assignment: str) -> list[str]:
    return ["--set", assignment]


BAD_ARGUMENTS = [
    (_set("format.weights.group=48"), ["q_proj", "48", "64", "--set format.weights.group="]),
    (_set("format.weights.group=0"), ["format.weights.group"]),
    (_set("format.weights.bitz=3"), ["unknown key 'format.weights.bitz'", "did you mean 'bits'"]),
    (_set("bits=3"), ["unknown key 'bits'", "did you mean 'format.weights.bits'"]),
    (_set("moves.0.epochs=1"), ["'moves' has no entry 0"]),
    (_set("format.weights.bits=7"), ["format.weights.bits", "7"]),
    (_set("format.weights"), ["key=value"]),
    (_set("format.weights.solver=gtpq"), ["gtpq", "gptq"]),
    (_set("moves=[{move='low-rank'}]"), ["'low-rank'", "an option of 'tune': rank"]),
    (_set("moves=[{move='tune', epochs=0}]"), ["'tune'", "epochs", "0"]),
    (_set("moves=[{move='tune', epoch=1}]"), ["'tune'", "epoch", "did you mean 'epochs'"]),
    (_set("moves=[{move='distill', weights='fast'}]"), ["'distill'", "weights", "fast"]),
    (_set("moves=[{move='rotate', size=48}]"), ["'rotate'", "size", "48"]),
    (_set("moves=[{move='mean-shift', form='bias'}]"), ["'mean-shift'", "form", "bias"]),
    (_set("moves=[{move='mean-shift', form='linear', final=true}]"), ["'mean-shift'", "linear", "final"]),
    (_set("moves=[{move='rotate'}, {move='rotate', seed=1}]"), ["more than one move"]),
    (_set("moves=[{move='rotaet'}]"), ["'rotaet'", "unknown"]),
    (_set("format.activations.bits=5"), ["format.activations.bits", "5"]),
    (_set("format.kv={bits=4, mode='static'}"), ["format.kv", "symmetric=true"]),
    (_set("format.kv={bits=4, mode='static', symmetric=true, clip=0.9}"), ["format.kv.clip", "searched"]),
    (_set("format.kv.bits=5"), ["format.kv.bits", "5"]),
    (_set("format.head=4"), ["format.head=4", "one table"]),
    (["-r", "gptq-w5"], ["'gptq-w5'", "did you mean 'gptq-w4'"]),
    (["-r", "none.toml"], ["none.toml", "gptq-w4"]),
    (["--blocks", "0:5"], ["0:5", "0:4"]),
    (["--blocks", "2:2"], ["2:2"]),
    (["--blocks", "first"], ["A:B"]),
    (["--seqlen", "513"], ["513", "512"]),
    (["--windows", "100000000"], ["memory", "--windows"]),
    (["--windows", "100000"], ["windows of 32", "needed", "--windows"]),
    (["--seed", str(10**30)], ["--seed"]),
    (["--text", "missing.txt"], ["missing.txt is missing"]),
    (["--text", "/"], ["cannot be read"]),
    (["--text", "builtin:nothing"], ["builtin:pydoc"]),
    (["--system-prompt", "@none.txt"], ["--system-prompt @none.txt", "No such file"]),
]


@pytest.mark.parametrize(("args", "words"), BAD_ARGUMENTS, ids=lambda x: " ".join(x[:3]))
def test_bad_argument(model: Path, tmp_path: Path, args: list[str], words: list[str]) -> None:
    refused(Sordino("quantize", model, *GPTQ, *args, "-o", tmp_path / "out", log=tmp_path).wait(), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", ["is empty"]),
        ("blank.txt", b" \n\n ", ["is empty"]),
        ("short.txt", b"a few words", ["0 windows of 32"]),
        ("few.txt", b"0123456789abcdef" * 10, ["4 windows of 32", "20 are needed"]),
        ("latin.txt", b"caf\xe9", ["cannot be read"]),
        ("rows.jsonl", b'{"text": "a"}\n{"words": "b"}\n', ["line 2", "'text'"]),
        ("broken.jsonl", b'{"text": \n', ["line 1", "not JSON"]),
        ("no.gz", b"plain", ["cannot be read"]),
    ],
)
def test_bad_text(model: Path, tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    args = ("quantize", model, *GPTQ, "--text", tmp_path / name, "-o", tmp_path / "out")
    refused(Sordino(*args, log=tmp_path / "log").wait(), name if len(words) == 1 and "windows" not in words[0] else "", *words)
    assert not (tmp_path / "out").exists()


# OUT


@pytest.fixture
def disk() -> Iterator[Callable[..., Path | None]]:
    """Mounts a small file system with given options; gives None where mounting is not permitted."""
    made: list[Path] = []

    def mount(folder: Path, options: str) -> Path | None:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", str(folder)], check=True)


def test_read_only_out(model: Path, tmp_path: Path, disk: Callable[..., Path | None]) -> None:
    parent = disk(tmp_path / "disk", "ro")
    if parent is None:  # permissions do the same, except to root, who is left with /proc
        parent = tmp_path / "disk" if os.geteuid() else Path("/proc/self")
        if os.geteuid():
            parent.chmod(0o500)
    refused(Sordino("quantize", model, *GPTQ, "-o", parent / "out", log=tmp_path / "log").wait(), str(parent))
    assert not (parent / "out").exists()


@pytest.mark.parametrize("place", ["/proc/none/out", "file", "file/out"])
def test_impossible_out(model: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    refused(Sordino("quantize", model, *GPTQ, "-o", tmp_path / place, log=tmp_path / "log").wait(), place)
    assert (tmp_path / "file").read_text() == "mine"


# Short windows make the streams the smallest files, then come the blocks, then the shard.
SHORT = ("-r", "gptq-w4", "--windows", "4", "--seqlen", "8", "--set", "guard=off", *TEXT)
# The file that finds no room: when files may have so many bytes, and when the disk may have so many files.
FULL = {"state": (200, 3), "stream": (5_000, 5), "block": (15_000, 8), "shard": (60_000, 12), "config": (60_000, 20)}
FULL |= {"run": (200, 21), "report": (200, 22)}


@pytest.mark.parametrize("name", ["state", "stream", "block", "shard"])
def test_no_room_for_a_file(model: Path, tmp_path: Path, name: str) -> None:
    """RLIMIT_FSIZE makes real writes fail, anywhere; with room again, the same command goes on."""
    out = tmp_path / "out"
    args = ("quantize", model, *SHORT, "-o", out)
    refused(Sordino(*args, log=tmp_path, file_limit=FULL[name][0]).wait(), f"cannot write to {out}", "File too large")
    no_checkpoint(out)
    found = {p.name for p in out.rglob("*") if p.is_file()}
    assert ("state.json" in found) == (name != "state")
    assert ("00000.safetensors" in found) == (name == "shard")
    assert Sordino(*args, log=tmp_path).wait().code == 0
    assert (out / "config.json").is_file() and not (out / ".sordino-work").exists()


@pytest.mark.parametrize("name", FULL)
def test_disk_full(model: Path, tmp_path: Path, disk: Callable[..., Path | None], name: str) -> None:
    """A disk that has room for the bytes but not for the files, so that the preflight lets it pass."""
    limit, files = FULL[name]
    mounted = disk(tmp_path / "disk", f"size=64m,nr_inodes={files}")
    out = tmp_path / "disk" / "out"
    args = ("quantize", model, *SHORT, "-o", out)
    done = Sordino(*args, log=tmp_path / "log", file_limit=None if mounted else limit).wait()
    refused(done, f"cannot write to {out}", "No space left" if mounted else "File too large")
    no_checkpoint(out)


def test_no_room_by_preflight(model: Path, tmp_path: Path, disk: Callable[..., Path | None]) -> None:
    parent = disk(tmp_path / "disk", "size=100k") or Path("/proc")
    refused(Sordino("quantize", model, *GPTQ, "-o", parent / "out", log=tmp_path / "log").wait(), "disk", str(parent))
    assert not (parent / "out").exists()


def test_out_of_somebody_else(model: Path, tmp_path: Path) -> None:
    """Neither another model nor other files are touched, even with --fresh."""
    others = shutil.copytree(model, tmp_path / "model")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "README.md").write_text("mine")
    for out, word in ((others, "did not write"), (notes, "not empty")):
        before = {p.name: p.read_bytes() for p in out.iterdir()}
        for more in ([], ["--fresh"]):
            refused(Sordino("quantize", model, *GPTQ, *more, "-o", out, log=tmp_path / "log").wait(), word)
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize("args", [["--seed", "1"], ["--windows", "5"], ["--blocks", "0:2"], ["--text", "builtin:docstrings"]])
def test_out_of_another_run(model: Path, checkpoint: Path, tmp_path: Path, args: list[str]) -> None:
    before = {p.name: p.read_bytes() for p in checkpoint.iterdir()}
    refused(Sordino("quantize", model, *GPTQ, *args, "-o", checkpoint, log=tmp_path).wait(), "another run", "--fresh")
    assert {p.name: p.read_bytes() for p in checkpoint.iterdir()} == before


def test_fresh_removes_nothing_before_the_input_is_good(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    before = {p.name: p.read_bytes() for p in checkpoint.iterdir()}
    (tmp_path / "short.txt").write_text("a few words")
    for args in (
        ["--blocks", "0:9"],
        ["--text", "none.txt"],
        ["--system-prompt", "@none.txt"],
        ["--text", tmp_path / "short.txt"],
        ["--set", "format.kv.mode=static", "--set", "format.kv.bits=4"],
    ):
        refused(Sordino("quantize", model, *GPTQ, *args, "--fresh", "-o", checkpoint, log=tmp_path / "log").wait())
    assert {p.name: p.read_bytes() for p in checkpoint.iterdir()} == before


def test_unreadable_manifest(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(checkpoint, tmp_path / "out"))
    (out / "sordino.json").write_text("{")
    refused(Sordino("quantize", model, *GPTQ, "-o", out, log=tmp_path).wait(), "sordino.json cannot be read")


# The other commands

BROKEN_CHECKPOINTS = {
    "truncated": (truncate, ["cannot be loaded"]),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ["model.safetensors"]),
    "no config": (lambda m: (m / "config.json").unlink(), ["no config.json"]),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), ["tokenizer"]),
    "a scale is missing": (edit_tensor(UP.format(1) + "_scale", lambda _: None), [f"lacks tensor '{UP.format(1)}_scale'"]),
    "a norm is missing": (edit_tensor("model.norm.weight", lambda _: None), ["lacks tensor 'model.norm.weight'"]),
    "newer format": (edit_config(quantization_config={"quant_method": "sordino", "format_version": 99}), ["99", "newer"]),
    "keys of no bits": (
        edit_config(quantization_config={"quant_method": "sordino", "kv": {"bits": 0, "symmetric": False, "static": False}}),
        ["quantization_config.kv.bits"],
    ),
    "groups that do not divide": (
        edit_config(
            quantization_config={
                "quant_method": "sordino",
                "groups": [{"bits": 4, "group": 48, "symmetric": False, "modules": ["*.q_proj"]}],
            }
        ),
        ["groups of 48", "q_proj"],
    ),
    "quantized by a list": (edit_config(quantization_config=["sordino"]), ["cannot be loaded"]),
}


@pytest.mark.parametrize("name", BROKEN_CHECKPOINTS)
@pytest.mark.parametrize(
    "command", [["eval", "--windows", "1", "--seqlen", "16", *TEXT], ["generate", "--prompt", "a"]], ids=lambda c: c[0]
)
def test_broken_checkpoint(checkpoint: Path, tmp_path: Path, name: str, command: list[str]) -> None:
    spoil, words = BROKEN_CHECKPOINTS[name]
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    spoil(broken)
    refused(Sordino(command[0], broken, *command[1:], log=tmp_path).wait(), *words)


ON_CHECKPOINT = [
    (["eval", "--text", "missing.txt"], ["missing.txt is missing"]),
    (["eval", "--seqlen", "100000000", *TEXT], ["less than one window"]),
    (["eval", "--dtype", "int8"], ["int8", "float32"]),
    (["eval", "--seqlen", "16", "--windows", "1", *TEXT, "--against", "nothing"], ["no model 'nothing'"]),
    (["eval", "--seqlen", "16", "--windows", "1", *TEXT, "--json", "/proc/none/figures.json"], ["/proc/none/figures.json"]),
    (["eval", "--seqlen", "16", "--windows", "1", *TEXT, "--json", "/dev/full"], ["/dev/full", "No space left"]),
    (["compare", "--seqlen", "16", "--windows", "1", *TEXT, "--csv", "/proc/none.csv"], ["/proc/none.csv"]),
    (["compare", "nothing", "--seqlen", "16", "--windows", "1", *TEXT], ["no model 'nothing'"]),
    (["generate", "--prompt", ""], ["prompt is empty"]),
    (["doctor", "-r", "gptq-w4"], ["already quantized"]),
]


@pytest.mark.parametrize(("args", "words"), ON_CHECKPOINT, ids=lambda x: " ".join(x[:3]))
def test_other_commands_on_a_checkpoint(checkpoint: Path, tmp_path: Path, args: list[str], words: list[str]) -> None:
    refused(Sordino(args[0], checkpoint, *args[1:], log=tmp_path).wait(), *words)


ON_MODEL = [
    (["doctor", "-r", "gptq-w5"], ["did you mean 'gptq-w4'"]),
    (["doctor", "-r", "gptq-w4", "--set", "format.weights.group=48"], ["48"]),
    (["doctor", "-r", "gptq-w4", "--set", "format.head=8"], ["one table"]),
    (["doctor", "-r", "gptq-w4", "--for", "nothing"], ["vllm"]),
    (["doctor", "-r", "gptq-w4", "--system-prompt", " "], ["empty"]),
    (
        ["doctor", "-r", "gptq-w4", "--for", "vllm", "--system-prompt", "Be brief.", "--set", "calibration.seqlen=64"],
        ["vllm", "--system-prompt"],
    ),
    (
        ["doctor", "-r", "atom-w4a4", "--for", "vllm", "--set", "format.activations.bits=16", "--set", "format.kv.bits=16"],
        ["vllm", "channels"],
    ),
    (["doctor", "-r", "d2quant-w3", "--for", "gguf"], ["additive", "d2quant-paper-w3"]),
    (["doctor", "-r", "d2quant-paper-w3", "--for", "vllm"], ["mean-shift", "form"]),
    (["doctor", "-r", "gptq-w4", "--for", "vllm", "--set", "moves=[{move='rotate'}]"], ["vllm", "rotate"]),
    (["doctor", "-r", "gptq-w4", "--for", "gguf", "--set", "format.weights.group=16"], ["gguf", "group 16"]),
    (["doctor", "-r", "gptq-w4", "--for", "vllm", "--set", "format.embeddings=8"], ["vllm", "--set format.embeddings=16"]),
]


def test_doctor_misses_the_tokenizer(model: Path, tmp_path: Path) -> None:
    """Where the run would; a recipe that reads no text needs none."""
    bare = Path(shutil.copytree(model, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    refused(Sordino("doctor", bare, "-r", "gptq-w4", log=tmp_path).wait(), "no tokenizer")
    assert Sordino("doctor", bare, "-r", "rtn-w4", log=tmp_path).wait().code == 0


@pytest.mark.parametrize(("args", "words"), ON_MODEL, ids=lambda x: " ".join(x[:3]))
def test_other_commands_on_a_model(model: Path, tmp_path: Path, args: list[str], words: list[str]) -> None:
    refused(Sordino(args[0], model, *args[1:], log=tmp_path).wait(), *words)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["quantize", "nothing", *GPTQ, "-o", "OUT"], ["no model 'nothing'"]),
        (["quantize", "MODEL", *GPTQ, "-o", "OUT", "--set", "format.weights.group=48"], ["48"]),
        (["quantize", "MODEL", *GPTQ, "-o", "/proc/none/out"], ["/proc/none/out"]),
        (["eval", "OUT"], ["no model"]),
    ],
    ids=lambda x: " ".join(x[:2]),
)
def test_started_from_scratch(model: Path, tmp_path: Path, args: list[str], words: list[str]) -> None:
    """The same in an ordinary process of the interpreter, as the installed command starts it."""
    given = [{"MODEL": str(model), "OUT": str(tmp_path / "out")}.get(a, a) for a in args]
    command = [sys.executable, "-c", "from sordino_cli import main; main()", *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    refused(Done(done.returncode, done.stdout, done.stderr), *words)
    no_checkpoint(tmp_path / "out")
