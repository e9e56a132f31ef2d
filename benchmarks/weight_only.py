"""Ladder of rounding to nearest, GPTQ and GPTAQ on smollm2; see ladder.py.

python benchmarks/weight_only.py --calibrate wiki.valid.raw --evaluate wiki.test.raw [--only NAME …]
"""

from __future__ import annotations

from ladder import Ladder, climb

G64, SYM = "format.weights.group=64", "format.weights.symmetric=true"

LADDER: Ladder = {
    "rtn-w4": ("rtn-w4", [], [0]),
    "gptq-w4": ("gptq-w4", [], [0]),
    "rtn-w3": ("rtn-w4", ["format.weights.bits=3"], [0]),
    "gptq-w3": ("gptq-w3", [], [0, 1, 2]),
    "gptaq-w3": ("gptaq-w3", [], [0, 1, 2]),
    "rtn-w2": ("rtn-w4", ["format.weights.bits=2"], [0]),
    "gptq-w2": ("gptq-w2", [], [0]),
    "gptaq-w2": ("gptaq-w2", [], [0]),
    "rtn-w4 g64 sym": ("rtn-w4", [G64, SYM], [0]),
    "gptq-w4 g64 sym": ("gptq-w4", [G64, SYM], [0]),
    "rtn-w3 g64 sym": ("rtn-w4", ["format.weights.bits=3", G64, SYM], [0]),
    "gptq-w3 g64 sym": ("gptq-w3", [G64, SYM], [0]),
    "gptaq-w3 g64 sym": ("gptaq-w3", [G64, SYM], [0]),
    "rtn-w2 g64 sym": ("rtn-w4", ["format.weights.bits=2", G64, SYM], [0]),
    "gptq-w2 g64 sym": ("gptq-w2", [G64, SYM], [0]),
    "gptaq-w2 g64 sym": ("gptaq-w2", [G64, SYM], [0]),
}

if __name__ == "__main__":
    climb(__doc__, LADDER, "weight_only.jsonl")
