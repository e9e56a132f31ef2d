"""What this machine multiplies fast."""

from __future__ import annotations

from functools import cache

import torch


@cache
def multiplies_bf16() -> bool:
    """Whether the CPU has products of bf16 (AVX-512 and later); without them torch takes ten times fp32's time, or far more."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fast(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which the CPU multiplies numbers of some dtype: its own, or fp32."""
    return dtype if dtype == torch.bfloat16 and multiplies_bf16() else torch.float32
