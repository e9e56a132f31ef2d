"""Checks that modules on packed codes compute what the same modules on dequantized weights compute."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sordino
from draws import normal
from sordino.numerics.affine import AffineGrid
from sordino.numerics.packing import packed_words
from sordino.recipe import load_recipe
from sordino.round.rtn import RtnSolver
from sordino.rounding import Rounded
from sordino.runtime import kernels, modules
from sordino.runtime.modules import QuantEmbedding, QuantLinear, TiedHead, pack_linear
from tiny import make_tiny

both = pytest.mark.parametrize("symmetric", [False, True])
every_width = pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
shapes = pytest.mark.parametrize(("cols", "group"), [(172, 172), (172, 43), (64, 16), (40, 8), (7, 7)])
ROWS = 45


def rounded_linear(cols: int, bits: int, group: int, symmetric: bool, bias: bool = False) -> tuple[QuantLinear, Rounded]:
    rounded = RtnSolver().solve(normal(ROWS, cols, seed=bits), None, AffineGrid(bits, symmetric), group)
    module = QuantLinear(cols, ROWS, bias, bits, group, symmetric)
    state = pack_linear(rounded.codes, rounded.scale, rounded.zero, bits, symmetric)
    module.load_state_dict(state | ({"bias": normal(ROWS, seed=9)} if bias else {}))  # strict: names and shapes agree
    return module, rounded


@both
@every_width
@shapes
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_that_of_the_dequantized_weight(cols: int, group: int, bits: int, symmetric: bool, bias: bool) -> None:
    """On torch's path to the last bit; the kernels sum in another order, see test_kernels.py."""
    module, rounded = rounded_linear(cols, bits, group, symmetric, bias)
    x = normal(2, 3, cols, seed=1)
    with kernels.using("off"):
        wide = module(x)
    assert torch.equal(wide, F.linear(x, rounded.values(), module.bias))
    x, b = x.bfloat16(), None if module.bias is None else module.bias.bfloat16()
    with kernels.using("off"):
        out = module(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, F.linear(x, rounded.values().bfloat16(), b))


@both
@every_width
@shapes
def test_dequantize_is_exact(cols: int, group: int, bits: int, symmetric: bool) -> None:
    module, rounded = rounded_linear(cols, bits, group, symmetric)
    values = rounded.values()
    assert torch.equal(module.codes(), rounded.codes)
    assert torch.equal(module.zeros().float(), rounded.zero)
    assert torch.equal(module.dequantize(torch.float32), values)
    # Rounded once, although computed in bf16 from the start.
    assert torch.equal(module.dequantize(torch.bfloat16), values.bfloat16())
    assert torch.equal(module.dequantize(torch.bfloat16, slice(11, 30)), values[11:30].bfloat16())


