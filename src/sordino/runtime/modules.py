"""Modules that hold packed codes and dequantize as they run.

A quantized linear keeps its weight packed in memory. On the CPU native kernels multiply the packed codes (runtime/kernels);
where they are missing, torch unpacks a tile of rows, multiplies, and forgets it, with the same result.
Buffer names and layouts are those of compressed-tensors, so a checkpoint needs no renaming on load. Shapes:
O = out_features, I = in_features, G = groups, g = I/G, b = bits, V = vocabulary, D = hidden size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sordino.numerics.additive import additive_values
from sordino.numerics.basis import Basis, Dense
from sordino.numerics.inputs import InputGrid, encode
from sordino.numerics.kept import BITS, Kept, round_with_kept, with_kept
from sordino.numerics.packing import pack, packed_words, unpack
from sordino.numerics.side import Side
from sordino.runtime import kernels
from sordino.runtime.kernels import linear as native

# Weights of one tile: big enough to keep the matmul busy, small enough that the tile stays out of the memory's way.
_TILE = 1 << 20
SCALE = "input_scale"
ORDER = "input_order"  # of channels, int32 [I], where a linear puts its input in the order of its columns (runtime/inner.py)


class _Packed(nn.Module):
    """A module whose buffers go along to another device, and stay what they are when a model is cast."""

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class QuantLinear(_Packed):
    """Linear with an affine-quantized weight.

    Buffers:
        weight_packed: int32 [O, ceil(I*b/32)], bit stream along the input.
        weight_scale: bf16 [O, G]; [O, G, b] if the grid is additive.
        weight_zero_point: int32 [ceil(O*b/32), G], bit stream along the output; None if symmetric.
        input_scale: fp32, only there if inputs are rounded: [1], the scale of a static input, or the share of a token's largest
            entry that the codes of a dynamic one reach; with groups of channels one share each.
        kept_packed: int32 [O, ceil(k*8/32)], codes of the last k columns, only there if those are kept at 8 bits.
        kept_scale: bf16 [O, 1], likewise.
        side_a: bf16 [r, I], only there if a low-rank pair is added.
        side_b: bf16 [O, r], likewise.
        column_scale: bf16 [I], by which every input is multiplied, only there if the weight has one.
        bias: [O] parameter or None.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    side_a: Tensor
    side_b: Tensor
    column_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        bits: int,
        group: int,
        symmetric: bool,
        grid: str = "affine",
        inputs: dict[str, Any] | None = None,
        kept: int = 0,
        side: int = 0,
        column: bool = False,
    ):
        super().__init__()
        self.inputs = None if inputs is None else InputGrid.of(inputs)
        self.kept, self.side, self.columned = kept, side, column
        if column:
            self.register_buffer("column_scale", torch.ones(in_features, dtype=torch.bfloat16))
        if side:
            self.register_buffer("side_a", torch.zeros(side, in_features, dtype=torch.bfloat16))
            self.register_buffer("side_b", torch.zeros(out_features, side, dtype=torch.bfloat16))
        if kept:
            self.register_buffer("kept_packed", torch.zeros(out_features, packed_words(kept, BITS), dtype=torch.int32))
            self.register_buffer("kept_scale", torch.zeros(out_features, 1, dtype=torch.bfloat16))
        if self.inputs is not None:
            numbers = input_groups(in_features, self.inputs.group)
            self.register_buffer(SCALE, torch.zeros(numbers, dtype=torch.float32))
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group, self.symmetric, self.additive = bits, group, symmetric or grid == "additive", grid == "additive"
        groups = in_features // group
        self.register_buffer("weight_packed", torch.zeros(out_features, packed_words(in_features, bits), dtype=torch.int32))
        shape = (out_features, groups, bits) if self.additive else (out_features, groups)
        self.register_buffer("weight_scale", torch.zeros(shape, dtype=torch.bfloat16))
        zero = None if self.symmetric else torch.zeros(packed_words(out_features, bits), groups, dtype=torch.int32)
        self.register_buffer("weight_zero_point", zero)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None)

    def codes(self, rows: slice = slice(None)) -> Tensor:
        """Codes of some rows, uint8 [rows, I]."""
        return unpack(self.weight_packed[rows], self.bits, self.in_features)

    def zeros(self) -> Tensor:
        """Zero points, uint8 [O, G]."""
        if self.weight_zero_point is None:
            shape, middle = self.weight_scale.shape[:2], 0 if self.additive else 1 << (self.bits - 1)
            return torch.full(shape, middle, dtype=torch.uint8, device=self.weight_scale.device)
        # Not .contiguous(): a single word a column counts as contiguous already, with strides that `unpack` cannot view.
        turned = self.weight_zero_point.T.clone(memory_format=torch.contiguous_format)
        return unpack(turned, self.bits, self.out_features).T

    def kept_columns(self) -> Kept | None:
        """The columns that are kept at 8 bits."""
        if not self.kept:
            return None
        codes = unpack(self.get_buffer("kept_packed"), BITS, self.kept).to(torch.int16) - (1 << (BITS - 1))
        return Kept(codes.to(torch.int8), self.get_buffer("kept_scale").float())

    def dequantize(self, dtype: torch.dtype, rows: slice = slice(None), zeros: Tensor | None = None) -> Tensor:
        """Weight values ``(code - zero) * scale`` of some rows, [rows, I], with what else there is.

        In bf16 the difference is exact and the product is rounded once, the same as computing in fp32 and casting.
        """
        pair, column = self.pair(), self.column()
        if column is not None:
            return (self._own(torch.float32, rows, zeros) * column).to(dtype)
        if pair is None:
            return self._own(dtype, rows, zeros)
        return (self._own(torch.float32, rows, zeros) + pair.b[rows] @ pair.a).to(dtype)

    def pair(self) -> Side | None:
        """The low-rank pair."""
        return Side(self.get_buffer("side_a").float(), self.get_buffer("side_b").float()) if self.side else None

    def column(self) -> Tensor | None:
        """The column scale, fp32 [I]."""
        return self.get_buffer("column_scale").float() if self.columned else None

    def _own(self, dtype: torch.dtype, rows: slice, zeros: Tensor | None) -> Tensor:
        """Values without the low-rank pair and the column scale."""
        low, kept = self._low(dtype, rows, zeros), self.kept_columns()
        return low if kept is None else with_kept(low, kept.rows(rows).values())

    def _low(self, dtype: torch.dtype, rows: slice, zeros: Tensor | None) -> Tensor:
        """Values of the low-bit codes."""
        made = native.values(self._native_weight(), rows, dtype)
        if made is not None:
            return made
        if self.additive:
            levels = self.weight_scale[rows].float()
            codes = self.codes(rows).view(*levels.shape[:2], self.group)
            return additive_values(codes, levels).view(levels.shape[0], -1).to(dtype)
        zeros = (self.zeros() if zeros is None else zeros)[rows]
        scale = self.weight_scale[rows].to(dtype)
        w = self.codes(rows).to(dtype).view(*scale.shape, self.group)
        return w.sub_(zeros.to(dtype)[..., None]).mul_(scale[..., None]).view(scale.shape[0], -1)

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + bias`` for x [..., I] in x's dtype; with rounded inputs, of the codes where one scale a row allows."""
        if not x.numel():
            return x.new_empty((*x.shape[:-1], self.out_features))
        if self.columned:
            x = x * self.column_scale.to(x.dtype)
        if self.inputs is not None:
            grid, bits = self.inputs, self.inputs.bits
            share: Tensor = self._buffers[SCALE].float()  # type: ignore[union-attr]  # get_buffer takes microseconds
            whole = self.group == self.in_features and self.symmetric and not (self.additive or self.kept or self.side)
            whole = whole and grid.symmetric and grid.group is None
            if whole:
                clip, fixed = (1.0, share) if grid.static else (float(share), None)
                out = native.rounded_product(self._native_weight(), x, bits, clip, fixed)
                if out is not None:
                    return out
            if self.kept:
                x = round_with_kept(x, grid, share, self.kept)
            elif whole and x.device.type == "cpu":  # elsewhere torch's integer product takes few shapes
                scale = grid.fit(x, share)[0]
                return self._multiply(encode(x, scale, bits), scale, x.dtype)
            else:
                x = grid.fake(x, share)
        out = None if self.kept else native.product(self._native_weight(), x)
        out = self._product(x) if out is None else out
        return out + F.linear(F.linear(x, self.side_a.to(x.dtype)), self.side_b.to(x.dtype)) if self.side else out

    def _product(self, x: Tensor) -> Tensor:
        """Unpack a tile of rows, multiply, and forget it."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        made = None if self.kept else native.unpacked_product(self._native_weight(), x, bias)
        if made is not None:
            return made
        tiles = self._tiles()
        zeros = self.zeros() if kernels.active() is None else None  # the kernels read zeros as they are stored
        if len(tiles) == 1:
            return F.linear(x, self._own(x.dtype, slice(None), zeros), bias)
        out = torch.cat([F.linear(x, self._own(x.dtype, rows, zeros)) for rows in tiles], dim=-1)
        return out if bias is None else out + bias

    def _native_weight(self) -> native.Packed | None:
        """The weight for the kernels, which know no gradients."""
        bias = self._parameters["bias"]
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            return None
        return native.packed(self, bias, self.in_features, self.group, self.bits)

    def _tiles(self) -> list[slice]:
        """Rows that are unpacked at once."""
        step = max(1, _TILE // self.in_features)
        return [slice(i, min(i + step, self.out_features)) for i in range(0, self.out_features, step)]

    def _multiply(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Integer product of input codes int8 [..., I] and weight codes, scaled once: [..., O]."""
        flat = codes.view(-1, self.in_features)
        parts = []
        for rows in self._tiles():
            weight = (self.codes(rows).to(torch.int16) - (1 << (self.bits - 1))).to(torch.int8)
            parts.append(torch._int_mm(flat, weight.T))
        out = torch.cat(parts, -1).view(*codes.shape[:-1], -1).float() * (scale * self.weight_scale.float().view(-1))
        return (out if self.bias is None else out + self.bias.float()).to(dtype)

    def extra_repr(self) -> str:
        """What print shows."""
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group}, {kind}"


