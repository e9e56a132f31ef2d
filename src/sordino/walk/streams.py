"""Streams: the hidden states that pass from block to block, memory-mapped in the work folder.

A stream on disk is what makes resume exact: the next block starts from the same bytes whether or not the process is the
same. Shapes: N windows, L tokens, D hidden size.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from sordino.errors import InputError


def create_stream(path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Make a stream file and map it.

    The space is reserved first: writing to a mapped file on a full disk would kill the process without a word.

    Returns:
        Writable tensor [N, L, D] backed by the file.

    Raises:
        OSError: if there is no space.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    size = shape[0] * shape[1] * shape[2] * dtype.itemsize
    with open(path, "wb") as f:
        os.posix_fallocate(f.fileno(), 0, size)
    return open_stream(path, shape, dtype)


def open_stream(path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Map an existing stream file, [N, L, D].

    Raises:
        InputError: if it is missing or of another size; torch would fill it up with zeros.
    """
    n = shape[0] * shape[1] * shape[2]
    if not path.is_file() or path.stat().st_size != n * dtype.itemsize:
        raise InputError(f"{path} is missing or damaged; use --fresh to start over")
    return torch.from_file(str(path), shared=True, size=n, dtype=dtype).view(shape)
