"""What the activations of a full-precision model look like: outlier tokens, uneven channels, ranges of queries, keys, values.

Token-wise maxima follow PrefixQuant (spec section 1): a token's largest entry over that of the window's median token, at the
input of down_proj; and its inverse, the median over the smallest token, for queries and keys (before rotary embedding).
Shapes: N windows, L tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sordino.anatomy import SITES, Anatomy, Site
from sordino.numerics.hadamard import rotation
from sordino.protect.prefix import Outliers, token_ratios

Progress = Callable[[str, int, int], None]
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
    """

    id: int
    times: int = 0
    first: int = 0
    ratio: float = 0.0
    block: int = 0


@dataclass
class Activations:
    """Figures by block, over all windows.

    Attributes:
        ratios: largest over median token at the input of down_proj, mean over windows.
        rotated: the same behind a Hadamard matrix of all its channels (R4).
        lower: median over smallest token of "queries" and "keys", mean over windows.
        tokens: those beyond the threshold, by id.
        outliers: the same counts as the move ``prefix`` makes, so that it would choose the same tokens.
        channels: largest magnitude of each channel of a site's input, fp32 [C] a block.
        ranges: smallest and largest entry of the outputs of q_proj, k_proj and v_proj.
    """

    ratios: list[float]
    rotated: list[float]
    lower: dict[str, list[float]]
    channels: dict[Site, list[Tensor]]
    ranges: dict[str, list[tuple[float, float]]]
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
            outliers=Outliers(means=[0.0] * n, ratios=[0.0] * n),
        )


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
    for n, window in enumerate(windows):
        if progress is not None:
            progress("look", n, len(windows))
        with hooked(_watch(model, anatomy, found, window, threshold)):
            model.get_decoder()(input_ids=window[None], use_cache=False)
    if progress is not None:
        progress("look", len(windows), len(windows))
    for values in (found.ratios, found.rotated, *found.lower.values(), found.outliers.means, found.outliers.ratios):
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
    ratios = token_ratios(x)
    largest = float(ratios.max())
    found.ratios[index] += largest
    found.rotated[index] += float(token_ratios(rotation(x.shape[-1]).apply(x.float())).max())
    hit = (ratios[0] > threshold).nonzero()[:, 0].tolist()
    found.outliers.ratios[index] += largest
    found.outliers.means[index] += len(hit)
    found.outliers.seen.update(int(window[place]) for place in hit if place)
    for place in hit:
        token = found.tokens.setdefault(int(window[place]), OutlierToken(int(window[place])))
        token.times += 1
        token.first += place == 0
        if (ratio := float(ratios[0, place])) > token.ratio:
            token.ratio, token.block = ratio, index


def _see_projection(found: Activations, index: int, name: str, y: Tensor) -> None:
    """The output of q_proj, k_proj or v_proj for one window, [1, L, C]."""
    low, high = found.ranges[name][index]
    found.ranges[name][index] = (min(low, float(y.min())), max(high, float(y.max())))
    kind = {"q_proj": "queries", "k_proj": "keys"}.get(name)
    if kind is not None:
        found.lower[kind][index] += 1 / max(float(token_ratios(y).min()), 1e-9)