def input_groups(channels: int, group: int | None) -> int:
    """How many numbers an input's ``input_scale`` has, for groups of channels or None."""
    return 1 if group is None else channels // group


def pack_linear(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool) -> dict[str, Tensor]:
    """Buffers of a :class:`QuantLinear` from codes uint8 [O, I], scale fp32 [O, G] and zero fp32 [O, G]."""
    out = {"weight_packed": pack(codes, bits), "weight_scale": scale.to(torch.bfloat16)}
    if not symmetric:
        out["weight_zero_point"] = pack(zero.T.to(torch.uint8).contiguous(), bits).T.contiguous()
    return out


def pack_kept(kept: Kept) -> dict[str, Tensor]:
    """Buffers of a :class:`QuantLinear` for its columns at 8 bits."""
    codes = (kept.codes.to(torch.int16) + (1 << (BITS - 1))).to(torch.uint8)
    return {"kept_packed": pack(codes, BITS), "kept_scale": kept.scale.to(torch.bfloat16)}


def give_bias(module: Any) -> None:
    """Give a linear or a norm a zero bias where it has none; a norm adds it to what it puts out."""
    if getattr(module, "bias", None) is not None:
        return
    weight: Tensor = module.weight_packed if isinstance(module, QuantLinear) else module.weight
    dtype = torch.get_default_dtype() if isinstance(module, QuantLinear) else weight.dtype
    bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=dtype, device=weight.device), requires_grad=False)
    module.register_parameter("bias", bias)
    if not isinstance(module, nn.Linear | QuantLinear):
        module.register_forward_hook(add_bias)


