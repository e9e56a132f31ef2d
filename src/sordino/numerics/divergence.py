"""Divergence between two models' next-token distributions. Shapes: T tokens, V vocabulary."""

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
