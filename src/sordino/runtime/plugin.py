"""The transformers plugin: ``import sordino``, then ``from_pretrained`` loads a Sordino checkpoint.

The checkpoint's ``config.json`` carries ``quantization_config = {"quant_method": "sordino", …}`` with the formats of
its linears; before transformers loads a weight, the linears named there are replaced by :class:`QuantLinear`.
"""

from __future__ import annotations

import fnmatch
import re
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sordino.errors import InputError
from sordino.numerics.basis import Basis
from sordino.numerics.kv import KvGrid
from sordino.runtime.attention import install, round_kv
from sordino.runtime.block import decode_in_one_call
from sordino.runtime.inner import ATTENTION, dress
from sordino.runtime.modules import (
    QuantEmbedding,
    QuantLinear,
    TiedHead,
    give_bias,
    in_basis,
    out_of_basis,
    store_basis,
    stored_basis,
)
from sordino.runtime.prefix import give_prefix
from sordino.runtime.stored import check_stored

# 2: `input_scale` of dynamic inputs too, `inner`, `kv`; 3: `kept`, `side`, channels in order; 4: `column`; 5: inputs with zero
# points.
FORMAT_VERSION = 5


@register_quantization_config("sordino")
class SordinoConfig(QuantizationConfigMixin):
    """How a checkpoint is stored.

    Attributes:
        groups: formats of linears: ``{"bits", "group", "symmetric", "modules": [name patterns]}``, and where they differ
            from a plain affine grid and plain inputs ``"grid"``, ``"inputs"`` (numerics/inputs.py), ``"kept"``: so many last
            columns have 8 bits, ``"side"``: rank of a pair that is added, ``"column"``: a scale of every input.
        embeddings: 16 (plain) or 8.
        head: 16 (plain), 8 or 4.
        biases: name patterns of norms and linears that have a bias which their family does not.
        prefix: ids of the tokens whose keys and values stand before every text.
        system_prompt: its ``{"text", "tokens"}``: so many last ones of the prefix; None for none.
        basis: of the residual stream inside the blocks, ``{"size", "signs"}``; None for the model's own. Where ``signs`` is
            None, it was learned and is stored, as a buffer of the final norm.
        inner: what runs inside the blocks: turns of "values", "keys", "down", "key-means", or an order of "channels"
            (runtime/inner.py).
        kv: how keys and values are rounded, ``{"bits", "symmetric", "static", "blocks": [first, last + 1]}``; None for not.
        format_version: version of this layout.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]] | None = None,
        embeddings: int = 16,
        head: int = 16,
        biases: list[str] | None = None,
        basis: dict[str, Any] | None = None,
        prefix: list[int] | None = None,
        inner: list[str] | None = None,
        kv: dict[str, Any] | None = None,
        system_prompt: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ):
        unknown.pop("quant_method", None)
        if type(format_version) is not int:
            raise InputError(f"the checkpoint's quantization_config.format_version is no number: {format_version!r}")
        if format_version > FORMAT_VERSION:
            raise InputError(f"checkpoint format {format_version} is newer than this Sordino reads ({FORMAT_VERSION})")
        check_stored(
            {"groups": groups or [], "embeddings": embeddings, "head": head, "biases": biases or [], "basis": basis}
            | {"prefix": prefix or [], "inner": inner or [], "kv": kv, "system_prompt": system_prompt}
        )
        if format_version < 2 and any("inputs" in group for group in groups or []):
            raise InputError("this checkpoint with rounded inputs was made by an older Sordino; quantize the model again")
        self.quant_method = "sordino"  # type: ignore[assignment]
        self.groups, self.embeddings, self.head = groups or [], embeddings, head
        self.biases, self.basis, self.prefix = biases or [], basis, prefix or []
        self.inner, self.kv, self.system_prompt = inner or [], kv, system_prompt
        self.format_version = format_version

    def to_dict(self) -> dict[str, Any]:
        """As stored in ``config.json``."""
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "embeddings": self.embeddings,
            "head": self.head,
            "groups": self.groups,
            "biases": self.biases,
            "basis": self.basis,
            "prefix": self.prefix,
            "system_prompt": self.system_prompt,
            "inner": self.inner,
            "kv": self.kv,
        }


@register_quantizer("sordino")
class SordinoQuantizer(HfQuantizer):
    """Swaps modules before the weights come in; nothing is converted on load."""

    requires_calibration = True
    quantization_config: SordinoConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        quantize_skeleton(model, self.quantization_config)

    def is_serializable(self, **_: Any) -> bool:
        """Yes: save_pretrained writes the packed buffers as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: codes are integers."""
        return False


def quantize_skeleton(model: nn.Module, config: SordinoConfig) -> None:
    """Replace the linears (and embedding, head) that ``config`` names by empty quantized modules, in place.

    Raises:
        InputError: if a pattern matches nothing.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for group in config.groups:
        for pattern in group["modules"]:
            matched = fnmatch.filter(linears, pattern)
            if not matched:
                raise InputError(f"the checkpoint quantizes '{pattern}', which this model does not have")
            for name in matched:
                _swap_linear(model, name, linears[name], group)
    for pattern in config.biases:
        matched = fnmatch.filter([n for n, _ in model.named_modules()], pattern)
        if not matched:
            raise InputError(f"the checkpoint adds a bias to '{pattern}', which this model does not have")
        for name in matched:
            give_bias(model.get_submodule(name))
    if config.embeddings == 8:
        _swap_embedding(model, tied=bool(model.config.tie_word_embeddings))  # type: ignore[union-attr]
    _dress(model, config)
    if config.basis is not None:
        _rotate(model, config.basis)


