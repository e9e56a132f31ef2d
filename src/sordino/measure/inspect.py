"""Look at a model before quantizing it, and at a checkpoint's errors against the model it was made from.

Everything but the vertical errors of a given checkpoint is measured on the full-precision model, in fp32 so that small
differences are not those of the arithmetic. Shapes: N windows of L tokens.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sordino.anatomy import SITES, Anatomy, anatomy_of
from sordino.api import load
from sordino.corpus import DEFAULT_TEXT, load_text
from sordino.errors import InputError
from sordino.measure.activations import Activations, Progress, look
from sordino.measure.advice import Advice, advise
from sordino.measure.diffusion import Horizontal, horizontal
from sordino.measure.evaluate import Windows
from sordino.measure.propagation import Vertical, vertical
from sordino.measure.sensitivity import Sensitivity, rounded_copy, sensitivities
from sordino.protect.prefix import choose
from sordino.runtime.attention import attach
from sordino.runtime.prefix import KEY, VALUE
from sordino.walk.attention import NAME as WINDOW_ATTENTION
from sordino.walk.prefix import first_token

BITS = 4
THRESHOLD = 64.0  # as the move prefix has it
SPREAD = (2, 256)  # windows and tokens of the interventions: they take a forward for every source


@dataclass(frozen=True)
class NamedToken:
    """An outlier token, see :class:`sordino.measure.activations.OutlierToken`."""

    token: str
    id: int
    times: int
    first: int
    ratio: float
    block: int


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        model: the full-precision model.
        checkpoint: what was held against it; None for a simulated rounding of its weights.
        text: the text's name.
        windows: N.
        seqlen: L.
        bits: of every simulated rounding.
        prefix: ids that the move ``prefix`` would choose.
        prefix_tokens: what they are.
        plain: activations of the model.
        prefixed: the same behind the prefix; None if there is no outlier token.
        tokens: outlier tokens, most frequent first.
        sensitivities: what rounding each kind of operand does.
        vertical: errors along depth.
        horizontal: errors from token to token.
        advice: recipes and reasons.
        seconds: wall time.
    """

    model: str
    checkpoint: str | None
    text: str
    windows: int
    seqlen: int
    bits: int
    prefix: list[int]
    prefix_tokens: list[str]
    plain: Activations
    prefixed: Activations | None
    tokens: list[NamedToken]
    sensitivities: list[Sensitivity]
    vertical: Vertical
    horizontal: Horizontal
    advice: list[Advice]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As written by ``sordino inspect --json``."""
        row = {k: getattr(self, k) for k in self.__dataclass_fields__ if k not in ("plain", "prefixed")}
        for name in ("vertical", "horizontal"):
            row[name] = asdict(row[name])
        for name in ("tokens", "sensitivities", "advice"):
            row[name] = [asdict(x) for x in row[name]]
        row["plain"] = _figures(self.plain)
        row["prefixed"] = None if self.prefixed is None else _figures(self.prefixed)
        return row


def inspect(
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: str = DEFAULT_TEXT,
    windows: int = 4,
    seqlen: int = 512,
    progress: Progress | None = None,
) -> Inspection:
    """Inspect a full-precision model, or a checkpoint against the one it was made from.

    Args:
        model: full-precision model, or a checkpoint if ``against`` is given.
        against: the checkpoint's full-precision model.
        text: see :func:`sordino.corpus.load_text`.
        windows: how many windows from the start of the text.
        seqlen: tokens of a window, at least 8.
        progress: told (what, done, total).

    Raises:
        InputError: if something cannot be loaded, is (not) quantized where it should (not) be, or the text is too short.
    """
    started = time.time()
    if seqlen < 8 or windows < 1:
        raise InputError(f"--windows {windows} --seqlen {seqlen}: at least 1 window of 8 tokens is looked at")
    cut = Windows(load_text(text), seqlen, windows)
    name = model if against is None else against
    exact, tokenizer = load(name, dtype=torch.float32)
    _check_plain(exact, name)
    anatomy, ids = anatomy_of(exact), cut.of(tokenizer, exact, name)
    checkpoint = None if against is None else _checkpoint(model, cut, ids, exact, name)
    exact.set_attn_implementation(WINDOW_ATTENTION)
    plain = look(exact, anatomy, ids, THRESHOLD, progress)
    prefix = list(choose(plain.outliers, first_token(exact.config)))
    rounded = rounded_copy(exact, anatomy, BITS, progress)
    costs = sensitivities(exact, rounded, anatomy, ids, BITS, progress)
    across = horizontal(exact, anatomy, ids[: SPREAD[0], : SPREAD[1]], BITS, progress=progress)
    prefixed = _behind(exact, anatomy, prefix, ids, progress) if prefix else None
    depth = _depth(exact, rounded if checkpoint is None else checkpoint, anatomy, ids, progress)
    named = sorted(plain.tokens.values(), key=lambda t: (-t.times, t.id))
    words = dict(zip([t.id for t in named], tokenizer.convert_ids_to_tokens([t.id for t in named]), strict=True))
    return Inspection(
        model=str(name),
        checkpoint=None if against is None else str(model),
        text=text,
        windows=len(ids),
        seqlen=seqlen,
        bits=BITS,
        prefix=prefix,
        prefix_tokens=[str(t) for t in tokenizer.convert_ids_to_tokens(prefix)],
        plain=plain,
        prefixed=prefixed,
        tokens=[NamedToken(str(words[t.id]), t.id, t.times, t.first, t.ratio, t.block) for t in named],
        sensitivities=costs,
        vertical=depth,
        horizontal=across,
        advice=advise(plain, prefixed, costs, depth, across, str(name)),
        seconds=round(time.time() - started, 2),
    )


def _check_plain(model: Any, name: str | Path) -> None:
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError(f"{name} is quantized: give --against and the model it was made from")


def _checkpoint(name: str | Path, cut: Windows, ids: Tensor, exact: Any, origin: str | Path) -> Any:
    """The quantized model, ready to read windows."""
    found, tokenizer = load(name, dtype=torch.float32)
    if getattr(found.config, "quantization_config", None) is None:
        raise InputError(f"{name} is not quantized; --against is for a checkpoint and the model it was made from")
    shapes = [(m.config.model_type, m.config.hidden_size, m.config.num_hidden_layers) for m in (found, exact)]
    if shapes[0] != shapes[1] or not torch.equal(cut.of(tokenizer, found, name), ids):
        raise InputError(f"{name} was not made from {origin}: it has another shape or another tokenizer")
    found.set_attn_implementation(WINDOW_ATTENTION)
    return found


def _behind(exact: Any, anatomy: Anatomy, prefix: list[int], ids: Tensor, progress: Progress | None) -> Activations:
    _attach(exact, prefix)
    try:
        return look(exact, anatomy, ids, THRESHOLD, progress)
    finally:
        _detach(exact)


def _depth(exact: Any, rounded: Any, anatomy: Anatomy, ids: Tensor, progress: Progress | None) -> Vertical:
    """Errors along depth, full precision with the checkpoint's prefix."""
    prefix = list(getattr(getattr(rounded.config, "quantization_config", None), "prefix", []))
    last = anatomy.n_blocks - 1
    singles = sorted({last * k // 4 for k in range(4)})
    if prefix:
        _attach(exact, prefix)
    try:
        return vertical(exact, rounded, ids, singles, progress)
    finally:
        _detach(exact)


def _attach(model: Any, prefix: list[int]) -> None:
    attach(model, prefix)
    model.set_attn_implementation(WINDOW_ATTENTION)


def _detach(model: Any) -> None:
    for module in model.modules():
        for name in (KEY, VALUE):
            if name in getattr(module, "_buffers", {}):
                delattr(module, name)


def _figures(found: Activations) -> dict[str, Any]:
    """Without the maxima of every channel: the largest over the median one, and which the largest are."""
    channels: dict[str, list[dict[str, Any]]] = {}
    for site in SITES:
        channels[site] = []
        for peaks in found.channels[site]:
            top = peaks.topk(min(5, len(peaks)))
            ratio = float(top.values[0] / peaks.median().clamp(min=1e-30))
            channels[site].append({"ratio": ratio, "largest": float(top.values[0]), "channels": top.indices.tolist()})
    return {
        "down_ratios": found.ratios,
        "down_ratios_rotated": found.rotated,
        "lower_ratios": found.lower,
        "ranges": found.ranges,
        "channels": channels,
        "outlier_tokens_a_window": found.outliers.means,
    }
