"""Divergence between two models: of hidden states, and of next-token distributions.

Shapes: B windows, L tokens of a window, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per token, in nats.

    Args:
        log_p: logarithms of the reference's probabilities, fp32 [T, V].
        log_q: of the other's, fp32 [T, V].

    Returns:
        fp32 [T].
    """
    kl: Tensor = torch.linalg.vecdot(log_p.exp(), log_p - log_q)
    return kl


def token_weights(target: Tensor) -> Tensor:
    """Weights of tokens in a squared error, so that a massive token counts for no more than a median one.

    Args:
        target: hidden states [B, L, D].

    Returns:
        fp32 [B, L]: ``min(1, median_l |t_l|^2 / |t_l|^2)``.
    """
    energy = target.float().square().sum(-1)
    return (energy.median(-1, keepdim=True).values / energy.clamp(min=1e-30)).clamp(max=1.0)
