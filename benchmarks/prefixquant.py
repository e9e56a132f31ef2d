"""PrefixQuant's ablation ladder on smollm2 (spec section 6.4), its baselines, and Sordino's own best; see ladder.py.

python benchmarks/prefixquant.py --calibrate wiki.valid.raw --evaluate wiki.test.raw --also c4.txt [--only NAME …]

Weights by channel, symmetric, guards off. Each rung adds one part; the static branch differs from the dynamic one in inputs,
keys and values, and has its scales searched by the same procedure.
"""

from __future__ import annotations

from ladder import Ladder, climb

SEEDS = [0, 1, 2]
OFF = "guard=off"
TURN = '{move="rotate", size="full"}, {move="rotate-inner"}'
EVEN = '{move="smooth"}, ' + TURN  # ours: channels evened out before they are turned
PREFIX = '{move="prefix"}'
SMOOTHED = f"moves=[{EVEN}, {PREFIX}]"
DYNAMIC, STATIC = "prefixquant-w4a4kv4-dynamic", "prefixquant-w4a4kv4-static"
# What each of the parts costs alone, with evened channels, rotations and prefix, untrained; weights of 8 bits cost nothing.
FLOOR = [OFF, SMOOTHED, "calibration.windows=32"]
TUNE = '{move="tune", epochs=2}'
FIVE = 'format.weights.override=[{match="*.k_proj", bits=5}, {match="*.v_proj", bits=5}, {match="*.o_proj", group="wide"}]'
# One scale a token, as the presets' first form had it.
TOKEN = 'format.activations={bits=4, mode="dynamic", clip="search"}'
GROUPS = 'format.activations={bits=4, clip="search", group=64, symmetric=false}'
MEANS = f'moves=[{{move="center"}}, {EVEN}, {PREFIX}]'
KV_STATIC = 'format.kv={bits=4, mode="static", symmetric=true}'


def ladder(bits: int) -> Ladder:
    """The rungs for inputs of some width."""
    name = f"w4a{bits}kv4"
    dynamic, static = (f"prefixquant-{name}-{mode}" for mode in ("dynamic", "static"))
    plain = [
        "format.activations.clip=1.0",
        "format.kv.clip=1.0",
        "format.weights.solver.search=weight",
        "format.weights.search=0",
    ]
    return {
        f"rtn {name}": (dynamic, [OFF, *plain, "moves=[]"], [0]),
        f"{name}: + rotation": (dynamic, [OFF, *plain, f"moves=[{TURN}]"], [0]),
        f"{name}: + scale search": (dynamic, [OFF, f"moves=[{TURN}]"], [0]),
        f"{name} dynamic: + prefix": (dynamic, [OFF], SEEDS),
        f"{name} dynamic: + prefix, smooth": (dynamic, [OFF, SMOOTHED], SEEDS),
        f"{name} dynamic: + prefix, smooth, center": (dynamic, [OFF, MEANS], SEEDS),
        f"{name} dynamic: + tuning": (f"{dynamic}-tuned", [OFF], SEEDS),
        f"{name} dynamic: + tuning, smooth, center": (f"{dynamic}-tuned", [OFF, f"{MEANS[:-1]}, {TUNE}]"], SEEDS),
        f"{name} static": (static, [OFF, f"moves=[{TURN}]"], [0]),
        f"{name} static: + prefix": (static, [OFF], SEEDS),
        f"{name} static: + prefix, smooth": (static, [OFF, SMOOTHED], SEEDS),
        f"{name} static: + prefix, smooth, center": (static, [OFF, MEANS], SEEDS),
        f"{name} static: + tuning": (f"{static}-tuned", [OFF], SEEDS),
        f"{name} static: + tuning, smooth": (f"{static}-tuned", [OFF, f"moves=[{EVEN}, {PREFIX}, {TUNE}]"], SEEDS),
        f"{name} static: + tuning, smooth, center": (f"{static}-tuned", [OFF, f"{MEANS[:-1]}, {TUNE}]"], SEEDS),
    }


