"""Ticks: round values, inside the range, in order, few enough to read."""

from __future__ import annotations

import itertools
import math

from hypothesis import assume, example, given
from hypothesis import strategies as st

from sordino.report.axis import Axis, written

REAL = st.floats(-1e12, 1e12, allow_subnormal=False)
POSITIVE = st.floats(1e-12, 1e12)


def significant(value: float) -> int:
    """Digits that a value needs."""
    return len(f"{abs(value):.12e}".partition("e")[0].replace(".", "").rstrip("0"))


@given(st.lists(REAL, min_size=1))
def test_a_linear_axis_steps_evenly(values: list[float]) -> None:
    assume(max(values) == min(values) or max(values) - min(values) > 1e-6 * max(map(abs, values)))
    axis = Axis.over(values, log=False)
    assert all(0 < axis.at(v) < 1 for v in values)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 6 and ticks == sorted(set(ticks)) and all(-1e-9 <= axis.at(t) <= 1 + 1e-9 for t in ticks)
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert all(math.isclose(s, steps[0], rel_tol=1e-3) for s in steps)


@given(st.lists(POSITIVE, min_size=1))
@example([1.000000000001])  # its logarithm is nearly 0
def test_a_logarithmic_axis_has_round_values(values: list[float]) -> None:
    assume(max(values) == min(values) or max(values) / min(values) > 1 + 1e-6)
    axis = Axis.over(values, log=True)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 6 and ticks == sorted(set(ticks)) and all(-1e-9 <= axis.at(t) <= 1 + 1e-9 for t in ticks)
    if max(values) > 3 * min(values):
        assert len(ticks) >= 2 and all(significant(t) <= 2 for t in ticks)


@given(st.lists(st.integers(0, 200), min_size=1))
def test_blocks_are_counted_in_whole_numbers(values: list[int]) -> None:
    assert all(t.is_integer() for t in Axis.over(values, log=False).ticks())


def test_ticks_by_hand() -> None:
    assert Axis.over([0, 1, 2, 3, 4], log=False).ticks() == [0, 1, 2, 3, 4]
    assert Axis.over([0, 29], log=False).ticks() == [0, 10, 20, 30]
    assert Axis.over([0.1, 0.35], log=False).ticks() == [0.1, 0.2, 0.3]
    assert Axis.over([0.7, 1500.0], log=True).ticks() == [1, 10, 100, 1000]
    assert Axis.over([2.0, 9.0], log=True).ticks() == [2, 3, 5, 7]
    assert Axis.over([7.0], log=False).ticks() == [7]


def test_ticks_are_written_as_a_reader_wants_them() -> None:
    assert [written(v) for v in (0, 1, 0.002, 1500, 2e-05, 1e6, -3)] == ["0", "1", "0.002", "1,500", "2e-05", "1e+06", "-3"]
