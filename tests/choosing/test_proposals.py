"""Laws of proposing and choosing: the answer is the best measured one, and never worse than what is safe."""

import itertools
import statistics
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest

from clado.choosing import solvers
from clado.choosing.choice import Score, choose
from clado.choosing.constraints import Constraint, constraint
from clado.choosing.program import Program
from clado.choosing.proposals import (
    LAYERWISE_PLAIN,
    Budget,
    Proposal,
    budgets_of,
    check_budgets,
    extra_matrices,
    merge_limits,
    program_of,
    propose,
    propose_uncorrected,
    propose_variants,
    widest_uniform,
)
from clado.choosing.solution import Solution, Status
from clado.errors import InfeasibleError
from clado.interaction.estimators import Measured, estimate, kinds_of, uncorrected, unreported_estimators
from clado.interaction.matrix import InteractionMatrix
from clado.measuring.kinds.gram import TEMPERATURES
from clado.records.results import CHOSEN, LOCAL_SEARCH, UNIFORM
from clado.space import Assignment, Layer, SearchSpace
from tests.networks import all_assignments

SPACE = SearchSpace.uniform([Layer(f"layer{i}.weight", (4, 4 + 3 * i), "linear") for i in range(4)], (2, 4, 8))
ALL = [Assignment(bits) for bits in itertools.product((2, 4, 8), repeat=4)]
BUDGETS = budgets_of([2.25, 3, 4, 5.5])
TEMPERED = ("tempered2", "tempered4", "tempered8")  # propose always, where their tiles are measured anyway
SAFE = (UNIFORM, "layerwise")  # a chosen assignment is never worse


def matrix_of(seed: int, estimator: str = "gauss_newton", space: SearchSpace = SPACE) -> InteractionMatrix:
    """Errors that shrink with bits and interact with either sign."""
    rng = np.random.default_rng(seed)
    errors = np.array([rng.normal(size=5) * 0.3 + 2.0 ** (3 - b) for _, b, _ in space.options])
    values = errors @ errors.T / 10
    layer = np.array([option.layer for option in space.options])
    values[(layer[:, None] == layer[None, :]) & ~np.eye(len(values), dtype=bool)] = 0
    convexity = "clip_psd" if estimator == "pairwise" else "raw"
    return InteractionMatrix(space, (values + values.T) / 2, estimator, "kl_to_float", 0.25, 32, convexity=convexity)


def random_losses(seed: int) -> dict[Assignment, float]:
    """A measured loss for every assignment, unrelated to any model: the laws hold whatever is measured."""
    return dict(zip(ALL, np.random.default_rng(seed).exponential(size=len(ALL)), strict=True))


def random_proposals(seed: int) -> list[Proposal]:
    """For every budget uniform and two methods' picks of what fits."""
    rng = np.random.default_rng(seed)
    proposals = []
    for budget in BUDGETS:
        limit = budget.limit(SPACE)
        fitting = [a for a in ALL if limit.holds(SPACE, a)]
        proposals.append(Proposal(budget, UNIFORM, widest_uniform(SPACE, [limit])))
        proposals += [Proposal(budget, method, fitting[rng.integers(len(fitting))], 0.5) for method in ("layerwise", "pairwise")]
    return proposals


@dataclass
class FakeSolver:
    """Finds the optimum by looking at every assignment, and counts."""

    prepared: int = 0
    solved: int = 0

    def prepare(self, program):
        self.prepared += 1

        def solve(program):
            self.solved += 1
            fitting = [a for a in ALL if all(limit.holds(SPACE, a) for limit in program.constraints)]
            value, best = min((program.matrix.predicted_increase(a), a) for a in fitting)
            return Solution(best, Status.OPTIMAL, value, value, value, 0.0, 0.0, 0, {}, {}, "fake", "none", "raw", SPACE)

        return solve


