"""Look at a model before quantizing it, and at a checkpoint's errors against the model it was made from.

Everything but the vertical errors of a given checkpoint is measured on the full-precision model, in fp32 so that small
differences are not those of the arithmetic. Shapes: N windows of L tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sordino.anatomy import Anatomy, anatomy_of
from sordino.api import load
from sordino.contract import Progress
from sordino.corpus import DEFAULT_TEXT, load_text
from sordino.errors import InputError
from sordino.measure.activations import Activations, look
from sordino.measure.advice import Advice, advise
from sordino.measure.diffusion import Horizontal, horizontal
from sordino.measure.evaluate import Windows, final_states
from sordino.measure.propagation import Vertical, vertical
from sordino.measure.sensitivity import Sensitivity, names_of, round_weights, sensitivities, with_weights
from sordino.protect.prefix import THRESHOLD, choose
from sordino.report.notebook import Figure, chosen, picture, table
from sordino.runtime.attention import attach
from sordino.runtime.prefix import KEY, VALUE
from sordino.walk.attention import NAME as WINDOW_ATTENTION
from sordino.walk.prefix import first_token

BITS = 4
SPREAD = (2, 256)  # windows and tokens of the interventions: they take a forward for every source


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
    sensitivities: list[Sensitivity]
    vertical: Vertical
    horizontal: Horizontal
    advice: list[Advice]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As written by ``sordino inspect --json``."""
        row = {k: getattr(self, k) for k in self.__dataclass_fields__}
        for name in ("vertical", "horizontal"):
            row[name] = asdict(row[name])
        for name in ("sensitivities", "advice"):
            row[name] = [asdict(x) for x in row[name]]
        for name in ("plain", "prefixed"):
            row[name] = row[name] and row[name].to_json()
        return row

    def lines(self) -> list[tuple[str, str]]:
        """The most telling figures, as (figure, value)."""
        kl = {(c.what, c.where): f"{c.kl:.4f}" for c in self.sensitivities}
        peak, block = max((ratio, i) for i, ratio in enumerate(self.plain.ratios))
        loudest = self.plain.loudest[block]
        lines = [
            ("full-precision model", self.model),
            *([("checkpoint held against it", self.checkpoint)] if self.checkpoint else []),
            ("text", f"{self.text}, {self.windows} windows of {self.seqlen} tokens"),
            (
                "largest over median token at the input of down_proj",
                f"{peak:.1f} in block {block}; most of all {loudest.token!r} in place {loudest.place}, {loudest.ratio:.1f}",
            ),
            (
                "prefix that the move would choose",
                " ".join(map(repr, self.prefix_tokens)) or "none: no token stands out enough",
            ),
        ]
        if self.prefixed is not None:
            after = self.prefixed.ratios
            lines.append(("the same behind that prefix", f"{after[block]:.1f} there, {max(after):.1f} in the worst block"))
        lines += [
            (f"KL, weights rounded to {self.bits} bits", kl["weights", "all"]),
            (f"KL, inputs at {self.bits} bits", kl["inputs", "all"]),
            (f"KL, inputs at {self.bits} bits behind a rotation", kl["rotated inputs", "all"]),
            (f"KL, keys and values at {self.bits} bits", kl["keys and values", "all"]),
            ("error behind the last block over that block's own", f"{self.vertical.ratio[-1]:.1f}"),
            ("time", f"{self.seconds:.0f} s"),
        ]
        return lines

    def figure(self, label: str | None = None) -> Figure:
        """One of the page's plots of lines or maps of channels, by a name like "error along depth".

        Args:
            label: which; the first one if not given.

        Raises:
            InputError: if there is none of that name, naming those there are.
        """
        from sordino.report.inspect import drawings  # which draws what this file finds

        return picture(chosen(drawings(self), label))

    def _repr_html_(self) -> str:
        return table(self.lines())


def inspect(
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: str | Path = DEFAULT_TEXT,
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
    if not bool(final_states(exact, ids[0]).isfinite().all()):
        raise InputError(f"{name} answers with what is no number (NaN): a weight is broken, there is nothing to look at")
    words = tokenizer.convert_ids_to_tokens
    plain, prefix, prefixed = _look(exact, anatomy, ids, words, progress)
    rounded = round_weights(exact, anatomy, BITS, progress)
    costs = sensitivities(exact, rounded, anatomy, ids, BITS, progress)
    across = horizontal(exact, anatomy, ids[: SPREAD[0], : SPREAD[1]], BITS, progress=progress)
    simulated = partial(with_weights, exact, rounded, names_of(anatomy, anatomy.linears))
    depth = _depth(exact, checkpoint, simulated, ids, progress)
    return Inspection(
        model=str(name),
        checkpoint=None if against is None else str(model),
        text=cut.text.spec,
        windows=len(ids),
        seqlen=seqlen,
        bits=BITS,
        prefix=prefix,
        prefix_tokens=[str(t) for t in words(prefix)],
        plain=plain,
        prefixed=prefixed,
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


def _look(
    exact: Any, anatomy: Anatomy, ids: Tensor, words: Callable[[list[int]], list[str]], progress: Progress | None
) -> tuple[Activations, list[int], Activations | None]:
    """Activations as they are, the prefix that the move would choose, and activations behind it."""
    plain = look(exact, anatomy, ids, THRESHOLD, progress)
    plain.name_tokens(words)
    prefix = list(choose(plain.outliers, first_token(exact.config)))
    if not prefix:
        return plain, prefix, None
    with _behind(exact, prefix):
        prefixed = look(exact, anatomy, ids, THRESHOLD, progress)
    prefixed.name_tokens(words)
    return plain, prefix, prefixed


def _depth(
    exact: Any,
    checkpoint: Any,
    simulated: Callable[[], AbstractContextManager[Any]],
    ids: Tensor,
    progress: Progress | None,
) -> Vertical:
    """Errors along depth; full precision stands behind the checkpoint's prefix too."""
    prefix = [] if checkpoint is None else list(getattr(checkpoint.config.quantization_config, "prefix", []))
    last = exact.config.num_hidden_layers - 1
    singles = sorted({last * k // 4 for k in range(4)})
    with _behind(exact, prefix):
        return vertical(exact, simulated if checkpoint is None else lambda: nullcontext(checkpoint), ids, singles, progress)


@contextmanager
def _behind(model: Any, prefix: list[int]) -> Iterator[None]:
    """Let tokens, if any, stand before every text for a while."""
    if prefix:
        attach(model, prefix)
        model.set_attn_implementation(WINDOW_ATTENTION)
    try:
        yield
    finally:
        for module in [m for m in model.modules() if hasattr(m, KEY)]:
            delattr(module, KEY)
            delattr(module, VALUE)