@both
def test_dequantize_is_exact_for_every_code_and_zero(symmetric: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    zero = torch.full((256, 1), 128.0) if symmetric else torch.arange(256.0)[:, None]
    scale = normal(256, 1).exp().bfloat16().float()
    module = QuantLinear(256, 256, False, 8, 256, symmetric)
    module.load_state_dict(pack_linear(codes, scale, zero, 8, symmetric))
    assert torch.equal(module.dequantize(torch.bfloat16), ((codes.double() - zero) * scale).bfloat16())


@both
@every_width
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tile", [1, 172 * 7, 172 * 44])
def test_tiles_equal_the_whole(bits: int, symmetric: bool, bias: bool, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = rounded_linear(172, bits, 43, symmetric, bias)
    x = normal(2, 3, 172, seed=1)
    whole, whole16 = module(x), module(x.bfloat16())
    monkeypatch.setattr(modules, "_TILE", tile)
    assert module(x).shape == whole.shape
    assert torch.allclose(module(x), whole, atol=1e-4)
    assert torch.allclose(module(x.bfloat16()).float(), whole16.float(), rtol=2e-2, atol=5e-2)


@both
@every_width
def test_buffers_have_the_documented_shapes(bits: int, symmetric: bool) -> None:
    module = QuantLinear(172, ROWS, False, bits, 43, symmetric)
    buffers = {name: (tuple(b.shape), b.dtype) for name, b in module.state_dict().items()}
    expected = {
        "weight_packed": ((ROWS, packed_words(172, bits)), torch.int32),
        "weight_scale": ((ROWS, 4), torch.bfloat16),
        "weight_zero_point": ((packed_words(ROWS, bits), 4), torch.int32),
    }
    if symmetric:
        del expected["weight_zero_point"]
    assert buffers == expected


def test_a_linear_shows_its_format() -> None:
    assert repr(QuantLinear(8, 4, False, 3, 8, True)) == "QuantLinear(8, 4, bits=3, group=8, symmetric)"


def table(dim: int, dtype: torch.dtype = torch.float32) -> tuple[QuantEmbedding, Tensor]:
    grid, w = AffineGrid(8, symmetric=True), normal(50, dim)
    rounded = RtnSolver().solve(w, None, grid, dim)
    module = QuantEmbedding(50, dim, dtype)
    module.load_state_dict(pack_linear(rounded.codes, rounded.scale, rounded.zero, 8, True))
    return module, rounded.values()


@pytest.mark.parametrize("dim", [5, 16, 172])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (9,), (2, 7)])
def test_embedding_is_that_of_the_dequantized_table(dim: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    module, values = table(dim, dtype)
    ids = torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(0))
    out = module(ids)
    assert out.dtype == dtype
    assert torch.equal(out, F.embedding(ids, values).to(dtype))


@pytest.mark.parametrize("dim", [5, 16, 172])
@pytest.mark.parametrize("tile", [1, 172 * 7, 1 << 22])
def test_tied_head_is_that_of_the_dequantized_table(dim: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "_TILE", tile)
    module, values = table(dim)
    head, x = TiedHead(module), normal(2, 3, dim, seed=1)
    expected = F.linear(x, values)
    assert torch.allclose(head(x), expected, atol=1e-4)
    out = head(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert float((out.float() - expected).norm() / expected.norm()) < 0.01


def test_tied_head_owns_nothing_and_follows_its_table() -> None:
    module, _ = table(16)
    head, x = TiedHead(module), normal(1, 16)
    assert not head.state_dict()
    assert not list(head.modules())[1:]
    before = head(x)
    module.weight_scale.mul_(2)
    assert torch.equal(head(x), before * 2)


def test_the_kernels_are_there_where_a_compiler_is() -> None:
    """Without this a build that failed in silence would only skip the kernels' own tests."""
    assert kernels.available() or not any(map(shutil.which, ("c++", "g++", "clang++")))


def test_a_table_of_codes_goes_along_when_a_model_is_cast() -> None:
    """To another dtype its rows come out as that, and what is stored stays as it is; to another device nothing changes."""
    table = QuantEmbedding(7, 16, torch.float32)
    table.weight_packed.random_(-(2**31), 2**31 - 1)
    table.weight_scale.fill_(0.37)
    ids = torch.arange(7)
    before, scale = table(ids), table.weight_scale.clone()
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        out = table.to(dtype)(ids)
        assert out.dtype == dtype and table.weight_scale.dtype == torch.bfloat16 and table.weight_packed.dtype == torch.int32
        torch.testing.assert_close(out.float(), before, rtol=1e-2, atol=0)
    assert torch.equal(table.to("cpu")(ids), before) and torch.equal(table.weight_scale, scale)


@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_checkpoint_can_be_cast(tied: bool, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", tied=tied)
    made = load_recipe("gptq-w4", ["format.embeddings=8", "guard=off"])
    sordino.quantize(str(model), made, tmp_path / "out", windows=8, seqlen=32, blocks=(1, 2))
    ids = torch.arange(2, 12)[None]
    loaded, cast = (sordino.load(tmp_path / "out", dtype=dtype)[0] for dtype in (torch.bfloat16, torch.float32))
    cast = cast.to(torch.bfloat16)
    with torch.no_grad():
        ours, theirs = cast(ids).logits, loaded(ids).logits
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert (ours - theirs).float().norm() <= 0.03 * theirs.float().norm()
