"""Laws of the local search: never worse than where it starts, within its evaluations, complete, and the same for any workers."""

import math

import numpy as np
import pytest

from clado.choosing.choice import surrogate
from clado.choosing.constraints import constraint
from clado.choosing.local_search import local_search, moves, search
from clado.choosing.program import Program
from clado.choosing.proposals import budgets_of, program_of
from clado.errors import ConfigurationError
from clado.interaction.matrix import InteractionMatrix
from clado.space import Assignment, SearchSpace
from tests.choosing.test_proposals import ALL, SPACE, matrix_of, random_losses

TIED = SearchSpace(SPACE.layers, SPACE.bit_widths, ties=((0, 2),))


def program(seed: int = 0, bits: float = 4, space: SearchSpace = SPACE) -> Program:
    return program_of(matrix_of(seed, space=space), [constraint("average_bits", space, bits)])


def fitting(limited: Program) -> list[Assignment]:
    """Every assignment within the limits that keeps the ties, by looking at each."""
    ties = limited.space.ties
    tied = [a for a in ALL if all(len({a.bits[i] for i in tie}) == 1 for tie in ties)]
    return [a for a in tied if all(limit.holds(limited.space, a) for limit in limited.constraints)]


class Meter:
    """Measured losses that are given, and a count of what was asked."""

    def __init__(self, losses: dict[Assignment, float]) -> None:
        self.losses, self.asked, self.calls = losses, [], 0

    def __call__(self, assignments):
        self.asked += assignments
        self.calls += 1
        return {a: self.losses[a] for a in reversed(assignments)}  # workers answer in any order


def run(limited, losses, known, evaluations, batch=4):
    meter = Meter(losses)
    results = local_search({0: search(limited, {a: losses[a] for a in known}, evaluations, batch)}, meter)[0]
    return results, meter


@pytest.mark.parametrize("space", [SPACE, TIED], ids=["free", "tied"])
@pytest.mark.parametrize("bits", [2, 2.5, 4, 8])
def test_moves_are_all_feasible_assignments_of_one_or_two_groups_the_least_surrogate_first(space, bits):
    limited = program(3, bits, space)
    here = limited.choices(space.narrowest)
    results = list(moves(limited, here))

    def changed(assignment: Assignment) -> int:
        return int((limited.choices(assignment) != here).sum())

    assert sorted(map(limited.assignment, results), key=str) == sorted(
        (a for a in fitting(limited) if 1 <= changed(a) <= 2), key=str
    )
    values = [limited.minimised(choices) for choices in results]
    assert values == pytest.approx(sorted(values), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("evaluations", "batch"), [(0, 4), (1, 1), (7, 3), (12, 100)])
def test_it_is_never_worse_than_any_start_and_asks_for_at_most_what_it_may(seed, evaluations, batch):
    limited, losses = program(seed), random_losses(seed)
    known = fitting(limited)[seed % 5 :: 9]
    results, meter = run(limited, losses, known, evaluations, batch)
    assert results.start_loss == min(losses[a] for a in known)
    assert results.best_loss == losses[results.best] == min([results.start_loss, *(losses[a] for a in results.tried)])
    assert results.gain == results.start_loss - results.best_loss >= 0
    assert len(meter.asked) == len(set(meter.asked)) == len(results.tried) <= evaluations
    assert results.tried == {a: losses[a] for a in meter.asked}
    assert not set(meter.asked) & set(known)  # nothing is measured twice
    assert set(meter.asked) <= set(fitting(limited))


@pytest.mark.parametrize("space", [SPACE, TIED], ids=["free", "tied"])
@pytest.mark.parametrize("seed", range(8))
def test_with_enough_evaluations_it_finds_the_optimum_whatever_is_measured(space, seed):
    """Losses unrelated to the surrogate: only completeness can find the least of them."""
    limited, losses = program(seed, 4, space), random_losses(seed)
    everything = fitting(limited)
    results, meter = run(limited, losses, [space.narrowest], len(ALL))
    assert results.best_loss == min(losses[a] for a in everything)
    assert set(meter.asked) | {space.narrowest} == set(everything)  # and it ends when all is seen


@pytest.mark.parametrize("seed", range(8))
def test_a_true_surrogate_needs_few_evaluations(seed):
    """Where the surrogate is the truth, the best move is the first: descent by single moves and swaps, one batch each."""
    limited = program(seed, 4)
    losses = {a: limited.matrix.predicted_increase(a) for a in ALL}
    results, _ = run(limited, losses, [SPACE.narrowest], 12, batch=1)
    here = limited.choices(SPACE.narrowest)
    while (best := next(moves(limited, here))) is not None and limited.minimised(best) < limited.minimised(here) - 1e-12:
        here = best
    assert results.best_loss <= losses[limited.assignment(here)] + 1e-12


