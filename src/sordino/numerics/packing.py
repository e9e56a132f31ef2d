"""Bit packing: unsigned codes as one dense little-endian bit stream along the last dimension.

Code ``i`` of a row occupies bits ``i*b … i*b+b-1`` of the row's stream, lowest bit first; rows are padded with zero
bits to whole 32-bit words. This is the ``weight_packed`` layout of compressed-tensors >= 0.18 and, transposed, that of
GPTQ's ``qweight``, so one packer serves every export. Shapes: R rows, N codes a row, b bits, W = ceil(N*b/32) words.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32


def packed_words(n: int, bits: int) -> int:
    """Number of 32-bit words that hold ``n`` codes of ``bits`` bits."""
    return -(-n * bits // WORD_BITS)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into words.

    Args:
        codes: uint8 [R, N], every value below ``2**bits``.
        bits: 1 to 8.

    Returns:
        int32 [R, W].

    Raises:
        ValueError: if a code does not fit.

    Example:
        >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4)
        tensor([[801]], dtype=torch.int32)
    """
    rows, n = codes.shape
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit into {bits} bits")
    # Eight codes fill exactly `bits` bytes, so the stream is built from such units.
    units = -(-n // 8)
    padded = torch.zeros(rows, units * 8, dtype=torch.int64)
    padded[:, :n] = codes
    shifts = torch.arange(8, dtype=torch.int64) * bits
    unit = (padded.view(rows, units, 8) << shifts).sum(-1)  # disjoint bits: the sum is an or; 8 bits may set the sign
    byte = (unit[..., None] >> (8 * torch.arange(bits, dtype=torch.int64))) & 0xFF
    out = torch.zeros(rows, packed_words(n, bits) * 4, dtype=torch.uint8)
    used = min(out.shape[1], units * bits)
    out[:, :used] = byte.view(rows, units * bits)[:, :used].to(torch.uint8)
    return out.view(torch.int32)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Invert :func:`pack`.

    Args:
        packed: int32 [R, W], contiguous.
        bits: width of a code.
        n: number of codes a row, N.

    Returns:
        uint8 [R, N].
    """
    rows = packed.shape[0]
    stream = packed.view(torch.uint8)
    if bits == 8:
        return stream[:, :n]
    if 8 % bits == 0:  # whole codes in a byte: plain shifts of bytes, the fastest path
        per_byte = 8 // bits
        out = torch.empty(rows, stream.shape[1], per_byte, dtype=torch.uint8, device=packed.device)
        for i in range(per_byte):
            torch.bitwise_and(stream >> (i * bits), (1 << bits) - 1, out=out[..., i])
        return out.view(rows, -1)[:, :n]
    units = -(-n // 8)
    missing = units * bits - stream.shape[1]
    if missing > 0:
        stream = torch.nn.functional.pad(stream, (0, missing))
    byte = stream[:, : units * bits].reshape(rows, units, bits)
    wide = torch.int32 if bits < 4 else torch.int64
    unit = byte[..., 0].to(wide)
    for i in range(1, bits):
        unit |= byte[..., i].to(wide) << (8 * i)
    out = torch.empty(rows, units, 8, dtype=torch.uint8, device=packed.device)
    for i in range(8):
        out[..., i] = (unit >> (i * bits)) & ((1 << bits) - 1)
    return out.view(rows, -1)[:, :n]