def drop_bias(module: Any) -> None:
    """Undo :func:`give_bias`."""
    module.register_parameter("bias", None)
    for key in [k for k, hook in module._forward_hooks.items() if hook is add_bias]:
        del module._forward_hooks[key]


def add_bias(module: Any, _: Any, out: Tensor) -> Tensor:
    """Forward hook of a norm that has a bias."""
    shifted: Tensor = out + module.bias
    return shifted


BASIS = "basis"  # of the final norm, int32 [D, D]: the bits of a learned basis' fp32 numbers, which loading must not cast


def store_basis(norm: nn.Module, matrix: Tensor) -> None:
    """Let a final norm hold a learned basis, fp32 [D, D], for itself and the embedding."""
    norm.register_buffer(BASIS, matrix.view(torch.int32))


def stored_basis(norm: nn.Module) -> Dense:
    """The basis that a final norm holds."""
    return Dense(norm.get_buffer(BASIS).view(torch.float32))


def in_basis(embedding: nn.Module, basis: Basis | Dense) -> None:
    """Let an embedding hand out its rows in a rotated basis; the stored table stays as it is."""
    embedding.register_forward_hook(partial(_into, basis))


def out_of_basis(norm: nn.Module, basis: Basis | Dense) -> None:
    """Let the final norm take hidden states in a rotated basis; its gain and the head stay as they are."""
    norm.register_forward_pre_hook(partial(_out_of, basis))


