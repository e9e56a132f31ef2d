"""Checks bit packing against an independent bit stream built with numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sordino.numerics.packing import pack, packed_words, unpack

WIDTHS = range(1, 9)


def random_codes(rows: int, n: int, bits: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 1 << bits, (rows, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def oracle(codes: Tensor, bits: int) -> Tensor:
    """Model: every code as its bits, lowest first, the row padded with zero bits to whole little-endian words."""
    stream = (codes.numpy()[:, :, None] >> np.arange(bits)) & 1
    stream = stream.reshape(codes.shape[0], -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little").view("<i4").copy())


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 150), st.integers(0, 99))
def test_round_trip_and_layout(bits: int, rows: int, n: int, seed: int) -> None:
    codes = random_codes(rows, n, bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, packed_words(n, bits))
    assert packed.is_contiguous()
    assert torch.equal(packed, oracle(codes, bits))
    back = unpack(packed, bits, n)
    assert back.dtype == torch.uint8
    assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_largest_codes_survive(bits: int) -> None:
    codes = torch.full((3, 37), (1 << bits) - 1, dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits, 37), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_rows_do_not_share_words(bits: int) -> None:
    codes = random_codes(4, 29, bits)
    assert torch.equal(pack(codes, bits)[1:3], pack(codes[1:3], bits))


@pytest.mark.parametrize("bits", range(1, 8))
def test_refuses_codes_that_do_not_fit(bits: int) -> None:
    codes = torch.zeros(2, 5, dtype=torch.uint8)
    codes[1, 4] = 1 << bits
    with pytest.raises(ValueError, match=f"code {1 << bits} does not fit into {bits} bits"):
        pack(codes, bits)


def test_known_words() -> None:
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x321]]
    # Eleven 3-bit codes: the last one's top bit opens the second word.
    assert pack(torch.tensor([[0] * 10 + [7]], dtype=torch.uint8), 3).tolist() == [[-(1 << 30), 1]]


@pytest.mark.parametrize(("n", "bits", "words"), [(1, 1, 1), (32, 1, 1), (33, 1, 2), (172, 3, 17), (128, 4, 16), (5, 8, 2)])
def test_word_counts(n: int, bits: int, words: int) -> None:
    assert packed_words(n, bits) == words
