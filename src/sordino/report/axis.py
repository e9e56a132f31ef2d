"""One axis of a plot: a range of values laid out from 0 to 1, and the round values that are written beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_MOST = 6  # ticks; more do not fit side by side on a phone
_MANTISSAS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))  # of ticks in every decade, coarsest first


@dataclass(frozen=True)
class Axis:
    """Ends of the range, a little outside the values; logarithms if ``log``. ``whole``: nothing lies between whole numbers."""

    low: float
    high: float
    log: bool
    whole: bool

    @classmethod
    def over(cls, values: Sequence[float], log: bool) -> Axis:
        """The axis of some finite values; they are positive if ``log``."""
        low, high = (math.log10(f(values)) if log else f(values) for f in (min, max))
        room = 0.06 * (high - low) or (0.1 if log else 0.1 * abs(high)) or 1.0
        return cls(low - room, high + room, log, all(float(v).is_integer() for v in values))

    def at(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high one."""
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values inside the range, in order: at least one, six at most."""
        if not self.log:
            return _steps(self.low, self.high, self.whole)
        for mantissas in _MANTISSAS:
            found = _in_decades(self.low, self.high, mantissas)
            if len(found) >= 3:
                return found[:: math.ceil(len(found) / _MOST)]
        return _steps(10**self.low, 10**self.high, whole=False)


def _in_decades(low: float, high: float, mantissas: Sequence[float]) -> list[float]:
    powers = range(math.floor(low), math.ceil(high) + 1)
    values = [float(f"{m}e{p}") for p in powers for m in mantissas]
    return [v for v in values if v > 0 and low <= math.log10(v) <= high]


def _steps(low: float, high: float, whole: bool) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten: as many as fit, whole ones if asked for."""
    step = max((high - low) / (_MOST - 1), 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(step))
    step = next((m * power for m in (1, 2, 5) if m * power >= step * (1 - 1e-9)), 10 * power)
    return [float(f"{k * step:.12g}") for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def written(value: float) -> str:
    """A tick as text: thousands apart, powers of ten where there would be many zeros."""
    return f"{value:,.12g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:g}"