def own(first: str = "", tuned: int = 4, times: float = 3.25) -> str:
    """Moves of `w4a4kv4` and `w4a8kv4`, without `center` or with another one."""
    trained = f'{{move="tune", epochs={tuned}}}, {{move="distill", epochs=1, times={times}, scales=0.003, gains=0.003}}'
    return f"moves=[{first}{EVEN}, {PREFIX}, {trained}]"


LADDER: Ladder = {
    "quarot-w4a4kv4": ("quarot-w4a4kv4", [OFF], SEEDS),
    "spinquant-w4a4kv4": ("spinquant-w4a4kv4", [OFF], SEEDS),
    **ladder(4),
    **ladder(8),
    # Ours, and how it got there: one epoch of tuning, one scale a token; four epochs, and more text for distillation as `w3`
    # and `w2` have them; a scale and a zero point for every group of channels; means taken off.
    "w4a4kv4, first form": ("w4a4kv4", [TOKEN, own(tuned=1, times=1)], [0]),
    "w4a4kv4, inputs by token, not centered": ("w4a4kv4", [TOKEN, own()], SEEDS),
    "w4a4kv4, inputs by token": ("w4a4kv4", [TOKEN], [0]),
    "w4a4kv4, not centered": ("w4a4kv4", [own()], [0]),
    "w4a4kv4, centered but for keys": ("w4a4kv4", [own('{move="center", keys=false}, ')], [0]),
    "w4a4kv4": ("w4a4kv4", [], SEEDS),
    "w4a4kv4, 5-bit keys and values": ("w4a4kv4", [FIVE], [0]),
    "w4a8kv4, not centered": ("w4a8kv4", [own()], [0]),
    "w4a8kv4": ("w4a8kv4", [], SEEDS),
    "w8a8": ("w8a8", [], [0]),
    # Ours with static scales: is dynamic still worth its time?
    **{
        f"{name}, static": (name, [f'format.activations={{bits={bits}, mode="static"}}', KV_STATIC], [0])
        for name, bits in (("w4a4kv4", 4), ("w4a8kv4", 8))
    },
    # The cache alone, and inputs alone, with their means taken off.
    **{
        f"floor: {what}, centered": (DYNAMIC, [*FLOOR, MEANS, *rest], [0])
        for what, rest in (
            ("KV4 dynamic", ["format.weights.bits=16", "format.activations.bits=16"]),
            ("A4 dynamic", ["format.kv.bits=16", "format.weights.bits=8"]),
            ("A4 dynamic in groups", [GROUPS, "format.kv.bits=16", "format.weights.bits=8"]),
        )
    },
    "floor: W4": (STATIC, [*FLOOR, "format.kv.bits=16", "format.activations.bits=16"], [0]),
    "floor: KV4 dynamic": (DYNAMIC, [*FLOOR, "format.weights.bits=16", "format.activations.bits=16"], [0]),
    "floor: KV4 static": (STATIC, [*FLOOR, "format.weights.bits=16", "format.activations.bits=16"], [0]),
    "floor: A4 dynamic": (DYNAMIC, [*FLOOR, "format.kv.bits=16", "format.weights.bits=8"], [0]),
    "floor: A4 static": (STATIC, [*FLOOR, "format.kv.bits=16", "format.weights.bits=8"], [0]),
    "floor: A8 dynamic": (DYNAMIC, [*FLOOR, "format.activations.bits=8", "format.kv.bits=16", "format.weights.bits=8"], [0]),
    "floor: A8 static": (STATIC, [*FLOOR, "format.activations.bits=8", "format.kv.bits=16", "format.weights.bits=8"], [0]),
}  # fmt: skip

if __name__ == "__main__":
    climb(__doc__, LADDER, "prefixquant.jsonl")
