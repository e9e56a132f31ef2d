"""The work folder: finished blocks, streams and a state file, so that a killed run goes on where it stopped.

Everything lands under a temporary name and is renamed when complete; ``state.json`` is renamed last. What it does not
mention does not count and is written again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sordino.errors import InputError
from sordino.rounding import Rounded
from sordino.runtime.modules import ORDER, SCALE, pack_kept, pack_linear
from sordino.walk.streams import create_stream, open_stream

WORK = ".sordino-work"


class Work:
    """A run's work folder under OUT.

    Attributes:
        path: the folder.
        state: what ``state.json`` says; ``done`` is the number of finished blocks.
    """

    def __init__(self, out: Path, fingerprint: dict[str, Any], cpu: float | None = None):
        """``cpu`` is what :func:`time.process_time` said when the run began; now if not given."""
        self.path = out / WORK
        self.fingerprint = fingerprint
        self.state: dict[str, Any] = {"fingerprint": fingerprint, "done": 0, "reports": [], "seconds": 0.0}
        file = self.path / "state.json"
        if file.is_file():
            found = _read_state(file)
            if found["fingerprint"] != fingerprint:
                raise InputError(
                    f"{out} holds another unfinished run ({_difference(found['fingerprint'], fingerprint)}); "
                    "use --fresh to start over, or another folder"
                )
            self.state = found
        self._started = time.time() - float(self.state["seconds"])
        self._cpu = (time.process_time() if cpu is None else cpu) - float(self.state.get("cpu_seconds", 0.0))

    @property
    def done(self) -> int:
        """Number of finished blocks."""
        return int(self.state["done"])

    @property
    def seconds(self) -> float:
        """Time spent on this run so far; of a killed process, what it had saved."""
        return time.time() - self._started

    @property
    def cpu_seconds(self) -> float:
        """CPU time of it, likewise."""
        return time.process_time() - self._cpu

    def save(self, **changes: Any) -> None:
        """Update the state file, atomically."""
        self.state |= changes | {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        write_text(self.path / "state.json", json.dumps(self.state, indent=1))

    def create(self, name: str, index: int, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """A new stream file: what enters block ``index``."""
        return create_stream(self._stream(name, index), shape, dtype)

    def open(self, name: str, index: int, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """An existing stream."""
        return open_stream(self._stream(name, index), shape, dtype)

    def drop_streams(self, before: int) -> None:
        """Remove streams that no later block starts from."""
        for file in (self.path / "streams").glob("*.bin"):
            if int(file.stem.rpartition("-")[2]) < before:
                file.unlink()

    def save_block(self, index: int, tensors: dict[str, Tensor], finished: bool = False) -> None:
        """Store a block's tensors, atomically; those of the finish stage beside the others."""
        write_tensors(self.path / ("finished" if finished else "blocks") / f"{index:05d}.safetensors", tensors)

    def save_latents(self, index: int, solved: dict[str, Rounded]) -> None:
        """Store what was rounded in a block, in bf16: how near each code is to its neighbour."""
        latents = {name: r.latent.bfloat16() for name, r in solved.items() if r.latent is not None}
        write_tensors(self.path / "latents" / f"{index:05d}.safetensors", latents)

    def load_latents(self, index: int) -> dict[str, Tensor]:
        """Read :meth:`save_latents` back, if there is something."""
        return _if_there(self.path / "latents" / f"{index:05d}.safetensors")

    def save_prefix(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Store what a block makes of the prefix."""
        write_tensors(self.path / "prefix" / f"{index:05d}.safetensors", tensors)

    def load_prefix(self, index: int) -> dict[str, Tensor]:
        """Read :meth:`save_prefix` back, if there is something."""
        return _if_there(self.path / "prefix" / f"{index:05d}.safetensors")

    def save_final_norm(self, tensors: dict[str, Tensor]) -> None:
        """Store what the last block's moves gave the final norm."""
        write_tensors(self.path / "norm.safetensors", tensors)

    def load_final_norm(self) -> dict[str, Tensor]:
        """Read :meth:`save_final_norm` back, if there is something."""
        return _if_there(self.path / "norm.safetensors")

    def save_learned(self, move: str, tensors: dict[str, Tensor]) -> None:
        """Store what a move learned before the walk."""
        write_tensors(self.path / "learned" / f"{move}.safetensors", tensors)

    def load_learned(self, move: str) -> dict[str, Tensor]:
        """Read :meth:`save_learned` back.

        Raises:
            InputError: if it is missing or damaged.
        """
        return _load(self.path / "learned" / f"{move}.safetensors")

    def save_ends(self, tensors: dict[str, Tensor]) -> None:
        """Store what the finish stage left around the blocks."""
        write_tensors(self.path / "finished" / "ends.safetensors", tensors)

    def load_ends(self) -> dict[str, Tensor]:
        """Read :meth:`save_ends` back; None of it if there was no finish stage."""
        return _load(self.path / "finished" / "ends.safetensors") if self.finished is not None else {}

    @property
    def finished(self) -> dict[str, Any] | None:
        """What the finish stage reported, once it is complete."""
        found: dict[str, Any] | None = self.state.get("finished")
        return found

    def load_block(self, index: int) -> dict[str, Tensor]:
        """Read a stored block back.

        Raises:
            InputError: if it is missing or damaged.
        """
        return _load(self.block_file(index))

    def block_file(self, index: int) -> Path:
        """Where the latest generation of a block is stored."""
        name = f"{index:05d}.safetensors"
        latest = self.path / "finished" / name
        return latest if self.finished is not None and latest.is_file() else self.path / "blocks" / name

    def left_alone(self, index: int, span: tuple[int, int]) -> bool:
        """Whether a block is the source's own: outside the range that was rounded, and not changed by other means."""
        return not span[0] <= index < span[1] and not self.block_file(index).is_file()

    def remove(self) -> None:
        """Remove the folder, the state first: without it the rest does not count."""
        (self.path / "state.json").unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def _stream(self, name: str, index: int) -> Path:
        return self.path / "streams" / f"{name}-{index:05d}.bin"


@contextmanager
def claim(out: Path) -> Iterator[None]:
    """Make ``out`` and keep other runs out of it; the kernel lets go of it when this process ends, however it ends.

    Raises:
        InputError: if another process is at work there.
    """
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is at work in {out}; wait for it, or choose another folder") from None
        except OSError:
            pass  # a file system that knows no locks
        yield
    finally:
        os.close(handle)


def pack_block(block: nn.Module, solved: dict[str, Rounded], dtype: torch.dtype) -> dict[str, Tensor]:
    """A block's tensors as they are stored: rounded linears packed, everything else in the model's dtype."""
    as_is = (f".{SCALE}", f".{ORDER}")
    tensors = {k: v.detach() if k.endswith(as_is) else v.detach().to(dtype) for k, v in block.state_dict().items()}
    for linear, r in solved.items():
        del tensors[f"{linear}.weight"]
        packed = pack_linear(r.codes, r.scale, r.zero, r.bits, r.symmetric) | (pack_kept(r.kept) if r.kept else {})
        if r.column is not None:
            packed["column_scale"] = r.column.to(torch.bfloat16)
        if r.side is not None:
            packed |= {"side_a": r.side.a.to(torch.bfloat16), "side_b": r.side.b.to(torch.bfloat16)}
        tensors |= {f"{linear}.{k}": v for k, v in packed.items()}
    return tensors


def write_text(path: Path, text: str) -> None:
    """Write a small file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"format": "pt"})
    temporary.replace(path)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError):
        raise InputError(f"{file} is missing or damaged; use --fresh to start over") from None


def _if_there(file: Path) -> dict[str, Tensor]:
    return _load(file) if file.is_file() else {}


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        known = {k: state[k] for k in ("fingerprint", "done", "reports", "seconds")}
        return known | {k: state[k] for k in ("learned", "finished", "spent") if k in state}
    except (ValueError, KeyError, TypeError, OSError):
        raise InputError(f"{file} is damaged; use --fresh to start over") from None


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    changed = [k for k in new if old.get(k) != new[k]]
    return "other " + ", ".join(changed) if changed else "other settings"