@pytest.mark.parametrize("seed", range(20))
def test_chosen_is_never_worse_than_any_proposal_and_never_worsens_with_budget(seed):
    losses = random_losses(seed)
    rows = choose(SPACE, random_proposals(seed), losses)
    chosen = []
    for budget in BUDGETS:
        by_method = {row.method: row for row in rows if row.budget == budget.name}
        assert set(by_method) == {UNIFORM, "layerwise", "pairwise", CHOSEN}
        best = by_method.pop(CHOSEN)
        assert budget.limit(SPACE).holds(SPACE, best.assignment)
        assert best.loss_deployed == losses[best.assignment]
        assert all(best.loss_deployed <= row.loss_deployed for row in by_method.values())
        others = [row.loss_deployed for row in by_method.values() if row.method != best.winner]
        assert best.gain == min(others) - best.loss_deployed
        assert best.gain >= 0
        chosen.append(best.loss_deployed)
    assert chosen == sorted(chosen, reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_budgets_does_not_matter(seed):
    proposals, losses = random_proposals(seed), random_losses(seed)
    best = [
        {row.budget: row.loss_deployed for row in choose(SPACE, p, losses) if row.method == CHOSEN}
        for p in (proposals, proposals[::-1])
    ]
    assert best[0] == best[1]


def test_what_no_program_may_choose_costs_the_budgets_that_need_it_and_no_others():
    """A pair of options whose loss is not finite: at 2 bits everywhere nothing is left, above that everything is answered."""
    whole = matrix_of(0, "gauss_newton")
    forbidden = replace(whole, forbidden=((SPACE.option(0, 2), SPACE.option(1, 2)),))
    budgets, without_answer = budgets_of([2, 3, 8]), []
    answers = propose(
        {"layerwise": replace(whole, estimator="layerwise"), "gauss_newton": forbidden},
        budgets,
        solvers.prepare,
        without_answer=lambda budget, method, error: without_answer.append((budget.name, method, str(error))),
    )
    assert {(p.budget.name, p.method) for p in answers} == {
        *((f"{bits} bits", method) for bits in (2, 3, 8) for method in (UNIFORM, "layerwise")),
        *((f"{bits} bits", "gauss_newton") for bits in (3, 8)),
    }
    ((budget, method, why),) = without_answer
    assert (budget, method) == ("2 bits", "gauss_newton")
    assert "1 forbidden pairs" in why
    with pytest.raises(InfeasibleError, match="forbidden pairs"):
        propose({"gauss_newton": forbidden}, budgets[:1], solvers.prepare)
    lost = replace(whole, quarantined=tuple(SPACE.option(2, bits) for bits in (2, 4, 8)))
    with pytest.raises(InfeasibleError, match="no bit-width is left for layer2"):
        propose({"layerwise": whole, "gauss_newton": lost}, budgets, solvers.prepare)


def random_score(rng: np.random.Generator, num_images: int = 40) -> Score:
    """Brier scores and hits that have to do with nothing."""
    briers = rng.uniform() * rng.exponential(size=num_images)
    return Score(briers, (rng.random(num_images) < rng.uniform(0.5, 1)).astype(float))


def random_scores(seed: int) -> dict[Assignment, Score]:
    """One for each assignment."""
    rng = np.random.default_rng(seed)
    return {a: random_score(rng) for a in ALL}


def exceeds(ones: np.ndarray, others: np.ndarray) -> bool:
    """By more than two standard errors of the paired difference."""
    differences = ones - others
    return differences.sum() > 2 * statistics.stdev(differences) * len(differences) ** 0.5


@pytest.mark.parametrize("seed", range(20))
def test_chosen_is_the_best_that_is_safe_unless_another_is_significantly_nearer_to_float(seed):
    losses, scores, proposals = random_losses(seed), random_scores(seed), random_proposals(seed)
    rows = choose(SPACE, proposals, losses, scores=scores)
    for budget, row in zip(BUDGETS, (row for row in rows if row.method == CHOSEN), strict=True):
        limit, score = budget.limit(SPACE), scores[row.assignment]
        fitting = [p for p in proposals if limit.holds(SPACE, p.assignment)]
        safe = min((p.assignment for p in fitting if p.method in SAFE), key=losses.get)
        assert row.loss_deployed == losses[row.assignment] <= losses[safe]
        assert (row.brier_deployed, row.agreement_deployed) == (score.briers.mean(), score.hits.mean())
        no_worse = {p.assignment for p in fitting if losses[p.assignment] <= losses[safe]}
        rivals = {safe, *(a for a in no_worse if exceeds(scores[safe].briers, scores[a].briers))}
        most = max(rivals, key=lambda a: scores[a].hits.mean())
        assert row.assignment in rivals
        assert not exceeds(scores[most].hits, score.hits)
        nearer = [a for a in rivals if scores[a].brier < score.brier]
        assert all(exceeds(scores[most].hits, scores[a].hits) for a in nearer)
        competitors = [r for r in rows if r.budget == row.budget and r.method not in (CHOSEN, row.winner)]
        assert row.gain == min(r.loss_deployed for r in competitors) - row.loss_deployed


def test_hits_decide_where_the_difference_is_significant_and_brier_scores_where_it_is_not():
    budget = budgets_of([8])[0]
    near, right = Assignment((8, 8, 8, 8)), Assignment((8, 8, 8, 4))
    proposals = [Proposal(budget, "gauss_newton", a) for a in (near, right)]
    hits = np.ones(100)
    for missed, expected in ((0, near), (3, near), (4, right), (30, right)):  # two standard errors of 4 in 100 are 3.94
        fewer = hits.copy()
        fewer[:missed] = 0
        scores = {near: Score(0.1 * hits, fewer), right: Score(0.2 * hits, hits)}
        rows = choose(SPACE, proposals, {near: 0.1, right: 0.2}, scores=scores)
        assert next(row.assignment for row in rows if row.method == CHOSEN) == expected
    one = {near: Score(np.array([0.1]), np.zeros(1)), right: Score(np.array([0.2]), np.ones(1))}  # one image has no error
    assert choose(SPACE, proposals, {near: 0.1, right: 0.2}, scores=one)[-1].assignment == near
    safe = [*proposals, Proposal(budget, UNIFORM, near)]
    rows = choose(
        SPACE, safe, {near: 0.1, right: 0.2}, scores={near: Score(0.1 * hits, 0 * hits), right: Score(0.2 * hits, hits)}
    )
    assert rows[-1].assignment == near  # never worse in loss than uniform


def test_interactions_earn_their_place_beyond_the_error_of_the_images_that_decide():
    """With 64 images the same difference leaves layerwise what is chosen, and with more it does not."""
    budget = budgets_of([8])[0]
    layerwise, other = Assignment((8, 8, 8, 8)), Assignment((8, 8, 8, 4))
    proposals = [Proposal(budget, "layerwise", layerwise), Proposal(budget, "gauss_newton", other)]
    for num_images, expected in ((64, layerwise), (1024, other)):
        noise = np.random.default_rng(0).normal(size=num_images)
        noise = (noise - noise.mean()) / noise.std()
        briers = np.full(num_images, 0.5)
        scores = {layerwise: Score(briers, np.ones(num_images)), other: Score(briers - 0.01 + 0.1 * noise, np.ones(num_images))}
        rows = choose(SPACE, proposals, {layerwise: 0.2, other: 0.1}, scores=scores)
        assert next(row.assignment for row in rows if row.method == CHOSEN) == expected
    worse_in_loss = choose(SPACE, proposals, {layerwise: 0.1, other: 0.2}, scores=scores)
    assert worse_in_loss[-1].assignment == layerwise


def test_of_equal_brier_scores_the_less_loss_and_then_the_smaller_is_chosen():
    budget = budgets_of([8])[0]
    a, b, c = Assignment((8, 8, 8, 8)), Assignment((8, 8, 8, 4)), Assignment((4, 8, 8, 4))
    proposals = [Proposal(budget, "gauss_newton", x) for x in (a, b, c)]
    scores = dict.fromkeys((a, b, c), Score(np.full(3, 0.5), np.ones(3)))
    for losses, expected in (({a: 0.1, b: 0.2, c: 0.2}, a), ({a: 0.2, b: 0.1, c: 0.1}, c)):
        rows = choose(SPACE, proposals, losses, scores=scores)
        assert next(row.assignment for row in rows if row.method == CHOSEN) == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("scored", [False, True])
def test_a_network_without_a_finite_loss_is_chosen_only_where_there_is_no_other(bad, scored):
    """Uniform stands first among the proposals, and may be of a candidate that is quarantined."""
    budget, better = BUDGETS[0], Assignment((4, 2, 2, 2))
    proposals = [Proposal(budget, UNIFORM, SPACE.narrowest), Proposal(budget, "layerwise", better)]
    scores = (
        {SPACE.narrowest: Score(np.full(3, bad), np.zeros(3)), better: Score(np.full(3, 0.3), np.zeros(3))} if scored else None
    )
    *reported, chosen = choose(SPACE, proposals, {SPACE.narrowest: bad, better: 0.2}, scores=scores)
    assert (chosen.assignment, chosen.winner, chosen.loss_deployed) == (better, "layerwise", 0.2)
    assert reported[0].loss_deployed == np.inf  # NaN is as bad, and has an order
    (_, alone) = choose(SPACE, proposals[:1], {SPACE.narrowest: bad})
    assert (alone.assignment, alone.gain) == (SPACE.narrowest, 0.0)


def test_what_a_search_tried_beside_the_chosen_one_is_no_rival_of_it():
    budget = BUDGETS[-1]
    uniform, searched, tried = Assignment((2, 2, 2, 2)), Assignment((4, 2, 2, 2)), Assignment((2, 4, 2, 2))
    proposals = [
        Proposal(budget, UNIFORM, uniform),
        *(Proposal(budget, LOCAL_SEARCH, a, reported=False) for a in (searched, tried)),
    ]
    (chosen,) = [r for r in choose(SPACE, proposals, {uniform: 0.4, searched: 0.1, tried: 0.2}) if r.method == CHOSEN]
    assert (chosen.winner, chosen.gain) == (LOCAL_SEARCH, pytest.approx(0.3))


def measured_of(seed: int) -> Measured:
    """Two blocks of Gram tiles, positive semidefinite at each temperature."""
    rng, k = np.random.default_rng(seed), SPACE.num_options
    sums = np.zeros((2, 2 + len(TEMPERATURES) * k, 1 + k))
    sums[:, 0] = rng.exponential(size=(2, 1 + k))
    for block in sums:
        for t in range(len(TEMPERATURES)):
            rows = rng.normal(size=(k, 20))
            block[2 + t * k : 2 + (t + 1) * k, 1:] = rows @ rows.T
    return Measured(SPACE, "kl_to_float", np.array([4, 4]), {"gram": sums})


@pytest.mark.parametrize("named", [(), ("layerwise", "gauss_newton"), ("tempered4",), TEMPERED])
def test_matrices_beside_those_named_are_made_of_what_is_measured_anyway(named):
    measured = measured_of(0)
    extra = extra_matrices(measured, named)
    assert set(extra) == {"layerwise", *TEMPERED} - set(named)
    for name, matrix in extra.items():
        assert np.array_equal(matrix.values, estimate(name, measured).values)
    singles = Measured(SPACE, "kl_to_float", measured.counts, {"singles": measured.sums["singles"]})
    assert set(extra_matrices(singles, named)) == {"layerwise"} - set(named)


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (("layerwise", "gauss_newton"), TEMPERED),
        (("gauss_newton",), ("layerwise", *TEMPERED)),
        (("tempered4", "hawq"), ("layerwise", "tempered2", "tempered8")),
        (("pairwise",), ("layerwise",)),
        (("blockwise", "fisher"), ("layerwise",)),
        (("layerwise",), ()),
        (("hawq", "mpqco", "fisher"), ()),  # of gradients alone, which hold no loss of an option
    ],
)
def test_unlisted_are_layerwise_and_the_tempered_ones_where_their_tiles_are_measured_anyway(named, expected):
    kinds = kinds_of(named)
    assert unreported_estimators(named, kinds) == expected
    assert kinds_of([*named, *expected]) == kinds  # for nothing further


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("named", [("gauss_newton",), ("pairwise",), ("tempered4", "gauss_newton"), ("pairwise", "gauss_newton")])
def test_chosen_is_never_worse_than_layerwise_and_uniform_whoever_is_named(named, seed):
    """Whatever is measured of the assignments: losses, Brier scores and hits have to do with nothing here."""
    measured, losses = measured_of(seed), random_losses(seed)
    kinds, k = kinds_of(named), SPACE.num_options
    pairs = np.random.default_rng([seed, 1]).exponential(size=(2, k, k))
    sums = {kind: measured.sums.get(kind, pairs) for kind in kinds}
    measured = Measured(SPACE, "kl_to_float", measured.counts, sums)
    matrices, fake = {name: estimate(name, measured) for name in named}, FakeSolver()
    proposals = propose(matrices, BUDGETS, fake.prepare)
    proposals += propose_variants(matrices, BUDGETS, fake.prepare, extra=extra_matrices(measured, named))
    rows = choose(SPACE, proposals, losses, scores=random_scores(seed))
    assert {row.method for row in rows} == {UNIFORM, *named, CHOSEN}
    layerwise = estimate("layerwise", measured)
    for budget in BUDGETS:
        limit = budget.limit(SPACE)
        optimum = min((a for a in ALL if limit.holds(SPACE, a)), key=layerwise.predicted_increase)
        chosen = next(row for row in rows if (row.budget, row.method) == (budget.name, CHOSEN))
        assert chosen.loss_deployed <= min(losses[optimum], losses[widest_uniform(SPACE, [limit])])


