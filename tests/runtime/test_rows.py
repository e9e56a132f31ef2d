"""Rotations and packed rows by the kernels against torch's, on every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from levels import SEEDS, TYPES, every_level, examples, needs_kernels
from sordino.numerics.hadamard import rotation
from sordino.numerics.kv import KvGrid
from sordino.runtime import kernels
from sordino.runtime.kernels import library, rows
from sordino.runtime.modules import QuantLinear

pytestmark = needs_kernels


@every_level
@examples
@given(
    size=st.one_of(st.integers(1, 200), st.sampled_from([256, 576, 896, 1536, 4864])),
    count=st.integers(1, 20), dtype=TYPES, seed=SEEDS,
)  # fmt: skip
def test_rotations(level: str, size: int, count: int, dtype: torch.dtype, seed: int) -> None:
    x = torch.randn(count, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with kernels.using(level):
        ours = rows.turned(rotation(size), x)
    assert ours is not None and ours.dtype == dtype
    exact = x.double() @ rotation(size).matrix()
    step = torch.finfo(dtype).eps
    assert float((ours - exact).norm()) <= 4 * step * float(exact.norm()) + (1e-6 if dtype == torch.float32 else 0)


@every_level
@pytest.mark.parametrize("size", [1, 12, 64, 172, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_rotations(level: str, size: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(size)
    x, grad = (torch.randn(3, 5, size, generator=g).to(dtype) for _ in range(2))
    x.requires_grad_()
    with kernels.using(level):
        y = rows.rotate(rotation(size), x)
        y.backward(grad)
    exact = grad.double() @ rotation(size).matrix().T
    assert type(y.grad_fn).__name__ == "_TurnBackward" and x.grad is not None and x.grad.dtype == dtype
    assert float((x.grad - exact).norm()) <= 4 * torch.finfo(dtype).eps * float(exact.norm()) + 1e-6


@every_level
@examples
@given(
    bits=st.sampled_from([2, 3, 4, 8]), kind=st.sampled_from(["static", "symmetric", "asymmetric"]), size=st.integers(1, 130),
    tokens=st.integers(1, 70), place=st.integers(0, 5), dtype=TYPES, flags=st.tuples(st.booleans(), st.booleans()), seed=SEEDS,
)  # fmt: skip
def test_packed_rows_are_bit_equal(
    level: str,
    bits: int,
    kind: str,
    size: int,
    tokens: int,
    place: int,
    dtype: torch.dtype,
    flags: tuple[bool, bool],
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    grid = KvGrid(bits, kind != "asymmetric", kind == "static")
    x = (torch.randn(2, 3, tokens, size, generator=g) * torch.randn(2, 3, tokens, 1, generator=g).exp()).to(dtype)
    share = torch.rand(3, generator=g) * 0.5 + 0.5
    half_scales, centered = flags
    share = share.bfloat16() if half_scales else share
    mean = torch.randn(3, size, generator=g).to(dtype) if centered else None
    room = torch.full((2, 3, place + tokens + 2, grid.row_bytes(size)), 255, dtype=torch.uint8)
    with kernels.using(level):
        assert rows.store(grid, share, mean, None, x, room, place)
        found = rows.load(grid, share, room, place + tokens, size, dtype)
    packed = grid.pack(x if mean is None else x - mean[:, None], share)
    assert torch.equal(room[:, :, place : place + tokens], packed)
    assert bool((room[:, :, :place] == 255).all()) and bool((room[:, :, place + tokens :] == 255).all())
    assert found is not None and torch.equal(found[:, :, place:], grid.unpack(packed, share, size, dtype))


def test_rotated_rows_are_those_of_rotated_keys() -> None:
    grid, turn = KvGrid(4, False, False), rotation(64)
    x, share = torch.randn(1, 2, 5, 64), torch.ones(2)
    room = torch.zeros(1, 2, 8, grid.row_bytes(64), dtype=torch.uint8)
    mean = torch.randn(2, 64)
    for off in (None, mean):
        assert rows.store(grid, share, off, turn, x, room, 1)
        found = rows.load(grid, share, room, 6, 64, torch.float32)
        assert found is not None
        # A number at a tie may fall the other way: one step of its token's scale.
        exact = turn.apply(x if off is None else x - off[:, None])
        assert float((found[:, :, 1:] - grid.fake(exact, share)).abs().max()) <= 0.6
    for wrong in (mean.double(), mean[:, :63], torch.randn(64, 2).T):
        assert not rows.store(grid, share, wrong, turn, x, room, 1)


@every_level
@examples
@given(
    size=st.sampled_from([8, 64, 72, 128, 192]), group=st.sampled_from([1, 3, 7, 16]), bits=st.sampled_from([0, 2, 3, 4, 8]),
    kind=st.sampled_from(["static", "symmetric", "asymmetric"]), tokens=st.integers(1, 40),
    earlier=st.sampled_from([0, 1, 63, 64, 300]), prefix=st.sampled_from([0, 1, 2, 3, 300]), dtype=TYPES, padded=st.booleans(),
    seed=SEEDS,
)  # fmt: skip
def test_attention_over_rows(
    level: str,
    size: int,
    group: int,
    bits: int,
    kind: str,
    tokens: int,
    earlier: int,
    prefix: int,
    dtype: torch.dtype,
    padded: bool,
    seed: int,
) -> None:
    """Against sums in fp64, and to the bit against the last token, or the second text, alone."""
    g = torch.Generator().manual_seed(seed)
    heads, length = 2, earlier + tokens
    query = torch.randn(2, heads * group, tokens, size, generator=g).to(dtype)
    keys, values = (torch.randn(2, heads, length, size, generator=g).to(dtype) for _ in range(2))
    before = [torch.randn(1, heads, prefix, size, generator=g).to(dtype) for _ in range(2)]
    first = torch.randint(0, length, (2,), generator=g) if padded else None
    how = library.Block(heads=heads * group, key_heads=heads, size=size, scaling=size**-0.5, type=rows.TYPES[dtype])
    how.prefix, how.prefix_key, how.prefix_value = prefix, before[0].data_ptr(), before[1].data_ptr()
    packed = [keys, values]
    if bits:
        grid, share = KvGrid(bits, kind != "asymmetric", kind == "static"), torch.full((heads,), 0.5)
        packed = [grid.pack(x, share) for x in packed]
        keys, values = (grid.unpack(x, share, size, torch.float32) for x in packed)
        how.key = how.value = rows.format_of(grid, share)
    with kernels.using(level):
        found = rows.attend(how, query, packed[0], packed[1], length, first)
        last = rows.attend(how, query[:, :, -1:], packed[0], packed[1], length, first)
        begin = 0 if first is None else int(first[1])
        own = [x[1:, :, begin:].contiguous() for x in packed]
        seen = min(tokens, own[0].shape[2])
        alone = rows.attend(how, query[1:, :, tokens - seen :], *own, own[0].shape[2], None)
    assert found is not None and last is not None and alone is not None
    assert torch.equal(found[:, -1:], last) and torch.equal(found[1:, tokens - seen :], alone)
    k, v = (
        torch.cat([b.expand(2, -1, -1, -1), x], 2).double().repeat_interleave(group, 1)
        for b, x in zip(before, (keys, values), strict=True)
    )
    scores = query.double() @ k.mT * size**-0.5
    places = torch.arange(prefix + length) - prefix
    hidden = places > torch.arange(earlier, length)[:, None]
    begins = torch.zeros(2, dtype=torch.long) if first is None else first
    hidden = hidden | ((places >= 0) & (places < begins[:, None]))[:, None]
    scores = scores.masked_fill(hidden[:, None], -torch.inf)
    exact = (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2)
    assert float((found - exact).abs().max()) <= {torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]


def test_what_the_kernels_do_not_take_is_left_to_torch() -> None:
    x = torch.randn(2, 8)
    assert rows.turned(rotation(8), x.double()) is None
    assert rows.turned(rotation(8), x.requires_grad_(True)) is None
    with kernels.using("off"):
        assert rows.turned(rotation(8), x.detach()) is None
    share = torch.ones(1, dtype=torch.float64)
    assert not rows.store(
        KvGrid(4, True, True), share, None, None, x.detach()[None, None], torch.zeros(1, 1, 2, 4).to(torch.uint8), 0
    )


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_linears_of_one_input_share_its_codes_and_notice_a_change(mode: str) -> None:
    linears = [QuantLinear(32, 16, False, 4, 32, True, inputs={"bits": 4, "mode": mode}) for _ in range(2)]
    for linear in linears:
        linear.weight_packed.random_(generator=torch.Generator().manual_seed(0))
        linear.weight_scale.fill_(0.1)
        linear.get_buffer("input_scale").fill_(0.5)
    with torch.no_grad():
        x = torch.randn(40, 32)
        first, second = (linear(x) for linear in linears)
        assert torch.equal(first, second)
        x.mul_(-1.7)
        changed = linears[1](x)
        linears[0].get_buffer("input_scale").fill_(0.4)
        finer = linears[0](x)
        with kernels.using("off"):
            assert torch.equal(changed, linears[1](x)) and torch.equal(finer, linears[0](x))
    assert not torch.equal(changed, first) and not torch.equal(finer, changed)
