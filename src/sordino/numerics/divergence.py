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
    # q - p sums to nothing, but for what rounding did to the logarithms: with it that cancels, and equal models come out equal.
    p, behind = log_p.exp(), log_q - log_p
    more = torch.where(behind.abs() < 1, torch.expm1(behind) * p, log_q.exp() - p)
    return (more - p * behind).sum(-1)


def token_weights(target: Tensor, cap: float = 1.0) -> Tensor:
    """Weights of tokens in a squared error, so that a massive token counts for no more than a median one.

    Args:
        target: hidden states [B, L, D].
        cap: how many median tokens a massive one counts for.

    Returns:
        fp32 [B, L]: ``min(1, cap * median_l |t_l|^2 / |t_l|^2)``.
    """
    energy = target.float().square().sum(-1)
    middle = energy.median(-1, keepdim=True).values
    weights = (cap * middle / energy.clamp(min=1e-30)).clamp(max=1.0)
    return torch.where(middle > 0, weights, 1.0)  # more than half of the tokens are zero: nothing to compare with


def token_factors(x: Tensor, cap: float) -> Tensor:
    """What to multiply tokens with so that a massive one counts for about ``cap`` median ones in a sum of squares.

    Powers of two, the nearest ones from above: products with them are exact in bf16 too.

    Args:
        x: hidden states [B, L, D].
        cap: see :func:`token_weights`, whose square roots these are.

    Returns:
        [B, L] in the dtype of ``x``, at most 1.
    """
    return torch.exp2(token_weights(x, cap).log2().div_(2).ceil_()).to(x.dtype)