def plain_measured(seed: int) -> Measured:
    """The same, and losses of single options without corrections."""
    measured = measured_of(seed)
    plain = np.random.default_rng([seed, 2]).exponential(size=(2, 1 + SPACE.num_options))
    return replace(measured, sums={"gram": measured.sums["gram"], "plain_singles": plain})


@pytest.mark.parametrize("seed", range(5))
def test_what_is_proposed_without_corrections_is_uniform_and_the_optimum_of_plain_losses(seed):
    matrix = uncorrected(plain_measured(seed))
    proposals = propose_uncorrected(matrix, BUDGETS, FakeSolver().prepare)
    assert {(p.method, p.assignment.corrected, p.reported) for p in proposals} == {
        (UNIFORM, "none", False), (LAYERWISE_PLAIN, "none", False)
    }  # fmt: skip
    for proposal in proposals:
        limit = proposal.budget.limit(SPACE)
        fitting = [a for a in ALL if limit.holds(SPACE, a)]
        expected = min(fitting, key=matrix.predicted_increase) if proposal.solution else widest_uniform(SPACE, [limit])
        assert proposal.assignment == expected.with_corrections("none")


def test_without_corrections_nothing_is_proposed_where_nothing_was_measured_or_a_layer_never_works():
    assert uncorrected(measured_of(0)) is None
    assert propose_uncorrected(None, BUDGETS, FakeSolver().prepare) == []
    measured = plain_measured(0)
    measured.sums["plain_singles"][:, 1:4] = np.nan  # every bit-width of the first layer
    assert uncorrected(measured) is None
    measured = plain_measured(0)
    measured.sums["plain_singles"][:, 1:3] = np.nan  # all but its eight bits: tight budgets are out of reach
    proposals = propose_uncorrected(uncorrected(measured), BUDGETS, lambda program: solvers.prepare(program, "exhaustive"))
    assert [p.budget for p in proposals if p.method == UNIFORM] == list(BUDGETS)
    assert all(p.assignment.bits[0] == 8 for p in proposals if p.method == LAYERWISE_PLAIN)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_chosen_is_worse_than_anything_without_corrections(seed):
    """Whatever is measured: losses, scores and corrections have to do with nothing here."""
    rng = np.random.default_rng(seed)
    proposals = [
        replace(p, assignment=p.assignment.with_corrections(level))
        for p in random_proposals(seed)
        for level in rng.permutation(["all", "static", "none"])[: rng.integers(1, 4)]
    ]
    every = [a.with_corrections(level) for a in ALL for level in ("all", "static", "none")]
    losses = dict(zip(every, rng.exponential(size=len(every)), strict=True))
    scores = {a: random_score(rng) for a in every}
    rows = choose(SPACE, proposals, losses, scores=scores)
    for budget, row in zip(BUDGETS, (row for row in rows if row.method == CHOSEN), strict=True):
        limit = budget.limit(SPACE)
        plain = [p.assignment for p in proposals if p.assignment.corrected == "none" and limit.holds(SPACE, p.assignment)]
        assert row.loss_deployed <= min([losses[a] for a in plain], default=np.inf)


