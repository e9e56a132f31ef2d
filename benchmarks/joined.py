"""The three systems joined, each part left out or put in, beside the systems alone; see ladder.py.

python benchmarks/joined.py --calibrate wiki.valid.raw --evaluate wiki.test.raw --also c4.txt [--model …] [--only NAME …]
"""

from __future__ import annotations

from bisup import NONE, RANK, TELL
from ladder import Ladder, climb
from prefixquant import EVEN, PREFIX

CLIP = "clips=0.01"
NO_R4 = EVEN.replace('"rotate-inner"', '"rotate-inner", down=false')
CLIPS = f'{{move="tune", epochs=1, {NONE}, {CLIP}, {RANK}}}'
TUNE, TUNE_4, SHIFT = '{move="tune", epochs=1}', '{move="tune", epochs=4}', '{move="mean-shift"}'
DISTILL = '{move="distill", epochs=1, scales=0.003, gains=0.003}'
CENTER, EVEN_CODES = '{move="center"}', "format.activations.symmetric=true"
COLUMN = 'format.weights.override=[{match="*.down_proj", column_scale=true}]'


def moves(*parts: str) -> str:
    """A recipe's moves."""
    return f"moves=[{', '.join(parts)}]"


def rows(bits: int) -> Ladder:
    """Rows of one width: the systems alone, the preset, and its first form, whose parts were left out or put in."""
    name = f"w{bits}a{bits}"
    joined = f"joined-{name}kv{bits}"
    first = {
        "": trained(),
        ", untrained": moves(EVEN, PREFIX),
        ", without prefix": moves(EVEN, CLIPS, TUNE, DISTILL),
        ", without clips and low rank": moves(EVEN, PREFIX, TUNE, DISTILL),
        ", without roundings": moves(EVEN, PREFIX, CLIPS, DISTILL),
        ", without distillation": moves(EVEN, PREFIX, CLIPS, TUNE),
        ", with mean shift": moves(EVEN, PREFIX, CLIPS, TUNE, SHIFT, DISTILL),
        ", with means off": trained(CENTER),
        ", without R4": moves(NO_R4, PREFIX, CLIPS, TUNE, DISTILL),
    }
    return {
        f"quarot-{name}": (f"quarot-{name}", [TELL], [0]),
        f"bisup-quarot-{name}": (f"bisup-quarot-{name}", [TELL], [0]),
        **{f"{joined}, first form{what}": (joined, [EVEN_CODES, made], [0]) for what, made in first.items()},
        f"{joined}, first form, without R4, column scale": (joined, [EVEN_CODES, COLUMN, first[", without R4"]], [0]),
        f"{joined}, first form, with zero points": (joined, [trained()], [0]),
        f"{joined}, first form, with means off, zero points": (joined, [trained(CENTER)], [0]),
        joined: (joined, [], [0]),
        f"{joined}, without prefix": (joined, [moves(CENTER, EVEN, CLIPS, TUNE_4, DISTILL)], [0]),
        f"{joined}, without clips and low rank": (joined, [moves(CENTER, EVEN, PREFIX, TUNE_4, DISTILL)], [0]),
    }


def trained(*before: str) -> str:
    """Moves of the first form, behind others."""
    return moves(*before, EVEN, PREFIX, CLIPS, TUNE, DISTILL)


LADDER: Ladder = {
    **rows(4),
    **rows(3),
    "prefixquant-w4a4kv4-dynamic-tuned": ("prefixquant-w4a4kv4-dynamic-tuned", [TELL], [0]),
    "prefixquant-w4a4kv4-static-tuned": ("prefixquant-w4a4kv4-static-tuned", [TELL], [0]),
}

# Rows of other ladders with the recipe of one of these.
ELSEWHERE = {
    "w4a4kv4 dynamic: + tuning": "prefixquant-w4a4kv4-dynamic-tuned",
    "w4a4kv4 static: + tuning": "prefixquant-w4a4kv4-static-tuned",
}
ELSEWHERE |= {
    "quarot-w4a4 + clip + low-rank": "bisup-quarot-w4a4",
    "quarot-w3a3 + clip + smooth + low-rank": "bisup-quarot-w3a3",
}

if __name__ == "__main__":
    climb(__doc__, LADDER, "joined.jsonl")
