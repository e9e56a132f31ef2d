"""The three systems joined, each part left out or put in, beside the systems alone; see ladder.py.

python benchmarks/joined.py --calibrate wiki.valid.raw --evaluate wiki.test.raw --also c4.txt [--model …] [--only NAME …]
"""

from __future__ import annotations

from ladder import Ladder, climb

OFF = "guard=off"
EVEN, TURN, PREFIX = '{move="smooth"}', '{move="rotate", size="full"}', '{move="prefix"}'
INNER, NO_R4 = '{move="rotate-inner"}', '{move="rotate-inner", down=false}'
CLIPS = '{move="tune", epochs=1, weights=0, scales=0, inputs=0, gains=0, clips=0.01, rank=16}'
TUNE, SHIFT = '{move="tune", epochs=1}', '{move="mean-shift"}'
DISTILL = '{move="distill", epochs=1, scales=0.003, gains=0.003}'
COLUMN = 'format.weights.override=[{match="*.down_proj", column_scale=true}]'


def moves(*parts: str) -> str:
    """A recipe's moves."""
    return f"moves=[{', '.join(parts)}]"


def rows(bits: int) -> Ladder:
    """Rows of one width."""
    name = f"w{bits}a{bits}"
    joined = f"joined-{name}kv{bits}"
    first = (EVEN, TURN, INNER, PREFIX)
    return {
        f"quarot-{name}": (f"quarot-{name}", [OFF], [0]),
        f"bisup-quarot-{name}": (f"bisup-quarot-{name}", [OFF], [0]),
        joined: (joined, [], [0]),
        f"{joined}, untrained": (joined, [moves(*first)], [0]),
        f"{joined}, without prefix": (joined, [moves(EVEN, TURN, INNER, CLIPS, TUNE, DISTILL)], [0]),
        f"{joined}, without clips and low rank": (joined, [moves(*first, TUNE, DISTILL)], [0]),
        f"{joined}, without roundings": (joined, [moves(*first, CLIPS, DISTILL)], [0]),
        f"{joined}, without distillation": (joined, [moves(*first, CLIPS, TUNE)], [0]),
        f"{joined}, with mean shift": (joined, [moves(*first, CLIPS, TUNE, SHIFT, DISTILL)], [0]),
        f"{joined}, without R4": (joined, [moves(EVEN, TURN, NO_R4, PREFIX, CLIPS, TUNE, DISTILL)], [0]),
        f"{joined}, without R4, column scale": (
            joined,
            [COLUMN, moves(EVEN, TURN, NO_R4, PREFIX, CLIPS, TUNE, DISTILL)],
            [0],
        ),
    }


LADDER: Ladder = {
    **rows(4),
    **rows(3),
    "prefixquant-w4a4kv4-dynamic-tuned": ("prefixquant-w4a4kv4-dynamic-tuned", [OFF], [0]),
    "prefixquant-w4a4kv4-static-tuned": ("prefixquant-w4a4kv4-static-tuned", [OFF], [0]),
}

# Rows of other ladders with the recipe of one of these.
ELSEWHERE = {
    "w4a4kv4 dynamic: + tuning": "prefixquant-w4a4kv4-dynamic-tuned",
    "w4a4kv4 static: + tuning": "prefixquant-w4a4kv4-static-tuned",
}
ELSEWHERE |= {f"quarot-w{b}a{b} + clip + low-rank": f"bisup-quarot-w{b}a{b}" for b in (3, 4)}

if __name__ == "__main__":
    climb(__doc__, LADDER, "joined.jsonl")