def test_variants_and_matrices_beside_compete_without_a_row_of_their_own():
    matrices = {name: matrix_of(1, name) for name in ("layerwise", "pairwise", "gauss_newton")}
    extra = {"tempered2": matrix_of(2, "tempered2")}
    proposals = propose_variants(matrices, BUDGETS, FakeSolver().prepare, extra=extra)
    assert [(p.budget, p.method) for p in proposals] == [(b, m) for m in ("pairwise_raw", "tempered2") for b in BUDGETS]
    for proposal in proposals:
        limit = proposal.budget.limit(SPACE)
        assert not proposal.reported
        assert limit.holds(SPACE, proposal.assignment)
        fitting = [a for a in ALL if limit.holds(SPACE, a)]
        matrix = extra.get(proposal.method, matrices["pairwise"])
        assert matrix.predicted_increase(proposal.assignment) == min(map(matrix.predicted_increase, fitting))


def test_the_winner_is_named_and_of_equal_ones_the_first_of_this_budget():
    small, large = budgets_of([3, 5])
    a, b, c = Assignment((2, 2, 2, 2)), Assignment((4, 2, 2, 2)), Assignment((4, 4, 4, 4))
    losses = {a: 0.3, b: 0.1, c: 0.2}
    proposals = [
        Proposal(small, UNIFORM, a), Proposal(small, "pairwise", b),
        Proposal(large, UNIFORM, c), Proposal(large, "layerwise", c),
    ]  # fmt: skip
    by_budget = {row.budget: row for row in choose(SPACE, proposals, losses) if row.method == CHOSEN}
    assert (by_budget["3 bits"].winner, by_budget["3 bits"].gain) == ("pairwise", pytest.approx(0.2))
    assert (by_budget["5 bits"].winner, by_budget["5 bits"].assignment) == ("pairwise for 3 bits", b)
    assert by_budget["5 bits"].gain == pytest.approx(0.1)
    tied = choose(SPACE, [*proposals, Proposal(large, "pairwise", b)], losses)
    assert next(row.winner for row in tied if row.budget == "5 bits" and row.method == CHOSEN) == "pairwise"
    shared = choose(SPACE, [*proposals, Proposal(small, "gauss_newton", b)], losses)  # no gain over a method with the same answer
    assert next(row.gain for row in shared if row.budget == "3 bits" and row.method == CHOSEN) == 0.0