def _into(basis: Basis | Dense, _: Any, __: Any, out: Tensor) -> Tensor:
    return basis.apply(out)


def _out_of(basis: Basis | Dense, _: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (basis.undo(args[0]), *args[1:])


class QuantEmbedding(_Packed):
    """Token embedding with symmetric 8-bit rows.

    Buffers:
        weight_packed: int32 [V, ceil(D*8/32)].
        weight_scale: bf16 [V, 1].
    """

    weight_packed: Tensor
    weight_scale: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, dtype
        self.register_buffer("weight_packed", torch.zeros(num_embeddings, packed_words(embedding_dim, 8), dtype=torch.int32))
        self.register_buffer("weight_scale", torch.zeros(num_embeddings, 1, dtype=torch.bfloat16))

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # it goes the way of the model's own tensors
        return super()._apply(fn, recurse)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the table, [..., D] in the model's dtype."""
        flat = ids.reshape(-1)
        values = unpack(self.weight_packed[flat], 8, self.embedding_dim).to(self.dtype) - 128
        return (values * self.weight_scale[flat].to(self.dtype)).view(*ids.shape, -1)

    def extra_repr(self) -> str:
        """What print shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits=8"


class TiedHead(nn.Module):
    """Output projection that reads the table of a :class:`QuantEmbedding`; it owns no tensor, so none is stored twice."""

    def __init__(self, table: QuantEmbedding):
        super().__init__()
        self._table: Any = (table,)  # in a tuple, so that torch does not register it as a child

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., V]; codes are exact in bf16, the row scale is applied to the product."""
        table: QuantEmbedding = self._table[0]
        out = native.product(native.packed(table, None, table.embedding_dim, table.embedding_dim, 8), x)
        if out is not None:
            return out
        rows = max(1, _TILE // table.embedding_dim)
        parts = []
        for i in range(0, table.num_embeddings, rows):
            codes = unpack(table.weight_packed[i : i + rows], 8, table.embedding_dim).to(x.dtype) - 128
            parts.append(F.linear(x, codes) * table.weight_scale[i : i + rows].to(x.dtype).view(-1))
        return torch.cat(parts, dim=-1)
