"""Laws of the rate and the ETA, on simulated clocks: nothing here waits."""

import heapq
from collections.abc import Iterator

import numpy as np
import pytest

from flows.pace import Pace

TOLERATED = 1.5  # ETA ÷ truth, after a tenth of a phase (issue: an honest ETA)


def simulated(costs: list[float], workers: int, warm_up: float = 0.0, stagger: float = 0.0) -> list[tuple[float, float]]:
    """(time, cost) of each task's end: a worker takes the next task when it is free; its speed is one, after its warm-up."""
    free = [(warm_up + stagger * worker, worker) for worker in range(workers)]
    ends = []
    for cost in costs:
        begin, worker = heapq.heappop(free)
        ends.append((begin + cost, cost))
        heapq.heappush(free, (begin + cost, worker))
    return sorted(ends)


def followed(
    ends: list[tuple[float, float]], known: float = 0.0, step: float = 0.05, in_flight: float | None = None
) -> Iterator[tuple[float, Pace]]:
    """The pace at many times: on a grid, and directly after every end."""
    pace = Pace(known + sum(cost for _, cost in ends), in_flight)
    if known:
        pace.add(0.01, known)
    waiting, end = list(ends), ends[-1][0]
    times = sorted({*np.arange(0.0, end, step).tolist(), *(time + 1e-6 for time, _ in ends)})
    for now in times:
        while waiting and waiting[0][0] <= now:
            pace.add(*waiting.pop(0))
        yield now, pace


def ratios(
    ends: list[tuple[float, float]],
    known: float = 0.0,
    after: float = 0.1,
    until: float = 0.9,
    in_flight: float | None = None,
) -> list[float]:
    """ETA ÷ truth between a tenth and nine tenths of a phase."""
    end = ends[-1][0]
    looks = followed(ends, known, in_flight=in_flight)
    return [pace.eta(now) / (end - now) for now, pace in looks if after * end <= now <= until * end]


def assert_honest(values: list[float], factor: float = TOLERATED) -> None:
    assert len(values) > 20
    assert 1 / factor <= min(values)
    assert max(values) <= factor


WORKERS = pytest.mark.parametrize("workers", [1, 2, 4, 8])


@WORKERS
@pytest.mark.parametrize("stagger", [0.0, 0.07])
def test_at_a_constant_rate_the_eta_is_the_truth(workers, stagger):
    eta_ratios = ratios(simulated([1.0] * 40 * workers, workers, stagger=stagger))
    assert_honest(eta_ratios, 1.15)


@WORKERS
def test_a_warm_up_does_not_spoil_the_eta(workers):
    """Workers load and compile for as long as four tasks take."""
    assert_honest(ratios(simulated([1.0] * 60 * workers, workers, warm_up=4.0)))


@WORKERS
@pytest.mark.parametrize("seed", range(5))
def test_tasks_of_any_duration_are_weighted_by_their_cost(workers, seed):
    costs = np.random.default_rng(seed).lognormal(0.0, 0.4, 80 * workers).tolist()
    assert_honest(ratios(simulated(costs, workers, warm_up=2.0, stagger=0.3)))


@WORKERS
@pytest.mark.parametrize("seed", range(5))
def test_a_few_tasks_that_end_nearly_together_do_not_spoil_the_eta(workers, seed):
    """As networks are evaluated: ten tasks for each worker, equal but for a tenth; the caller says how much is computed."""
    jitter = np.random.default_rng(seed).uniform(0.9, 1.1, 10 * workers)
    ends = [(time, 1.0) for time, _ in simulated(jitter.tolist(), workers)]
    tolerated = TOLERATED if workers <= 2 else 1.75  # the first ends of many workers are spread over more than a tenth
    assert_honest(ratios(ends, after=0.11, until=0.6, in_flight=float(workers)), tolerated)


@WORKERS
def test_small_tasks_before_large_ones_do_not_spoil_the_eta(workers):
    """As tiles come: one kind is twenty times another, and the caller says how much is computed at a time."""
    ends = simulated([0.5] * 8 * workers + [10.0] * 10 * workers, workers, warm_up=1.0)
    assert_honest(ratios(ends, in_flight=10.0 * workers))


@WORKERS
def test_tasks_that_end_together_do_not_make_the_eta_jump(workers):
    """Between two looks the ETA falls as time passes, also within a burst: it leaves that line by less than two tasks' time."""
    ends = [(time + 0.002 * (k % workers), cost) for k, (time, cost) in enumerate(simulated([1.0] * 40 * workers, workers))]
    looks = [(now, pace.eta(now)) for now, pace in followed(ends, step=0.01) if now >= 0.1 * ends[-1][0]]
    finish = [now + eta for now, eta in looks]
    assert max(abs(later - earlier) for earlier, later in zip(finish, finish[1:], strict=False)) < 2.0


@WORKERS
def test_work_moves_on_between_two_ends(workers):
    """The bar does not stand still while tasks are computed, never falls by more than rounding, and never claims too much."""
    ends = simulated([1.0] * 40 * workers, workers)
    total, end = 40.0 * workers, ends[-1][0]
    for now, pace in followed(ends):
        if now > 0.1 * end:
            assert pace.done - 1e-9 <= pace.expected(now) <= total
            assert pace.expected(now) == pytest.approx(workers * now, abs=1.05 * workers)  # a task of each


@WORKERS
@pytest.mark.parametrize("known", [10.0, 1000.0])
def test_what_is_read_from_disk_costs_nothing(workers, known):
    ends = simulated([1.0] * 40 * workers, workers, warm_up=2.0)
    assert_honest(ratios(ends, known))


def test_a_rate_that_changes_is_followed():
    ends = simulated([1.0] * 60 + [3.0] * 60, 2)
    ends = [(time, 1.0) for time, _ in ends]  # of equal cost: the machine has become slower
    assert_honest(ratios(ends, after=0.75, until=0.95))


def test_where_no_task_ends_any_more_the_eta_grows():
    pace = Pace(100.0)
    for second in range(1, 21):
        pace.add(float(second), 1.0)
    etas = [pace.eta(now) for now in (21.0, 30.0, 60.0, 120.0)]
    assert etas == sorted(etas)
    assert etas[-1] > 5 * etas[0]


def test_nothing_is_said_before_anything_is_known_and_nothing_is_left_at_the_end():
    pace = Pace(4.0)
    assert pace.eta(3.0) is None
    pace.add(0.1, 1.0)  # from disk
    assert pace.eta(3.0) is None
    pace.add(5.0, 1.0)
    assert pace.eta(5.0) == pytest.approx(10.0, rel=0.05)
    pace.add(9.9, 2.0)
    assert pace.eta(11.0) == 0.0
    assert pace.expected(11.0) == 4.0
    assert Pace(0.0).eta(0.0) == 0.0