def test_of_equal_losses_the_smaller_assignment_is_chosen():
    budget = budgets_of([8])[0]
    wide, narrow = Assignment((8, 8, 8, 8)), Assignment((8, 8, 8, 4))
    rows = choose(SPACE, [Proposal(budget, "layerwise", wide), Proposal(budget, "pairwise", narrow)], {wide: 0.1, narrow: 0.1})
    assert next(row for row in rows if row.method == CHOSEN).assignment == narrow


def test_a_standing_limit_is_kept_by_what_other_budgets_lend():
    small, large = budgets_of([3, 5])
    a, b = Assignment((2, 2, 2, 2)), Assignment((4, 2, 2, 2))
    limit = constraint("size", SPACE, SPACE.size_bytes(a))
    rows = choose(SPACE, [Proposal(small, UNIFORM, b), Proposal(large, UNIFORM, a)], {a: 0.3, b: 0.1}, [limit])
    assert next(r for r in rows if r.method == CHOSEN and r.budget == large.name).assignment == a


@pytest.mark.parametrize("seed", range(3))
def test_propose_gives_the_optimum_of_each_matrix_and_prepares_once_a_kind_of_budget(seed):
    matrices = {"layerwise": matrix_of(seed, "layerwise").diagonal_only(), "gauss_newton": matrix_of(seed)}
    budgets, fake, told = [*BUDGETS, *budgets_of([], [60, 90])], FakeSolver(), []
    proposals = propose(matrices, budgets, fake.prepare, solved=lambda budget, method: told.append((budget, method)))
    assert (fake.prepared, fake.solved) == (2 * len(matrices), len(budgets) * len(matrices))
    assert sorted(told, key=str) == sorted(itertools.product(budgets, matrices), key=str)
    assert {(p.budget, p.method) for p in proposals} == set(itertools.product(budgets, [UNIFORM, *matrices]))
    for p in proposals:
        limit = p.budget.limit(SPACE)
        assert limit.holds(SPACE, p.assignment)
        if p.method != UNIFORM:
            matrix = matrices[p.method]
            least = min(matrix.predicted_increase(a) for a in ALL if limit.holds(SPACE, a))
            assert p.loss_predicted == pytest.approx(0.25 + least, abs=1e-12)
            assert matrix.predicted_increase(p.assignment) == pytest.approx(least, abs=1e-12)


