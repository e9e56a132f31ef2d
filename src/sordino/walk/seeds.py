"""Random numbers that depend on a few words only, whatever ran before (DESIGN section 4, determinism)."""

from __future__ import annotations

import hashlib

import torch


def seeded(*words: object) -> torch.Generator:
    """A generator for these words: the seed of the run, the block or stage, the move."""
    digest = hashlib.sha256(" ".join(map(str, words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
