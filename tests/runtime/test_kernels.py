"""Every kernel against an exact reference, on every instruction set of this machine, and whole models with and without them."""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sordino
from draws import normal
from levels import LEVELS, SEEDS, TYPES, every_level, examples, needs_kernels
from sordino.errors import InputError
from sordino.numerics.packing import pack
from sordino.runtime import kernels
from sordino.runtime.kernels import library
from sordino.runtime.kernels import linear as native
from sordino.runtime.modules import QuantEmbedding, QuantLinear, TiedHead, pack_linear
from tiny import Sordino, make_tiny

pytestmark = needs_kernels

BITS = st.sampled_from([2, 3, 4, 5, 6, 8])
ROWS = st.integers(1, native.FEW_ROWS)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int]:
    """Inputs and group: odd sizes, groups that begin inside a byte, groups of many vector blocks, one group a row."""
    group = draw(st.one_of(st.integers(1, 40), st.sampled_from([8, 16, 43, 64, 72, 128, 130, 200])))
    return group * draw(st.integers(1, 20 if group < 64 else 4)), group


def make(
    shape: tuple[int, int], group: int, bits: int, symmetric: bool, seed: int, bias: bool = False, **options: Any
) -> QuantLinear:
    """A linear of random codes; scales are bf16 numbers of very different sizes."""
    g, (outputs, inputs) = torch.Generator().manual_seed(seed), shape
    module = QuantLinear(inputs, outputs, bias, bits, group, symmetric, **options)
    codes = torch.randint(0, 1 << bits, shape, generator=g, dtype=torch.uint8)
    scale = torch.randn(outputs, inputs // group, generator=g).exp().bfloat16().float()
    zero = torch.randint(0, 1 << bits, scale.shape, generator=g).float()
    module.load_state_dict(pack_linear(codes, scale, zero, bits, symmetric), strict=False)
    if module.bias is not None:
        module.bias.data.normal_(generator=g)
    return module


def check_product(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None = None) -> None:
    """Elementwise: what fp32 sums may lose, relative to the sum of magnitudes, and one rounding to the output's type.

    bf16 inputs may be written with 14 bits of the largest of their group (avx512.cpp). ``shift`` is what a zero point moves the
    weight by, [O, I]: weight and zero point are summed apart, so a weight of nothing may be the difference of two sums.
    """
    exact = x.double() @ weight.double().T
    parts = weight.double().abs() if shift is None else (weight - shift).double().abs() + shift.double().abs()
    size = x.double().abs() @ parts.T
    coarse = 2.0**-14 * x.double().abs().amax(1, keepdim=True) * weight.double().abs().sum(1)
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    step = 2.0**-8 if out.dtype == torch.bfloat16 else 2.0**-24
    allowed = 1e-6 * size + step * exact.abs() + (coarse if x.dtype == torch.bfloat16 else 0)
    assert ((out.double() - exact).abs() <= allowed + 1e-30).all()


@every_level
@given(
    layout=layouts(),
    outputs=st.integers(1, 70),
    bits=BITS,
    symmetric=st.booleans(),
    rows=ROWS,
    dtype=TYPES,
    bias=st.booleans(),
    seed=SEEDS,
)
@examples
def test_product(
    level: str,
    layout: tuple[int, int],
    outputs: int,
    bits: int,
    symmetric: bool,
    rows: int,
    dtype: torch.dtype,
    bias: bool,
    seed: int,
) -> None:
    module = make((outputs, layout[0]), layout[1], bits, symmetric, seed, bias)
    x = normal(rows, layout[0], seed=seed + 1).to(dtype)
    with kernels.using("off"):
        weight = module.dequantize(torch.float32)
    with kernels.using(level):
        out = native.product(module._native_weight(), x)
    assert out is not None and out.dtype == dtype
    shift = module.weight_scale.float() * ((1 << (bits - 1)) - module.zeros().float())
    check_product(out, x, weight, module.bias, shift.repeat_interleave(layout[1], 1))


@every_level
@given(layout=layouts(), outputs=st.integers(1, 70), bits=BITS, symmetric=st.booleans(), dtype=TYPES, seed=SEEDS)
@examples
def test_unpacked_weights_are_bit_equal(
    level: str, layout: tuple[int, int], outputs: int, bits: int, symmetric: bool, dtype: torch.dtype, seed: int
) -> None:
    module = make((outputs, layout[0]), layout[1], bits, symmetric, seed)
    rows = slice(outputs // 3, outputs)
    with kernels.using("off"):
        expected = module.dequantize(dtype, rows)
    with kernels.using(level):
        assert torch.equal(module.dequantize(dtype, rows), expected)


@every_level
@given(layout=layouts(), outputs=st.integers(1, 70), bits=st.integers(1, 4), rows=ROWS, dtype=TYPES, seed=SEEDS)
@examples
def test_additive_grids(
    level: str, layout: tuple[int, int], outputs: int, bits: int, rows: int, dtype: torch.dtype, seed: int
) -> None:
    """Values to the bit; products as near as sums of signed inputs, one for every scale, can be."""
    (inputs, group), g = layout, torch.Generator().manual_seed(seed)
    module = QuantLinear(inputs, outputs, False, bits, group, True, grid="additive")
    codes = torch.randint(0, 1 << bits, (outputs, inputs), generator=g, dtype=torch.uint8)
    scale = torch.randn(outputs, inputs // group, bits, generator=g).exp()
    module.load_state_dict({"weight_packed": pack(codes, bits), "weight_scale": scale.bfloat16()})
    x = normal(rows, inputs, seed=seed + 1).to(dtype)
    with kernels.using("off"):
        weight, expected = module.dequantize(torch.float32), module.dequantize(dtype)
    with kernels.using(level):
        out = native.product(module._native_weight(), x)
        assert torch.equal(module.dequantize(dtype), expected)
    assert out is not None and out.dtype == dtype
    exact, largest = x.double() @ weight.double().T, scale.bfloat16().double().sum(-1).repeat_interleave(group, 1)
    coarse = 2.0**-14 * x.double().abs().amax(1, keepdim=True) * largest.sum(1) if dtype == torch.bfloat16 else 0.0
    step = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24
    allowed = 1e-6 * 3 * x.double().abs() @ largest.T + step * exact.abs() + coarse
    assert ((out.double() - exact).abs() <= allowed + 1e-30).all()


@every_level
@given(
    inputs=st.integers(2, 700),
    outputs=st.integers(1, 70),
    bits=BITS,
    width=st.sampled_from([3, 4, 8]),
    rows=st.integers(1, 20),
    dtype=TYPES,
    static=st.booleans(),
    seed=SEEDS,
)
@examples
def test_integer_products_are_bit_equal(
    level: str, inputs: int, outputs: int, bits: int, width: int, rows: int, dtype: torch.dtype, static: bool, seed: int
) -> None:
    """Few rows and many, to the last bit. (One input is left out: `torch._int_mm` itself is wrong there.)"""
    rounding = {"bits": width, "mode": "static" if static else "dynamic"}
    module = make((outputs, inputs), inputs, bits, True, seed, True, inputs=rounding)
    x = normal(rows, inputs, seed=seed + 1).to(dtype)
    module.input_scale.fill_(2.5 / (1 << (width - 1)) if static else 0.8984375)
    with kernels.using("off"):
        expected = module(x)
    with kernels.using(level):
        assert torch.equal(module(x), expected)


@every_level
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_products_of_long_rows(level: str, bits: int, rows: int) -> None:
    """Rows of a weight that are far apart in memory are read one after another, several sums each."""
    inputs, groups = (64 * 77, (64, 64 * 7)) if rows == 2 else (5000, (8, 1000))  # odd blocks; a last one that is not full
    for group in (*groups, inputs):
        module, x = make((13, inputs), group, bits, True, group), normal(rows, inputs, seed=1).to(torch.bfloat16)
        with kernels.using("off"):
            weight = module.dequantize(torch.float32)
        with kernels.using(level):
            check_product(module(x), x, weight, None)
    module = make((13, inputs), inputs, bits, True, 1, True, inputs={"bits": 8, "mode": "static"})
    module.input_scale.fill_(0.03)
    with kernels.using("off"):
        expected = module(x)
    with kernels.using(level):
        assert torch.equal(module(x), expected)


@every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs, inputs, rows", [(500, 4100, 210), (129, 9000, 100), (1030, 1026, 97)])
def test_integer_products_that_do_not_fit_the_caches(
    level: str, outputs: int, inputs: int, rows: int, dtype: torch.dtype
) -> None:
    """Weights laid out in several rounds, rows shared among threads in pieces."""
    module = make((outputs, inputs), inputs, 4, True, 1, True, inputs={"bits": 8, "mode": "dynamic"})
    module.input_scale.fill_(0.9)
    x = normal(rows, inputs, seed=2).to(dtype)
    with kernels.using("off"):
        expected = module(x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with kernels.using(level):
                assert torch.equal(module(x), expected)
    finally:
        torch.set_num_threads(before)


@every_level
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [2, 20])
def test_largest_codes_do_not_overflow(level: str, bits: int, rows: int) -> None:
    module = make((3, 4096), 4096, bits, True, 0, inputs={"bits": 8, "mode": "static"})
    module.weight_packed.fill_(-1)
    module.weight_scale.fill_(1.0)
    module.input_scale.fill_(1.0)
    x = torch.full((rows, 4096), -1000.0)
    with kernels.using(level):
        assert torch.equal(module(x), torch.full((rows, 3), -128.0 * 4096 * ((1 << (bits - 1)) - 1)))


@every_level
@given(dim=st.integers(1, 300), vocabulary=st.integers(1, 90), rows=ROWS, dtype=TYPES, seed=SEEDS)
@settings(examples, max_examples=30)
def test_tied_head(level: str, dim: int, vocabulary: int, rows: int, dtype: torch.dtype, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (vocabulary, dim), generator=g, dtype=torch.uint8)
    scale = torch.rand(vocabulary, 1, generator=g).add(0.1).bfloat16().float()
    table = QuantEmbedding(vocabulary, dim, dtype)
    table.load_state_dict(pack_linear(codes, scale, torch.zeros_like(scale), 8, True))
    x = normal(rows, dim, seed=seed).to(dtype)
    with kernels.using(level):
        check_product(TiedHead(table)(x), x, (codes.double() - 128) * scale, None)


@every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_no_further_from_exact_than_torch(level: str, dtype: torch.dtype) -> None:
    """In bf16 torch rounds every weight before it multiplies; the kernels round the output alone."""
    module, x = make((300, 1024), 128, 4, False, 0, True), normal(2, 3, 1024, seed=1).to(dtype)
    assert module.bias is not None
    exact = x.double() @ module.dequantize(torch.float32).double().T + module.bias.double()
    error = {}
    for path in ("off", level):
        with kernels.using(path):
            out = module(x)
        assert out.shape == exact.shape and out.dtype == dtype
        error[path] = float((out - exact).norm() / exact.norm())
    assert error[level] < (2e-3 if dtype == torch.bfloat16 else 1e-6)
    assert error[level] < 1.05 * error["off"] + 1e-7


@every_level
@pytest.mark.parametrize("group", [16, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outliers_and_what_is_not_finite(level: str, group: int, dtype: torch.dtype) -> None:
    # Symmetric: a zero point makes a sum of which an outlier is part meet its like, in fp32.
    module, x = make((40, 512), group, 4, True, 0), normal(3, 512, seed=1).to(dtype)
    with kernels.using(level):
        x[0, 3] = 3e4
        check_product(module(x), x, module.dequantize(torch.float32), None)
        x[1, 5], x[2, 7] = torch.nan, torch.inf
        out = module(x)
    assert bool(torch.isfinite(out[0]).all()) and not bool(torch.isfinite(out[1:]).any())


@every_level
@pytest.mark.parametrize("inputs", [None, {"bits": 8, "mode": "dynamic"}])
def test_no_rows_and_wrong_widths(level: str, inputs: dict[str, Any] | None) -> None:
    module = make((40, 128), 128, 4, True, 0, inputs=inputs)
    with kernels.using(level):
        if inputs is None:
            assert module(torch.zeros(0, 128)).shape == (0, 40) and module(torch.zeros(2, 0, 128)).shape == (2, 0, 40)
        for x in (torch.ones(3, 256), torch.ones(12, 256), torch.ones(16, 64)):
            with pytest.raises(RuntimeError):
                module(x)


@every_level
@pytest.mark.parametrize("rows", [2, 20])
def test_a_bias_that_is_trained(level: str, rows: int) -> None:
    module = make((40, 128), 64, 4, False, 0, True)
    assert module.bias is not None
    module.bias.requires_grad_(True)
    with kernels.using(level):
        module(normal(rows, 128, seed=1)).sum().backward()
    assert module.bias.grad is not None and bool(module.bias.grad.eq(rows).all())


@pytest.fixture(params=["torch's OpenMP", "the pool"])
def runtime(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways to use several threads."""
    native, found = library.active(), library._openmp()
    assert native is not None and found is not None
    native.sordino_openmp(found if "OpenMP" in request.param else None)
    yield
    native.sordino_openmp(found)


@every_level
def test_any_number_of_threads_and_callers(level: str, runtime: None) -> None:
    module, x = make((3000, 512), 64, 4, False, 0), normal(4, 512, seed=1)
    before, wrong = torch.get_num_threads(), []

    def call(expected: Tensor) -> None:
        for _ in range(50):
            wrong.extend([1] if not torch.equal(module(x), expected) else [])

    try:
        with kernels.using(level):
            torch.set_num_threads(1)
            expected = module(x)
            for threads in (2, 5, 1, 3):
                torch.set_num_threads(threads)
                callers = [threading.Thread(target=call, args=(expected,)) for _ in range(3)]
                for caller in callers:
                    caller.start()
                for caller in callers:
                    caller.join()
    finally:
        torch.set_num_threads(before)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_threads_of_its_own(runtime: None) -> None:
    module, x = make((3000, 512), 64, 4, False, 0), normal(4, 512, seed=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        expected = module(x).tolist()
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(0 if module(x).tolist() == expected else 1)
        assert os.waitpid(child, 0)[1] == 0 and module(x).tolist() == expected
    finally:
        torch.set_num_threads(before)


def test_a_moved_or_changed_weight_is_noticed() -> None:
    module, other, x = make((20, 64), 16, 4, False, 0), make((20, 64), 16, 4, False, 1), normal(2, 64, seed=2)
    first, wanted = module(x), other(x)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), first)
    module.load_state_dict(other.state_dict())  # in place
    assert torch.equal(module(x), wanted)
    twin.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(twin(x), wanted)
    module.weight_scale = module.weight_scale.float()  # as model.to(torch.float32) does: torch takes over
    assert torch.allclose(module(x), wanted, rtol=1e-4, atol=1e-4)


def test_gradients_go_through_torch() -> None:
    module, x = make((20, 64), 16, 4, False, 0), normal(2, 64, seed=2).requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad[0], module.dequantize(torch.float32).sum(0), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    changes = ("format.embeddings=8", "format.weights.group=32")
    sordino.quantize(str(make_tiny(folder / "model", layers=2)), "rtn-w4", folder / "out", overrides=changes)
    return folder / "out"


def test_whole_model_with_and_without(checkpoint: Path, tmp_path: Path) -> None:
    model, _ = sordino.load(checkpoint)
    ids = torch.arange(2, 32)[None]
    with torch.no_grad(), kernels.using("off"):
        expected = model(ids).logits
        spoken = model.generate(ids[:, :5], max_new_tokens=8, do_sample=False)
    for level in LEVELS:
        with torch.no_grad(), kernels.using(level):
            assert torch.allclose(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
            assert torch.allclose(model(ids[:, :3]).logits, expected[:, :3], rtol=1e-4, atol=1e-4)
            assert torch.equal(model.generate(ids[:, :5], max_new_tokens=8, do_sample=False), spoken)
    model.save_pretrained(tmp_path)  # the packed buffers are still those of the checkpoint
    saved = sordino.load(checkpoint)[0].state_dict()
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())
    assert (tmp_path / "model.safetensors").is_file()


def test_environment_chooses(checkpoint: Path, tmp_path: Path) -> None:
    words = ("generate", checkpoint, "--prompt", "once", "--max-new-tokens", "6")
    runs = [Sordino(*words, log=tmp_path / v, env={library.VARIABLE: v}) for v in ("off", "portable")]
    off, portable = [run.wait() for run in runs]
    assert off.code == portable.code == 0 and off.out == portable.out
    model = checkpoint.parent / "model"
    off, wrong = [
        Sordino("doctor", model, "-r", "rtn-w4", log=tmp_path / "doctor" / v, env={library.VARIABLE: v}).wait()
        for v in ("off", "sse")
    ]
    assert "torch: the kernels are switched off" in off.out
    assert wrong.code == 2
    assert wrong.err == "sordino: SORDINO_KERNELS=sse: one of off, portable, avx2, avx512, amx\n"


def test_missing_instruction_sets_and_libraries_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library._State, "name", "off")
    monkeypatch.setattr(library._State, "library", None)
    monkeypatch.setattr(library, "available", lambda: ["portable"])
    with pytest.raises(InputError, match="this build or machine has portable"):
        library.choose("avx512")
    monkeypatch.setattr(library, "_load", lambda: None)
    monkeypatch.setattr(library, "available", list)
    assert library.choose(None) == "off" and "install a C++ compiler" in kernels.status()


def test_using_goes_back() -> None:
    before = kernels.status()
    with kernels.using("portable"):
        assert kernels.status() == "native, portable"
    assert kernels.status() == before