@pytest.mark.parametrize("solver", ["scip", "exhaustive"])
def test_propose_with_a_real_solver_equals_looking_at_every_assignment(solver):
    matrices = {"gauss_newton": matrix_of(7), "layerwise": matrix_of(8, "layerwise").diagonal_only()}
    proposals = propose(matrices, BUDGETS, lambda program: solvers.prepare(program, solver, time_limit=30))
    for p in proposals:
        if p.method != UNIFORM:
            fitting = [a for a in ALL if p.budget.limit(SPACE).holds(SPACE, a)]
            least = min(matrices[p.method].predicted_increase(a) for a in fitting)
            assert matrices[p.method].predicted_increase(p.assignment) == pytest.approx(least, rel=1e-5, abs=1e-9)
            assert str(p.solution.status) == "optimal"


@pytest.mark.parametrize(
    ("average", "bits"),
    [(2, 2), (2.25, 2), (3.99, 2), (4, 4), (7.99, 4), (8, 8), (32, 8), (1, 2)],
)
def test_the_widest_uniform_that_fits(average, bits):
    limit = constraint("average_bits", SPACE, average)
    assert widest_uniform(SPACE, [limit]) == Assignment((bits,) * 4)
    tight = constraint("size", SPACE, SPACE.size_bytes(SPACE.narrowest))
    assert widest_uniform(SPACE, [limit, tight]) == SPACE.narrowest


