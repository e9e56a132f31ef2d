"""The three systems joined, each part left out or put in, beside the systems alone; see ladder.py.

python benchmarks/joined.py --calibrate wiki.valid.raw --evaluate wiki.test.raw --also c4.txt [--model …] [--only NAME …]
"""

from __future__ import annotations

from bisup import CLIP, NONE, RANK, TELL
from ladder import Ladder, climb
from prefixquant import EVEN, PREFIX

NO_R4 = EVEN.replace('"rotate-inner"', '"rotate-inner", down=false')
CLIPS = f'{{move="tune", epochs=1, {NONE}, {CLIP}, {RANK}}}'
TUNE, SHIFT = '{move="tune", epochs=1}', '{move="mean-shift"}'
DISTILL = '{move="distill", epochs=1, scales=0.003, gains=0.003}'
CENTER, ZERO = '{move="center"}', "format.activations.symmetric=false"
COLUMN = 'format.weights.override=[{match="*.down_proj", column_scale=true}]'


def moves(*parts: str) -> str:
    """A recipe's moves."""
    return f"moves=[{', '.join(parts)}]"


def rows(bits: int) -> Ladder:
    """Rows of one width."""
    name = f"w{bits}a{bits}"
    joined = f"joined-{name}kv{bits}"
    trained = (CLIPS, TUNE, DISTILL)
    no_r4 = moves(NO_R4, PREFIX, *trained)
    return {
        f"quarot-{name}": (f"quarot-{name}", [TELL], [0]),
        f"bisup-quarot-{name}": (f"bisup-quarot-{name}", [TELL], [0]),
        joined: (joined, [], [0]),
        f"{joined}, untrained": (joined, [moves(EVEN, PREFIX)], [0]),
        f"{joined}, without prefix": (joined, [moves(EVEN, *trained)], [0]),
        f"{joined}, without clips and low rank": (joined, [moves(EVEN, PREFIX, TUNE, DISTILL)], [0]),
        f"{joined}, without roundings": (joined, [moves(EVEN, PREFIX, CLIPS, DISTILL)], [0]),
        f"{joined}, without distillation": (joined, [moves(EVEN, PREFIX, CLIPS, TUNE)], [0]),
        f"{joined}, with mean shift": (joined, [moves(EVEN, PREFIX, CLIPS, TUNE, SHIFT, DISTILL)], [0]),
        f"{joined}, with means off": (joined, [moves(CENTER, EVEN, PREFIX, *trained)], [0]),
        f"{joined}, with zero points": (joined, [ZERO], [0]),
        f"{joined}, with means off, zero points": (joined, [ZERO, moves(CENTER, EVEN, PREFIX, *trained)], [0]),
        f"{joined}, with means off, zero points, tuned 4": (
            joined,
            [ZERO, moves(CENTER, EVEN, PREFIX, CLIPS, TUNE.replace("1", "4"), DISTILL)],
            [0],
        ),
        f"{joined}, without R4": (joined, [no_r4], [0]),
        f"{joined}, without R4, column scale": (
            joined,
            [COLUMN, no_r4],
            [0],
        ),
    }


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
ELSEWHERE |= {f"quarot-w{b}a{b} + clip + low-rank": f"bisup-quarot-w{b}a{b}" for b in (3, 4)}

if __name__ == "__main__":
    climb(__doc__, LADDER, "joined.jsonl")
