"""What surrounds the blocks: token embedding, final norm, head, in the widths the recipe asks for.

Also the final guard (DESIGN section 4, guard c): the quantized model's divergence from full precision on held-out
windows must not exceed that of the same model rounded by RTN.
Shapes: N windows, L tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sordino.numerics.affine import AffineGrid
from sordino.numerics.divergence import token_kl
from sordino.runtime.modules import pack_linear
from sordino.walk.plan import Plan
from sordino.walk.source import Source

# Rows of the final logits that are compared at once; a vocabulary of 128 k in fp32 makes 64 MB of them.
_ROWS = 128
_CHUNK = 1 << 22  # table entries that are rounded at once


class Ends:
    """Embedding, final norm and head of the checkpoint.

    Attributes:
        tensors: everything outside the blocks, by full name, as it will be stored.
        guard: figures of the final guard, empty if it did not run.
    """

    def __init__(self, source: Source, plan: Plan):
        self.plan, self.anatomy = plan, plan.anatomy
        self._table = source.tensor(f"{self.anatomy.embeddings}.weight")
        self._head = self._table if self.anatomy.tied else source.tensor(f"{self.anatomy.head}.weight")
        inside = self.anatomy.blocks + "."
        ends = [f"{self.anatomy.embeddings}.weight", f"{self.anatomy.head}.weight"]
        self.tensors = {n: source.tensor(n) for n in source.names if not n.startswith(inside) and n not in ends}
        self._q_table = self._store(self.anatomy.embeddings, self._table, plan.recipe.format.embeddings)
        if self.anatomy.tied:
            self._q_head = self._q_table
        else:
            self._q_head = self._store(self.anatomy.head, self._head, plan.recipe.format.head)
        self.guard: dict[str, float] = {}

    def of(self, module: str) -> dict[str, Tensor]:
        """Stored tensors of a module outside the blocks, by name inside it."""
        return {n.removeprefix(f"{module}."): x for n, x in self.tensors.items() if n.startswith(f"{module}.")}

    def embed(self, ids: Tensor, exact: bool, rotated: bool = True) -> Tensor:
        """Embeddings of token ids [N, L] in the compute dtype, [N, L, D]; ``exact`` takes the full-precision table.

        ``rotated`` puts them into the basis of the reshaped blocks, if there is one.
        """
        x = F.embedding(ids, self._table if exact else self._q_table).to(self.plan.dtype)
        return x if self.plan.basis is None or not rotated else self.plan.basis.apply(x)

    def final_guard(self, fp: Tensor, q: Tensor, rtn: Tensor, ids: Tensor, norm: nn.Module, q_norm: nn.Module) -> None:
        """Compare KL to full precision of the quantized and the RTN model on the held-out windows they share.

        Perplexities and agreement come along for the report.

        Args:
            fp: final hidden states of the full-precision model, [N, L, D].
            q: of the quantized one; at least as many windows as ``rtn``.
            rtn: of the RTN model.
            ids: the windows' token ids [N, L]; as many as of ``rtn``.
            norm: the final norm.
            q_norm: the quantized model's.
        """
        n = self.plan.rtn_windows
        with torch.no_grad():
            ours, theirs = self._apart(fp[:n], q[:n], ids, norm, q_norm), self._apart(fp[:n], rtn, ids, norm, norm)
        self.guard = ours | {"rtn_kl": theirs["kl"], "rtn_ppl": theirs["ppl"]}

    def heads(self) -> tuple[Tensor, Tensor]:
        """Output tables [V, D] in the compute dtype: as stored, and in full precision."""
        return self._q_head.to(self.plan.dtype), self._head.to(self.plan.dtype)

    def _apart(self, fp: Tensor, q: Tensor, ids: Tensor, norm: nn.Module, q_norm: nn.Module) -> dict[str, float]:
        """Mean KL in nats a token, share of tokens whose likeliest next token is the same, and both perplexities."""
        kl, same, count = 0.0, 0, fp.shape[0] * fp.shape[1]
        losses, scored = [0.0, 0.0], fp.shape[0] * (fp.shape[1] - 1)
        following = F.pad(ids[:, 1:], (0, 1), value=-1).flatten()  # the last token of a window has none
        q_head, head = self.heads()
        for a, b, after in zip(*(x.split(_ROWS) for x in (fp.flatten(0, 1), q.flatten(0, 1), following)), strict=True):
            logs = [torch.log_softmax(F.linear(*x).float(), -1) for x in ((norm(a), head), (q_norm(b), q_head))]
            kl += float(token_kl(*logs).sum())
            same += int((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
            for i, log in enumerate(logs):
                losses[i] += float(F.nll_loss(log, after, ignore_index=-1, reduction="sum"))
        fp_ppl, ppl = (math.exp(min(x / scored, 700.0)) for x in losses)
        return {"kl": kl / count, "ppl": ppl, "fp_ppl": fp_ppl, "top1_agreement": same / count}

    def _store(self, name: str, weight: Tensor, bits: int) -> Tensor:
        """Put a table into ``tensors`` at its width (row-wise, symmetric); returns the values it then holds."""
        if bits == 16:
            self.tensors[f"{name}.weight"] = weight
            return weight
        grid = AffineGrid(bits, symmetric=True)
        packed: dict[str, list[Tensor]] = {}
        values = []
        for rows in weight.split(max(1, _CHUNK // weight.shape[1])):  # a large table in fp32 would not fit
            params = grid.fit_groups(rows.float(), rows.shape[1])
            codes, exact = grid.nearest(rows.float(), params)
            values.append(exact.to(weight.dtype))
            for key, part in pack_linear(codes.to(torch.uint8), params.scale, params.zero, bits, True).items():
                packed.setdefault(key, []).append(part)
        self.tensors |= {f"{name}.{k}": torch.cat(parts) for k, parts in packed.items()}
        return torch.cat(values)
