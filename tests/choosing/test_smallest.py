"""Laws of the other direction: the answer meets its bound as measured, its smaller neighbour does not, whatever the order."""

import numpy as np
import pytest

from clado.choosing.smallest import smallest
from clado.errors import InfeasibleError
from clado.records.interval import Interval
from clado.space import Assignment, Layer, SearchSpace
from tests.networks import all_assignments

SPACE = SearchSpace.uniform([Layer(f"l{i}", (8 * (i + 1),), "linear") for i in range(3)], (2, 4, 8))
EVERY = sorted((Assignment(bits) for bits in all_assignments(SPACE.bit_widths)), key=SPACE.size_bytes)


def exact(value: float) -> Interval:
    return Interval(value, value, value, 100)


def between(low: int, high: int) -> list[Assignment]:
    return [a for a in EVERY if low < SPACE.size_bytes(a) < high]


@pytest.mark.parametrize("bound", [0.5, 0.1, 0.022])
def test_with_a_loss_that_falls_with_size_the_answer_is_the_smallest_of_all(bound):
    losses = {a: 1.0 / SPACE.size_bytes(a) for a in EVERY}
    result = smallest(SPACE, [EVERY[0], EVERY[-1]], lambda a: exact(losses[a]), between, bound)
    within = [a for a in EVERY if losses[a] <= bound]
    assert result.answer.size_bytes == SPACE.size_bytes(within[0])
    assert result.smaller is None or result.smaller.measured.high > bound


def test_where_none_stays_under_the_bound_the_closest_is_named_and_nan_is_the_farthest():
    losses = {EVERY[0]: float("nan"), EVERY[3]: 0.7, EVERY[-1]: float("nan")}
    with pytest.raises(InfeasibleError, match=r"the closest costs 0\.7"):
        smallest(SPACE, list(losses), lambda a: exact(losses[a]), lambda low, high: [], 0.5)


def test_a_loss_that_is_not_monotone_still_gives_an_answer_with_measured_neighbours():
    rng = np.random.default_rng(0)
    for _ in range(50):
        losses = {a: float(rng.uniform()) for a in EVERY} | {EVERY[-2]: 0.0}
        calls: list[Assignment] = []

        def measure(assignment: Assignment, losses=losses, calls=calls) -> Interval:
            calls.append(assignment)
            return exact(losses[assignment])

        result = smallest(SPACE, [*EVERY[::5], EVERY[-2]], measure, between, 0.4)
        order = [c.size_bytes for c in result.measured]
        at = result.measured.index(result.answer)
        assert order == sorted(order)
        assert result.answer.measured.high <= 0.4
        assert all(c.measured.high > 0.4 for c in result.measured[:at])
        assert len(calls) == len(set(calls)) == len(result.measured)


def test_the_upper_end_of_the_interval_counts_not_the_mean():
    wide = {a: Interval(0.1, -0.2, 0.4 if k < 10 else 0.2, 50) for k, a in enumerate(EVERY)}
    result = smallest(SPACE, EVERY, wide.__getitem__, between, 0.3)
    assert result.answer.assignment == EVERY[10]


def test_a_bound_that_nothing_keeps_is_refused_with_the_closest():
    with pytest.raises(InfeasibleError, match=r"closest costs 0\.5 .* allow more"):
        smallest(SPACE, EVERY, lambda a: exact(0.5), between, 0.1)


@pytest.mark.parametrize("n", [20, 200, 3000])
def test_agreement_on_every_image_proves_less_the_fewer_they_are(n):
    same = np.ones(n, dtype=bool)
    interval = Interval.of_hits(same, same)
    assert interval.mean == 0
    assert 1 / n < interval.high < 3 / n
    assert interval.low == pytest.approx(-interval.high)


def test_the_interval_of_hits_covers_the_true_drop_about_95_times_in_100():
    rng = np.random.default_rng(1)
    inside = []
    for _ in range(2000):
        kind = rng.choice(4, 200, p=(0.85, 0.06, 0.02, 0.07))  # right both times, lost, won, wrong both times
        interval = Interval.of_hits(kind < 2, (kind == 0) | (kind == 2))
        inside.append(interval.low <= 0.04 <= interval.high)
        assert interval.mean == pytest.approx(((kind == 1).sum() - (kind == 2).sum()) / 200)
    assert 0.93 < np.mean(inside) < 0.98


def test_the_interval_covers_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(1)
    inside = [(i := Interval.of(rng.normal(0.3, 2.0, 400))).low <= 0.3 <= i.high for _ in range(1000)]
    assert 0.93 < np.mean(inside) < 0.97