def _swap_linear(model: nn.Module, name: str, old: nn.Linear, group: dict[str, Any]) -> None:
    size = old.in_features if group["group"] == "channel" else group["group"]
    for width in (size, (group.get("inputs") or {}).get("group") or 1):
        if old.in_features % width:
            raise InputError(f"the checkpoint has groups of {width} channels in '{name}', which has {old.in_features}")
    with torch.device("meta"):
        new = QuantLinear(
            old.in_features,
            old.out_features,
            old.bias is not None,
            group["bits"],
            size,
            bool(group["symmetric"]),
            group.get("grid", "affine"),
            group.get("inputs"),
            group.get("kept", 0),
            group.get("side", 0),
            group.get("column", False),
        )
        if new.bias is not None:
            new.bias = nn.Parameter(new.bias.to(old.weight.dtype), requires_grad=False)
    model.set_submodule(name, new)


def _dress(model: Any, config: SordinoConfig) -> None:
    """Give every block its online rotations, and every attention module empty buffers for its scales and the prefix."""
    heads = model.config.num_key_value_heads
    kv = dict(config.kv or {})
    rounded, grid = range(*kv.pop("blocks", (0, 0))), KvGrid(**kv) if kv else None
    for index, block in enumerate(model.get_decoder().layers):
        dress(block, config.inner)
        attention = block.get_submodule(ATTENTION)
        if grid is not None and index in rounded:
            round_kv(attention, grid, *(torch.empty(heads, device="meta") for _ in range(2)))
        if config.prefix:
            shape = (1, heads, len(config.prefix), attention.head_dim)
            give_prefix(attention, *(torch.empty(shape, dtype=model.dtype, device="meta") for _ in range(2)))
    if config.prefix or config.kv is not None or {"keys", "key-means"} & set(config.inner):
        install(model)
    decode_in_one_call(model.get_decoder())


def _rotate(model: Any, given: dict[str, Any]) -> None:
    """Blocks work in a rotated basis: go there after the embedding, and come back before the final norm."""
    embedding, norm = model.get_input_embeddings(), model.get_decoder().norm
    if model.config.hidden_size % given["size"]:
        raise InputError(f"the checkpoint's basis of {given['size']} does not fit {model.config.hidden_size} channels")
    if given["signs"] is not None:
        basis = Basis(**given)
        in_basis(embedding, basis)
        out_of_basis(norm, basis)
    else:  # its numbers are not there yet
        store_basis(norm, torch.empty(given["size"], given["size"], dtype=torch.float32, device="meta"))
        embedding.register_forward_hook(partial(_into_stored, norm))
        norm.register_forward_pre_hook(_out_of_stored)


def _into_stored(norm: nn.Module, _: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
    return stored_basis(norm).apply(out)


def _out_of_stored(norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (stored_basis(norm).undo(args[0]), *args[1:])


def _swap_embedding(model: Any, tied: bool) -> None:
    old = model.get_input_embeddings()
    with torch.device("meta"):
        table = QuantEmbedding(old.num_embeddings, old.embedding_dim, old.weight.dtype)
    model.set_input_embeddings(table)
    model.resize_token_embeddings = partial(_same_size, table)
    if tied:
        model.set_output_embeddings(TiedHead(table))
        # One table, no second name: there is nothing left for transformers to tie.
        model._tied_weights_keys = None
        model.all_tied_weights_keys = {}


def _same_size(table: QuantEmbedding, new_num_tokens: int | None = None, *_: Any, **__: Any) -> QuantEmbedding:
    """In place of transformers' ``resize_token_embeddings``, which knows no rows of codes."""
    if new_num_tokens not in (None, table.num_embeddings):
        raise InputError(
            f"the embeddings of this checkpoint have 8 bits and stay {table.num_embeddings}; "
            "to pad, take a token that there is: tokenizer.pad_token = tokenizer.eos_token"
        )
    return table


def compress_names(names: list[str], blocks: str, n_blocks: int) -> list[str]:
    """Shorten ``{blocks}.{i}.rest`` to ``{blocks}.*.rest`` where all blocks are there; keep other names as they are."""
    pattern = re.compile(rf"{re.escape(blocks)}\.(\d+)\.(.+)")
    per_rest: dict[str, list[str]] = {}
    out = []
    for name in names:
        hit = pattern.fullmatch(name)
        if hit:
            per_rest.setdefault(hit[2], []).append(name)
        else:
            out.append(name)
    for rest, members in per_rest.items():
        out += [f"{blocks}.*.{rest}"] if len(members) == n_blocks else members
    return out
