"""Ladder of D²Quant's parts at 2 and 3 bits, and Sordino's own best, on smollm2; see ladder.py.

python benchmarks/d2quant.py --calibrate wiki.valid.raw --evaluate wiki.test.raw --also c4.txt [--only NAME …]
"""

from __future__ import annotations

from ladder import Ladder, climb

SEEDS = [0, 1, 2]
DOWN = "format.weights.override"
GPTQ = 'format.weights.solver={name="gptq"}'
TUNED = '{{move="tune", epochs={}}}'
SHORT = f'moves=[{TUNED.format(1)}, {{move="distill", epochs=1, scales=0.003, gains=0.003}}]'
# The presets' first form: one bit more for v_proj alone, and groups as in the other linears.
FIRST = {
    bits: f'{DOWN}=[{{match="*.v_proj", bits={bits + 1}}}, {{match="*.down_proj", column_scale=true}}]' for bits in (2, 3)
} | {4: f'{DOWN}=[{{match="*.down_proj", group=64, column_scale=true}}, {{match="*.v_proj", bits=5}}]'}
# Tuning that can flip codes, then a distillation of scales and gains that sees most of the validation text.
BOTH = 'moves=[{{move="tune", epochs=1}}, {{move="distill", epochs={}, windows=416, scales=0.003, gains=0.003}}]'
# The same behind evened value channels (reshape/smooth.py).
EVEN = BOTH.replace('[{{move="tune"', '[{{move="smooth", down=false}}, {{move="tune"')
FINAL = 'moves=[{move="rotate"}, {move="mean-shift", always=true, final=true}]'
# The presets' training behind a prefix of outlier tokens.
PARKED = f'[{{move="prefix"}}, {TUNED.format(4)}, {{move="distill", epochs=1, times=3.25, scales=0.003, gains=0.003}}]'
# No tuning of blocks; the distillation sees 416 windows, most of the validation text, where the walk sees 128.
MORE = 'moves=[{{move="distill", epochs={}, windows=416, scales=0.003, gains=0.003}}]'


def rungs(bits: int) -> Ladder:
    """Each rung adds one part; the last four are the systems whole, and with one move out."""
    w, paper = f"d2quant-w{bits}", f"d2quant-paper-w{bits}"
    plain, rotate = f"{DOWN}=[]", 'moves=[{move="rotate"}]'
    return {
        f"rtn-w{bits}": ("rtn-w4", [f"format.weights.bits={bits}"], [0]),
        f"gptq-w{bits}": (f"gptq-w{bits}", [], SEEDS),
        f"gptaq-w{bits}": (f"gptaq-w{bits}", [], SEEDS),
        # The whole of GPTAQ is about making up for what the stream has lost; does it leave anything to the mean shift?
        f"rotated gptq-w{bits}": (w, [plain, rotate, GPTQ], SEEDS),
        f"rotated gptq-w{bits} + mean shift": (w, [plain, GPTQ], SEEDS),
        f"rotated gptaq-w{bits}": (w, [plain, rotate], SEEDS),
        f"rotated gptaq-w{bits} + mean shift": (w, [plain], SEEDS),
        f"rotated gptaq-w{bits} + column scale": (paper, [rotate], SEEDS),
        f"rotated gptaq-w{bits} + additive grid": (w, [f"{DOWN}.0.column_scale=false", rotate], SEEDS),
        f"rotated gptaq-w{bits} + additive dual scale": (w, [rotate], SEEDS),
        f"d2quant-paper-w{bits}": (paper, [], SEEDS),
        f"d2quant-w{bits}": (w, [], SEEDS),
        # The released code corrects the final norm too.
        f"d2quant-w{bits} + final norm": (w, [FINAL], SEEDS),
        # Fewer scales on down_proj: no more bits than the rows it is compared with.
        f"d2quant-w{bits}, groups of 384": (w, [f"{DOWN}.0.group=384"], [0]),
        f"d2quant-w{bits} without rotation": (w, ['moves=[{move="mean-shift", always=true}]'], SEEDS),
    }


def own(bits: int) -> Ladder:
    """Sordino's own best: what each of its parts adds."""
    best, free, name = f"w{bits}", "moves=[]", f"w{bits}, first form"
    solver, tune = "format.weights.solver", int(bits == 4)  # where `tune` stands among the moves
    others = [(4, 1)] if bits == 4 else [(1, 2), (3, 2), (8, 1)]  # epochs of tuning and of distillation

    def epochs(tuned: int, distilled: int) -> list[str]:
        return [f"moves.{tune}.epochs={tuned}", f"moves.{tune + 1}.epochs={distilled}"]

    first: Ladder = {
        name: (best, [FIRST[bits], SHORT], [0]),
        f"{name}, no training": (best, [FIRST[bits], free], [0]),
        f"{name}, longer": (best, [FIRST[bits], SHORT.replace("epochs=1", "epochs=6").replace("epochs=6", "epochs=2", 1)], [0]),
        f"{name}, tuned, more text": (best, [FIRST[bits], BOTH.format(1)], [0]),
        f"{name}, tuned, more text, smooth": (best, [FIRST[bits], EVEN.format(1)], [0]),
        f"{name}, tuned, more text, twice": (best, [FIRST[bits], BOTH.format(2)], SEEDS),
        f"{name}, tuned, more text, twice, smooth": (best, [FIRST[bits], EVEN.format(2)], [0]),
        f"{name}, tuned, more text, twice, smaller steps": (best, [FIRST[bits], BOTH.format(2).replace("0.003", "0.001")], [0]),
        f"{name}, more text, twice": (best, [FIRST[bits], MORE.format(2)], [0]),
    }
    return first | {
        f"w{bits}, GPTAQ as published": (best, [free, f'{solver}={{name="gptaq"}}'], [0]),
        f"w{bits}, whole target": (best, [free, f"{solver}.weighted=false", f"{solver}.refit=false"], [0]),
        f"w{bits}, whole target, refit": (best, [free, f"{solver}.weighted=false"], [0]),
        f"w{bits}, no training": (best, [free], SEEDS),
        f"w{bits}, tuned only": (best, [f"moves=[{TUNED.format(1)}]"], [0]),
        f"w{bits}, short": (best, [SHORT], SEEDS),
        **{f"w{bits}, tuned {a}, distilled {b}": (best, epochs(a, b), SEEDS) for a, b in others},
        f"w{bits}": (best, [], SEEDS),
        f"w{bits}, prefix": (best, [f"moves={PARKED}"], [0]),
        f"w{bits}, no training, prefix": (best, ['moves=[{move="prefix"}]'], [0]),
    }


LADDER: Ladder = {
    **rungs(2),
    **rungs(3),
    **own(2),
    **own(3),
    **own(4),
}

if __name__ == "__main__":
    climb(__doc__, LADDER, "d2quant.jsonl")
