"""What modules ask of the kernels. Every function returns None where torch has to do it.

The kernels read the module's own buffers, in the layout of the checkpoint: nothing is repacked and nothing is copied.
Shapes: O = out_features, I = in_features, M rows of activations.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sordino.numerics.machine import fast
from sordino.runtime.kernels.library import Weight, active

# Up to so many rows the kernels multiply packed codes; for more, unpacking once and torch's matmul are faster.
FEW_ROWS = 8
LONGEST = 1 << 16  # inputs of an integer product of 8-bit codes whose sum surely fits 32 bits
MOST_PLANES = 4  # bits of an additive code
TYPES = {torch.float32: 0, torch.bfloat16: 1}


class Packed:
    """A module's weight in the kernels' words, made again whenever one of its tensors has moved."""

    def __init__(self, tensors: tuple[Tensor | None, ...], inputs: int, group: int, bits: int):
        codes, scale, _, bias = tensors
        assert codes is not None and scale is not None
        self.at = _addresses(tensors)
        self.held = [t.untyped_storage() for t in tensors if t is not None]  # so that no other tensor comes to lie there
        bias_type = 0 if bias is None else TYPES.get(bias.dtype, -1)
        shape = (scale.shape[0], inputs, group, bits)
        additive = scale.dim() == 3
        self.weight = Weight(*self.at, *shape, bias_type, additive)
        self.address = ctypes.addressof(self.weight)
        present = [t for t in tensors if t is not None]
        self.usable = (
            all(t.device.type == "cpu" and t.is_contiguous() for t in present)
            and scale.dtype == torch.bfloat16  # a cast of the whole model may have changed it
            and bias_type >= 0
            and not (additive and bits > MOST_PLANES)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # addresses mean nothing in a copy


def _addresses(tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    return tuple([0 if t is None else t.data_ptr() for t in tensors])


def packed(owner: Any, bias: Tensor | None, inputs: int, group: int, bits: int) -> Packed | None:
    """The packed weight of a module with the buffers of a QuantLinear, or None if the kernels cannot read it."""
    buffers = owner._buffers
    tensors = (buffers["weight_packed"], buffers["weight_scale"], buffers.get("weight_zero_point"), bias)
    known: Packed | None = owner.__dict__.get("_native")
    if traced():
        return None
    if tensors[0].device.type != "cpu":
        owner.__dict__.pop("_native", None)
        return None
    if known is None or known.at != _addresses(tensors):
        known = Packed(tensors, inputs, group, bits)
        owner.__dict__["_native"] = known
    return known if known.usable else None


def able(x: Tensor) -> bool:
    """Whether the kernels can take activations: on the CPU, of a known type, nothing to differentiate or to trace."""
    return _readable(x) and not traced()


def _readable(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in TYPES and not (x.requires_grad and torch.is_grad_enabled())


def traced() -> bool:
    """Whether operations are recorded, to be done later, or transformed: what the kernels do would be taken for constants."""
    return (
        torch.compiler.is_compiling()
        or bool(torch._C._get_tracing_state())
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _takes(weight: Packed, x: Tensor) -> bool:
    return _readable(x) and x.shape[-1:] == (weight.weight.inputs,)  # where operations are traced, there is no weight


def product(weight: Packed | None, x: Tensor) -> Tensor | None:
    """``x W^T + bias`` of few rows, [..., I] -> [..., O] in x's dtype, summed in fp32 and rounded once."""
    library = active()
    if library is None or weight is None or not _takes(weight, x):
        return None
    inputs, outputs = weight.weight.inputs, weight.weight.outputs
    rows = x.numel() // inputs
    if not 0 < rows <= FEW_ROWS:
        return None
    x = x.contiguous()
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device="cpu")
    library.sordino_product(weight.address, x.data_ptr(), TYPES[x.dtype], rows, out.data_ptr(), torch.get_num_threads())
    return out