@pytest.mark.parametrize(
    ("macs_times", "expected"), [(64, "8/8"), (63, "4/8"), (32, "4/8"), (31, "4/4"), (16, "4/4"), (15, "2/4")]
)
def test_of_uniform_networks_under_bit_operations_the_one_of_the_widest_narrow_side(macs_times, expected):
    """Not 8-bit weights with 2-bit activations, which cost as much as 4 and 4."""
    layers = [Layer(f"l{k}", (10,), "linear", macs=100) for k in range(3)]
    space = SearchSpace.uniform(layers, (2, 4, 8)).with_activations((2, 4, 8))
    limit = constraint("bops", space, 300 * macs_times)
    assert str(widest_uniform(space, [limit])) == " ".join([expected] * 3)


def test_options_that_lose_their_loss_are_never_proposed():
    from dataclasses import replace

    best = 2  # the first layer at 8 bits, which every generous budget would take
    matrix = replace(matrix_of(3), quarantined=(best,))
    limit = constraint("average_bits", SPACE, 8)
    program = program_of(matrix, [limit])
    outcome = solvers.solve(program, "exhaustive")
    assert outcome.assignment.bits[0] != 8


def test_what_must_not_be_chosen_is_predicted_to_cost_infinitely_much():
    from dataclasses import replace

    plain = matrix_of(3)
    matrix = replace(plain, quarantined=(2,), forbidden=((0, 3),))
    for assignment in map(Assignment, all_assignments(SPACE.bit_widths)):
        chosen = set(SPACE.chosen_options(assignment))
        allowed = 2 not in chosen and not {0, 3} <= chosen
        assert matrix.predicted_increase(assignment) == (plain.predicted_increase(assignment) if allowed else np.inf)


