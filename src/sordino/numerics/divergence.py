"""Divergence between two models: of hidden states, and of next-token distributions.

Shapes: B windows, L tokens of a window, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_kl(reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """KL(reference || other) per token, in nats, and whether both have the same most likely token.

    Args:
        reference: logits [T, V], any float dtype.
        other: logits [T, V].

    Returns:
        KL fp32 [T] and agreement bool [T].
    """
    p, q = torch.log_softmax(reference.float(), -1), torch.log_softmax(other.float(), -1)
    kl = (p.exp() * (p - q)).sum(-1)
    return kl, reference.argmax(-1) == other.argmax(-1)


def token_weights(target: Tensor) -> Tensor:
    """Weights of tokens in a squared error, so that a massive token counts for no more than a median one.

    Args:
        target: hidden states [B, L, D].

    Returns:
        fp32 [B, L]: ``min(1, median_l |t_l|^2 / |t_l|^2)``.
    """
    energy = target.float().square().sum(-1)
    return (energy.median(-1, keepdim=True).values / energy.clamp(min=1e-30)).clamp(max=1.0)