class _Last:
    """Codes of the tensor rounded last: the linears of a site get the same one, one after another."""

    # Tensor, what its codes depend on, and they: replaced as a whole, since threads may share this.
    kept: tuple[weakref.ref[Tensor], tuple[Any, ...], tuple[Tensor, Tensor]] | None = None
    # A tensor that nobody writes to for now, and what tells this promise from others about it.
    unwritten: tuple[weakref.ref[Tensor], object] | None = None

    @classmethod
    def encode(cls, library: Any, x: Tensor, rows: int, bits: int, share: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes int8 [rows, I] and scales fp32 [rows] (static: [1]) of x, contiguous."""
        promise, key = cls.unwritten, (x.data_ptr(), rows, bits, share, None if scale is None else float(scale))
        state: object = None
        if promise is not None and promise[0]() is x:
            state = promise[1]
        elif not x.is_inference():  # a tensor of inference mode does not say whether it was written to
            state = x._version
        kept = cls.kept
        if state is not None and kept is not None and kept[0]() is x and kept[1] == (state, key):
            return kept[2]
        codes = torch.empty((rows, x.numel() // rows), dtype=torch.int8, device="cpu")
        scales = torch.empty(rows, dtype=torch.float32, device="cpu") if scale is None else scale
        library.sordino_encode(
            x.data_ptr(), TYPES[x.dtype], rows, codes.shape[1], bits, share, scales.data_ptr(), codes.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        if state is not None:
            cls.kept = weakref.ref(x, cls._forget), (state, key), (codes, scales)
        return codes, scales

    @classmethod
    def _forget(cls, gone: Any) -> None:
        if cls.kept is not None and cls.kept[0] is gone:
            cls.kept = None


@contextmanager
def unwritten(x: Tensor) -> Iterator[None]:
    """Promise that nobody writes to x in the body: linears that round it alike share its codes, in inference mode too."""
    _Last.unwritten = weakref.ref(x), object()
    try:
        yield
    finally:
        _Last.unwritten = None


def rounded_product(weight: Packed | None, x: Tensor, bits: int, clip: float, scale: Tensor | None) -> Tensor | None:
    """The product of rounded inputs and weights with one scale a row: [..., I] -> [..., O] in x's dtype, exact until scaled.

    Args:
        weight: symmetric, one group a row.
        x: activations.
        bits: of an input code.
        clip: share of a token's largest entry that the codes reach; only without ``scale``.
        scale: fp32 [1], static; None for one scale a token.
    """
    library = active()
    if library is None or weight is None or not _takes(weight, x) or x.numel() == 0 or weight.weight.inputs > LONGEST:
        return None
    if scale is not None and scale.dtype != torch.float32:
        scale = scale.float()
    rows, threads, kind = x.numel() // weight.weight.inputs, torch.get_num_threads(), TYPES[x.dtype]
    share = 0.0 if scale is not None else clip / ((1 << (bits - 1)) - 1)
    x = x.contiguous()
    out = torch.empty((*x.shape[:-1], weight.weight.outputs), dtype=x.dtype, device="cpu")
    if rows <= FEW_ROWS:
        fixed = None if scale is None else scale.data_ptr()
        library.sordino_rounded_product(
            weight.address, x.data_ptr(), kind, rows, bits, share, fixed, out.data_ptr(), threads
        )  # fmt: skip
        return out
    codes, scales = _Last.encode(library, x, rows, bits, share, scale)
    one_scale = int(scale is not None)
    done = library.sordino_many(
        weight.address, codes.data_ptr(), rows, scales.data_ptr(), one_scale, out.data_ptr(), kind, threads
    )  # fmt: skip
    if done == 0:
        return out
    for begin, end in tiles(weight.weight.outputs, weight.weight.inputs):
        tile = torch.empty((end - begin, weight.weight.inputs), dtype=torch.int8, device="cpu")
        library.sordino_centred(weight.address, begin, end, tile.data_ptr(), threads)
        sums = torch._int_mm(codes, tile.T)
        library.sordino_rescale(
            weight.address, sums.data_ptr(), rows, begin, end, scales.data_ptr(), one_scale,
            out.data_ptr(), kind, threads,
        )  # fmt: skip
    return out


def values(weight: Packed | None, rows: slice, dtype: torch.dtype) -> Tensor | None:
    """Weights of some rows [rows, I], rounded once to fp32 or bf16."""
    library = active()
    if library is None or weight is None or dtype not in TYPES or torch.compiler.is_compiling():
        return None
    begin, end, step = rows.indices(weight.weight.outputs)
    if step != 1 or end < begin:
        return None
    out = torch.empty((end - begin, weight.weight.inputs), dtype=dtype, device="cpu")
    library.sordino_values(weight.address, begin, end, TYPES[dtype], out.data_ptr(), torch.get_num_threads())
    return out


def unpacked_product(weight: Packed | None, x: Tensor, bias: Tensor | None) -> Tensor | None:
    """``x W^T + bias`` of many rows, [..., I] -> [..., O] in x's dtype: weights rounded to it, then torch's product.

    Where the CPU has no products of bf16, they are made in fp32 and rounded once.
    """
    library = active()
    if library is None or weight is None or not _takes(weight, x) or x.numel() == 0:
        return None
    shape, at = weight.weight, weight.address
    kind = fast(x.dtype)
    flat, threads = x.reshape(-1, shape.inputs).to(kind), torch.get_num_threads()
    out = torch.empty((flat.shape[0], shape.outputs), dtype=kind, device="cpu")
    ranges = tiles(shape.outputs, shape.inputs)
    room = _room(max(end - begin for begin, end in ranges) * shape.inputs, kind)
    for begin, end in ranges:
        tile = room[: (end - begin) * shape.inputs].view(-1, shape.inputs)
        library.sordino_values(at, begin, end, TYPES[kind], tile.data_ptr(), threads)
        if bias is None:
            torch.mm(flat, tile.T, out=out[:, begin:end])
        else:
            torch.addmm(bias[begin:end].to(kind), flat, tile.T, out=out[:, begin:end])
    return out.to(x.dtype).view(*x.shape[:-1], shape.outputs)


_own = threading.local()


def _room(entries: int, dtype: torch.dtype) -> Tensor:
    """Memory of this thread for one product: new pages for every one would have to be faulted in."""
    kept: Tensor | None = getattr(_own, "room", None)
    if kept is None or kept.numel() < entries or kept.dtype != dtype:
        with torch.inference_mode(False):
            kept = _own.room = torch.empty(entries, dtype=dtype, device="cpu")
    return kept


# Weights unpacked at once: a tile of int8 that stays in the cache between unpacking and multiplying.
_TILE = 1 << 20


def tiles(outputs: int, inputs: int) -> list[tuple[int, int]]:
    """Ranges of rows that are unpacked at once."""
    step = max(64, _TILE // inputs)
    return [(i, min(i + step, outputs)) for i in range(0, outputs, step)]
