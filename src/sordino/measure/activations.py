"""What the activations of a full-precision model look like: outlier tokens, uneven channels, ranges of queries, keys, values.

Token-wise maxima follow PrefixQuant (spec section 1): a token's largest entry over that of the window's median token, at the
input of down_proj; and its inverse, the median over the smallest token, for queries and keys (before rotary embedding).
Shapes: N windows, L tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from sordino.anatomy import SITES, Anatomy, Site
from sordino.contract import Progress
from sordino.measure.evaluate import in_turn
from sordino.numerics.hadamard import rotation
from sordino.protect.prefix import Outliers, token_ratios

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass
class OutlierToken:
    """A token that stands out at the input of down_proj.

    Attributes:
        id: of the token.
        times: how often it did, over windows and blocks.
        first: how many of these times in the first place of a window.
        ratio: its largest ratio to the median token.
        block: where that was.
        token: what it reads; empty until it was named.
    """

    id: int
    times: int = 0
    first: int = 0
    ratio: float = 0.0
    block: int = 0
    token: str = ""


@dataclass
class Loudest:
    """The token of a block with the largest ratio at the input of down_proj, an outlier or not.

    Attributes:
        id: of the token.
        place: in its window, from 0.
        ratio: to the window's median token.
        token: what it reads; empty until it was named.
    """

    id: int = 0
    place: int = 0
    ratio: float = 0.0
    token: str = ""


@dataclass
class Activations:
    """Figures by block, over all windows.

    Attributes:
        ratios: largest over median token at the input of down_proj, mean over windows.
        rotated: the same behind a Hadamard matrix of all its channels (R4).
        lower: median over smallest token of "queries" and "keys", mean over windows.
        channels: largest magnitude of each channel of a site's input, fp32 [C] a block.
        ranges: smallest and largest entry of the outputs of q_proj, k_proj and v_proj.
        loudest: the token that stands out most.
        tokens: those beyond the threshold, by id.
        outliers: what the move ``prefix`` counts to choose its tokens.
    """

    ratios: list[float]
    rotated: list[float]
    lower: dict[str, list[float]]
    channels: dict[Site, list[Tensor]]
    ranges: dict[str, list[tuple[float, float]]]
    loudest: list[Loudest] = field(default_factory=list)
    tokens: dict[int, OutlierToken] = field(default_factory=dict)
    outliers: Outliers = field(default_factory=Outliers)

    @staticmethod
    def nothing(anatomy: Anatomy) -> Activations:
        """Before the first window."""
        n = anatomy.n_blocks
        width = {site: anatomy.at(site)[0].in_features for site in SITES}
        return Activations(
            ratios=[0.0] * n,
            rotated=[0.0] * n,
            lower={"queries": [0.0] * n, "keys": [0.0] * n},
            channels={site: [torch.zeros(width[site]) for _ in range(n)] for site in SITES},
            ranges={name: [(float("inf"), float("-inf"))] * n for name in PROJECTIONS},
            loudest=[Loudest() for _ in range(n)],
            outliers=Outliers(means=[0.0] * n),
        )

    def name_tokens(self, words: Callable[[list[int]], list[str]]) -> None:
        """Say what the tokens read; words is a tokenizer's ``convert_ids_to_tokens``."""
        found: list[Loudest | OutlierToken] = [*self.loudest, *self.tokens.values()]
        for token in found:
            token.token = str(words([token.id])[0])

    def to_json(self) -> dict[str, Any]:
        """Everything that a reader may want to plot; maxima of channels to four digits, by site and block."""
        maps = {
            site: [[float(f"{v:.4g}") for v in peaks.tolist()] for peaks in blocks] for site, blocks in self.channels.items()
        }
        return {
            "down_ratios": self.ratios,
            "down_ratios_rotated": self.rotated,
            "lower_ratios": self.lower,
            "ranges": self.ranges,
            "channels": maps,
            "loudest": [asdict(t) for t in self.loudest],
            "tokens": [asdict(t) for t in self.most_frequent()],
            "outlier_tokens_a_window": self.outliers.means,
        }

    def most_frequent(self) -> list[OutlierToken]:
        """Outlier tokens, most frequent first."""
        return sorted(self.tokens.values(), key=lambda t: (-t.times, t.id))


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Take hooks off again, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def look(model: Any, anatomy: Anatomy, windows: Tensor, threshold: float, progress: Progress | None = None) -> Activations:
    """Run windows through a model and watch.

    Args:
        model: a transformers causal language model in full precision.
        anatomy: of it.
        windows: token ids, int64 [N, L].
        threshold: ratio beyond which a token is an outlier.
        progress: told (what, done, total).
    """
    found = Activations.nothing(anatomy)
    found.outliers.windows = len(windows)
    for window in in_turn(windows, progress, "look"):
        with hooked(_watch(model, anatomy, found, window, threshold)):
            model.get_decoder()(input_ids=window[None], use_cache=False)
    for values in (found.ratios, found.rotated, *found.lower.values(), found.outliers.means):
        values[:] = [v / len(windows) for v in values]
    return found


def _watch(model: Any, anatomy: Anatomy, found: Activations, window: Tensor, threshold: float) -> list[Any]:
    handles = []
    for i in range(anatomy.n_blocks):
        for site in SITES:
            linear = model.get_submodule(anatomy.full_name(i, anatomy.at(site)[0].name))

            def before(_: Any, args: tuple[Any, ...], i: int = i, site: Site = site) -> None:
                _see_input(found, i, site, args[0], window, threshold)

            handles.append(linear.register_forward_pre_hook(before))
        for part in anatomy.at("qkv"):
            linear = model.get_submodule(anatomy.full_name(i, part.name))

            def after(_: Any, __: Any, y: Tensor, i: int = i, name: str = part.name.rpartition(".")[2]) -> None:
                _see_projection(found, i, name, y)

            handles.append(linear.register_forward_hook(after))
    return handles


def _see_input(found: Activations, index: int, site: Site, x: Tensor, window: Tensor, threshold: float) -> None:
    """The input of a site for one window, [1, L, C]."""
    channels = found.channels[site][index]
    torch.maximum(channels, x[0].abs().amax(0).float(), out=channels)
    if site != "down":
        return
    ratios = token_ratios(x)[0]
    place = int(ratios.argmax())
    if (largest := float(ratios[place])) > found.loudest[index].ratio:
        found.loudest[index] = Loudest(int(window[place]), place, largest)
    found.ratios[index] += largest
    found.rotated[index] += float(token_ratios(rotation(x.shape[-1]).apply(x.float())).max())
    hit = (ratios > threshold).nonzero()[:, 0].tolist()
    found.outliers.means[index] += len(hit)
    found.outliers.seen.update(int(window[place]) for place in hit if place)
    for place in hit:
        token = found.tokens.setdefault(int(window[place]), OutlierToken(int(window[place])))
        token.times += 1
        token.first += place == 0
        if (ratio := float(ratios[place])) > token.ratio:
            token.ratio, token.block = ratio, index


def _see_projection(found: Activations, index: int, name: str, y: Tensor) -> None:
    """The output of q_proj, k_proj or v_proj for one window, [1, L, C]."""
    low, high = found.ranges[name][index]
    found.ranges[name][index] = (min(low, float(y.min())), max(high, float(y.max())))
    kind = {"q_proj": "queries", "k_proj": "keys"}.get(name)
    if kind is not None:
        found.lower[kind][index] += 1 / max(float(token_ratios(y).min()), 1e-9)
