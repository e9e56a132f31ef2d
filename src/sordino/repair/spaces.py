"""Parameter spaces: what can be trained of a rounded linear, so that one tuner trains any set of them.

A :class:`TrainedLinear` stands in for a linear while it is trained. Its weight is ``(code - zero) * scale`` exactly as it
will be stored, on every step; codes come from a latent position on the grid (in steps of the scale), whose gradient goes
straight through the rounding. Codes do not depend on the scale, so the scale's gradient is exact.
Shapes: R = out_features, C = in_features, G = groups, g = C/G.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sordino.numerics.affine import round_scale
from sordino.rounding import Rounded
from sordino.runtime.inputs import carry_inputs
from sordino.runtime.kernels import training

_EDGE = 0.499  # how far beyond the outermost code a latent position may lie, in steps


def stored_scale(exact: Tensor) -> Tensor:
    """Scales as they will be stored, with gradients as if they were not rounded."""
    return exact + (round_scale(exact.detach()) - exact.detach())


def grown(first: Tensor, growth: Tensor) -> Tensor:
    """Scales ``first * exp(growth)`` as they will be stored, fp32."""
    return stored_scale(first * growth.exp())


def near(steps: Tensor, codes: Tensor) -> Tensor:
    """Positions on the grid, in steps, brought so near to their codes that these are the nearest."""
    return torch.minimum(torch.maximum(steps, codes - _EDGE), codes + _EDGE)


class TrainedLinear(nn.Module):
    """A rounded linear whose roundings and scales can be trained.

    Attributes:
        latent: fp32 [R, G, g], position on the grid in steps, relative to the zero point, if weights train (a parameter); else
            the codes themselves, uint8, which are the rounded weight's own.
        growth: fp32 [R, G], logarithm of the scale over its first value (a parameter if scales train).
        bias: the linear's own, frozen, or None.
    """

    latent: Tensor
    growth: Tensor
    zero: Tensor
    first: Tensor

    def __init__(self, rounded: Rounded, bias: Tensor | None, weights: bool, scales: bool):
        super().__init__()
        self.start, self.bias = replace(rounded, latent=None), bias
        rows, groups = rounded.scale.shape
        zero, first = rounded.zero[..., None].contiguous(), rounded.scale.contiguous()
        if not weights:
            self.register_buffer("latent", rounded.codes.view(rows, groups, -1))
        else:
            codes = rounded.codes.view(rows, groups, -1).float() - zero
            if rounded.latent is not None:
                # A clipped weight sits at the edge of the last code, from where it may still come back.
                codes = near(rounded.latent.view(rows, groups, -1) / first[..., None], codes)
            self.latent = nn.Parameter(codes)
        self.register_buffer("zero", zero)
        self.register_buffer("first", first)
        growth = torch.zeros_like(first)
        if scales:
            self.growth = nn.Parameter(growth)
        else:
            self.register_buffer("growth", growth)

    def scale(self) -> Tensor:
        """The scale as it will be stored, fp32 [R, G], with gradients as if it were not rounded."""
        return grown(self.first, self.growth)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight as it will be stored, [R, C]."""
        out: Tensor = _OnGrid.apply(self.latent, self.scale(), self.zero, self.start.bits, dtype)  # type: ignore[no-untyped-call]
        return self.start.around(self.start.columned(out))

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + bias``."""
        return F.linear(x, self.weight(x.dtype), self.bias)

    @torch.no_grad()
    def limit(self) -> None:
        """Keep latent positions where their code is the nearest: call it after every step."""
        if isinstance(self.latent, nn.Parameter) and not training.keep_near(self.latent, self.zero, self.start.bits, _EDGE):
            top = (1 << self.start.bits) - 1
            torch.minimum(torch.maximum(self.latent, -self.zero - _EDGE), top - self.zero + _EDGE, out=self.latent.data)

    @torch.no_grad()
    def rounded(self) -> Rounded:
        """What it has become."""
        scale = self.scale()
        if not isinstance(self.latent, nn.Parameter):
            return replace(self.start, scale=scale)
        codes = (self.latent.round() + self.zero).clamp_(0, (1 << self.start.bits) - 1)
        latent = (self.latent * scale[..., None]).view_as(self.start.codes)
        return replace(self.start, codes=codes.view_as(self.start.codes).to(torch.uint8), scale=scale, latent=latent)


class _OnGrid(torch.autograd.Function):
    """``(clamp(round(latent) + zero) - zero) * scale``; straight through the rounding, exact for the scale."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
        """[R, G, g] positions, or codes -> [R, C] values."""
        found = training.on_grid(latent, scale, zero, bits, dtype)
        codes, values = _on_grid(latent, scale, zero, bits, dtype) if found is None else found
        ctx.save_for_backward(codes, zero, scale)
        return values.view(scale.shape[0], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of positions and scales."""
        codes, zero, scale = ctx.saved_tensors
        grad, wanted = grads[0].contiguous().view_as(codes), ctx.needs_input_grad
        found = training.on_grid_back(grad, codes, scale, zero, wanted[0], wanted[1])
        if found is None:
            d_latent = grad.float() * scale[..., None] if wanted[0] else None
            found = d_latent, _steps(codes, zero, torch.float32).mul_(grad).sum(-1) if wanted[1] else None
        return *found, None, None, None


def _on_grid(latent: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and values [R, G, g], by torch."""
    codes = latent
    if latent.is_floating_point():
        codes = (torch.round(latent) + zero).clamp_(0, (1 << bits) - 1).to(torch.uint8)
    return codes, _steps(codes, zero, dtype).mul_(scale[..., None].to(dtype))


def _steps(codes: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes [R, G, g] less their zero points [R, G, 1], exact: neither has more than 8 bits."""
    return codes.to(dtype).sub_(zero.to(dtype))


class WeightSpace:
    """Roundings and scales of the rounded linears of a block: each is replaced by a :class:`TrainedLinear`.

    Additive grids are left as they are.

    Args:
        block: the decoder layer, edited in place until :meth:`fold`.
        solved: the rounded linears, by name inside the block.
        weights: learning rate of latent positions in steps of the grid; 0 leaves the codes as they are.
        scales: learning rate of the scales' logarithms; 0 leaves them.
    """

    def __init__(self, block: nn.Module, solved: dict[str, Rounded], weights: float, scales: float):
        self.block, self.rates = block, (weights, scales)
        trainable = {name: r for name, r in solved.items() if r.grid == "affine"}
        self.plain: dict[str, nn.Module] = {name: block.get_submodule(name) for name in trainable}
        self.trained: dict[str, TrainedLinear] = {}
        for name, rounded in trainable.items():
            bias: Any = self.plain[name].bias
            self.trained[name] = TrainedLinear(rounded, bias, weights > 0, scales > 0)
            carry_inputs(self.plain[name], self.trained[name])
            block.set_submodule(name, self.trained[name])

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer."""
        members: list[list[Tensor]] = [[t.latent for t in self.trained.values()], [t.growth for t in self.trained.values()]]
        return [{"params": p, "lr": lr} for p, lr in zip(members, self.rates, strict=True) if lr > 0]

    def collect(self) -> None:
        """After the backward pass: nothing to do."""

    def settle(self) -> None:
        """After an optimizer step: keep positions on the grid."""
        for t in self.trained.values():
            t.limit()

    def fold(self) -> dict[str, Rounded]:
        """Put the plain linears back; returns what the rounded ones have become, for the context to commit."""
        for name, module in self.plain.items():
            self.block.set_submodule(name, module)
        return {name: t.rounded() for name, t in self.trained.items()}


class GainSpace:
    """Gains of norms, and their biases. They are trained in fp32 and used as they will be stored.

    Args:
        norms: the norm modules.
        rate: learning rate, as a share of the root mean square of each norm's gain; 0 trains nothing.
        stored: dtype of the checkpoint.
    """

    def __init__(self, norms: list[nn.Module], rate: float, stored: torch.dtype):
        self.stored = stored
        self.weights: list[Any] = []
        self.rates: list[float] = []
        for norm in norms if rate > 0 else []:
            gain: Any = norm.weight
            own = [gain] if getattr(norm, "bias", None) is None else [gain, norm.bias]
            self.weights += own
            self.rates += [rate * float(gain.detach().float().square().mean().sqrt())] * len(own)
        self.masters = [nn.Parameter(w.detach().float()) for w in self.weights]
        for w in self.weights:
            w.requires_grad_(True)

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer."""
        return [{"params": [m], "lr": lr} for m, lr in zip(self.masters, self.rates, strict=True)]

    def collect(self) -> None:
        """Hand the gradients to the fp32 copies."""
        for w, m in zip(self.weights, self.masters, strict=True):
            m.grad = None if w.grad is None else w.grad.float()
            w.grad = None

    @torch.no_grad()
    def settle(self) -> None:
        """Round the fp32 copies into the modules."""
        for w, m in zip(self.weights, self.masters, strict=True):
            w.copy_(m.to(self.stored))

    def fold(self) -> dict[str, Rounded]:
        """The modules hold the gains already."""
        for w in self.weights:
            w.requires_grad_(False)
        return {}