def test_budgets_keep_their_order_lose_duplicates_and_have_names_of_their_own():
    budgets = budgets_of([3, 2.25, 3.0], [100_000, 100_001])
    assert [b.name for b in budgets] == ["3 bits", "2.25 bits", "100 kB", "100.001 kB"]
    many = budgets_of([2 + k / 10**6 for k in range(50)], range(10**7, 10**7 + 50))
    assert len({b.name for b in many}) == len(many) == 100


def test_an_impossible_budget_is_refused_with_the_smallest_and_the_range():
    smallest, largest = SPACE.size_bytes(SPACE.narrowest), SPACE.size_bytes(SPACE.widest)
    with pytest.raises(InfeasibleError, match=str(smallest)) as caught:
        check_budgets(SPACE, budgets_of([], [smallest - 1]))
    assert str(largest) in str(caught.value)
    with pytest.raises(InfeasibleError, match="2"):
        check_budgets(SPACE, budgets_of([4, 1.99]))
    check_budgets(SPACE, budgets_of([2, 32], [smallest]))


def test_limits_that_can_only_be_kept_one_by_one_are_refused_without_a_measurement():
    costs = tuple(1.0 / option.bits for option in SPACE.options)  # a table where few bits are slow
    fast = sum(min(costs[a:b]) for a, b in pairwise(SPACE.offsets))
    with pytest.raises(InfeasibleError, match=r"budget 2\.5 bits: .*alone"):
        check_budgets(SPACE, budgets_of([2.5]), [Constraint("latency", "s", costs, 1.01 * fast)])
    check_budgets(SPACE, budgets_of([2.5]), [Constraint("latency", "s", costs, 10 * fast)])


def test_of_two_limits_on_one_cost_the_tighter_holds():
    three, four = Budget("average_bits", 3).limit(SPACE), Budget("average_bits", 4).limit(SPACE)
    size = Budget("size", 70).limit(SPACE)
    assert [limit.bound for limit in merge_limits(three, [four])] == [three.bound]
    assert [limit.bound for limit in merge_limits(four, [three, size])] == [three.bound, size.bound]


def test_limits_of_one_name_are_the_tightest_of_one_cost_and_stand_side_by_side_where_costs_differ():
    budget = constraint("average_bits", SPACE, 3.0)
    size, less = (constraint("size", SPACE, bound) for bound in (90, 80))
    counted = constraint("size", SPACE, 95, overhead_bytes={"layer0.weight": 4})
    merged = merge_limits(budget, [size, counted, less])
    assert [(limit.name, limit.bound) for limit in merged] == [("average_bits", budget.bound), ("size", 80), ("size 2", 95)]
    taken = Program.build(matrix_of(0), merged)
    assert all(limit.holds(SPACE, taken.assignment(taken.narrowest)) for limit in merged)