def test_searches_share_what_they_measure_and_ask_for_it_side_by_side():
    limits, losses = [3, 3.5, 4, 5.5], random_losses(1)
    searches = {bits: search(program(1, bits), {SPACE.narrowest: losses[SPACE.narrowest]}, 8, 4) for bits in limits}
    meter = Meter(losses)
    merge_limits = local_search(searches, meter)
    assert len(meter.asked) == len(set(meter.asked)) == len({a for results in merge_limits.values() for a in results.tried})
    assert meter.calls <= 2  # two rounds of four, for all budgets at once
    for bits in limits:
        assert merge_limits[bits] == run(program(1, bits), losses, [SPACE.narrowest], 8)[0]  # and each finds what it finds alone


def test_equal_losses_are_decided_by_the_order_asked():
    losses = dict.fromkeys(ALL, 1.0)
    results, _ = run(program(), losses, [SPACE.narrowest], 20)
    assert results.best == results.start == SPACE.narrowest
    below = {**losses, **dict.fromkeys(list(results.tried)[5:9], 0.5)}
    assert run(program(), below, [SPACE.narrowest], 20)[0].best == list(results.tried)[5]


def test_a_surrogate_without_a_preference_is_searched_in_a_fixed_order():
    order = SPACE.num_options
    flat = InteractionMatrix(SPACE, np.zeros((order, order)), "gauss_newton", "kl_to_float", 0.0, 1)
    limited = program_of(flat, [constraint("average_bits", SPACE, 4)])
    runs = [list(run(limited, random_losses(0), [SPACE.narrowest], 15, batch)[0].tried) for batch in (4, 4)]
    assert runs[0] == runs[1]


def test_losses_that_are_not_finite_are_the_worst():
    losses = {a: math.nan if k % 2 else math.inf for k, a in enumerate(ALL)} | {SPACE.narrowest: 5.0}
    good = Assignment((4, 2, 2, 2))
    losses[good] = 1.0
    results, _ = run(program(), losses, [SPACE.narrowest], len(ALL))
    assert (results.best, results.best_loss) == (good, 1.0)


def test_a_start_that_does_not_fit_or_is_excluded_is_no_start():
    limited = program(0, 2)
    with pytest.raises(ConfigurationError, match="none"):
        next(search(limited, {SPACE.widest: 0.0}, 4, 2))
    matrix = matrix_of(0)
    excluded = Program.build(matrix, [constraint("average_bits", SPACE, 4)], quarantined=[0])
    losses = random_losses(0)
    results, meter = run(excluded, losses, [SPACE.narrowest, Assignment((4, 2, 2, 2))], 30)
    assert results.start.bits[0] != 2
    assert all(a.bits[0] != 2 for a in meter.asked)


def test_forbidden_pairs_are_never_tried():
    pair = (SPACE.option(0, 4), SPACE.option(1, 4))
    limited = Program.build(matrix_of(2), [constraint("average_bits", SPACE, 8)], forbidden=[pair])
    _, meter = run(limited, random_losses(2), [SPACE.narrowest], len(ALL))
    assert len(meter.asked) > 60
    assert not [a for a in meter.asked if a.bits[:2] == (4, 4)]


def test_the_surrogate_is_the_matrix_that_ranks_the_measured_ones_best():
    true, other = matrix_of(4), matrix_of(9, "layerwise").diagonal_only()
    losses = {a: true.predicted_increase(a) for a in ALL[::7]}
    assert surrogate({"layerwise": other, "gauss_newton": true}, losses) == "gauss_newton"
    losses = {a: other.predicted_increase(a) for a in ALL[::7]} | {ALL[1]: math.nan}
    assert surrogate({"layerwise": other, "gauss_newton": true}, losses) == "layerwise"
    # with nothing to tell them apart: the one that knows of interactions
    assert surrogate({"layerwise": true.diagonal_only(), "gauss_newton": true}, {}) == "gauss_newton"


def test_budgets_may_be_keys():
    limited, losses = program(), random_losses(3)
    keys = budgets_of([4])
    assert set(local_search({keys[0]: search(limited, {SPACE.narrowest: 1.0}, 2, 1)}, Meter(losses))) == set(keys)
