"""The prefix of outlier tokens (PrefixQuant, spec section 1.3).

A few tokens of every sequence reach activations hundreds of times those of the others: the first one, and in some models
the first delimiters. What they are matters little, that their places are taken does. So the tokens that are seen there most
often are put before every text once and for all; their keys and values are kept in full precision, and the text behind
them has no such tokens left.
Shapes: B windows, L tokens, C input features of down_proj.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from sordino.contract import Move, SiteInputs

Threshold = Annotated[float, Field(gt=1)]
THRESHOLD = 64.0  # a token is an outlier where its largest entry exceeds the median token's so many times


@dataclass
class Outliers:
    """What the survey found.

    Attributes:
        windows: how many were looked at.
        means: outlier tokens of a window, mean, by block.
        ratios: largest over median token, mean over windows, by block.
        seen: how often each token was an outlier, the first place of a window left out.
    """

    windows: int = 0
    means: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    seen: Counter[int] = field(default_factory=Counter)


class Prefix(Move):
    """Find outlier tokens and park them before every text.

    Args:
        threshold: a token is an outlier where its largest down_proj input exceeds the window's median token's so many times.
    """

    name = "prefix"

    def __init__(self, threshold: Threshold = THRESHOLD) -> None:
        self.threshold = threshold

    def survey(self, index: int, block: nn.Module, inputs: SiteInputs, artifacts: dict[str, Any]) -> None:
        """Count the outliers of one block."""
        found: Outliers = artifacts.setdefault(self.name, Outliers())
        ids: Tensor = artifacts["ids"]
        found.windows, count, total = len(ids), 0, 0.0
        for span, x in inputs("down"):
            ratio = token_ratios(x)
            hit = ratio > self.threshold
            count += int(hit.sum())
            total += float(ratio.amax(-1).sum())
            found.seen.update(ids[span][:, 1:][hit[:, 1:]].tolist())
        found.means.append(count / len(ids))
        found.ratios.append(total / len(ids))

    def prefix(self, artifacts: dict[str, Any], first: int | None) -> tuple[int, ...]:
        """The tokens to park; none where there are no outliers."""
        return choose(artifacts[self.name], first)


def token_ratios(x: Tensor) -> Tensor:
    """Largest entry of each token over that of the window's median token, [B, L, C] -> fp32 [B, L]."""
    peak = x.abs().amax(-1).float()
    return (peak / peak.median(-1, keepdim=True).values.clamp(min=1e-30)).clamp(max=1e9)  # finite, for the report


def choose(found: Outliers, first: int | None) -> tuple[int, ...]:
    """Ids of the prefix: the most frequent outlier tokens, then the token that begins a text (spec section 1.3).

    Args:
        found: by the survey.
        first: the model's beginning-of-text token, None if it has none.
    """
    places = math.ceil(max(found.means, default=0.0))
    if places == 0:
        return ()
    seen = found.seen
    # A single token that hardly ever occurs is an accident: the outlier is the first place alone.
    if len(seen) == 1 and seen.total() < 0.1 * found.windows:
        places, seen = places - 1, Counter()
    frequent = [token for token, _ in seen.most_common() if token != first][:places]
    return tuple(frequent) if first is None else (*frequent, first)
