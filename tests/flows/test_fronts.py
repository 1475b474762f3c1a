"""New budgets, fronts and bounds from a stored run: feasible, measured, and never worse than what they are compared with."""

import json
from dataclasses import replace
from math import inf, nan

import pytest

from clado.choosing import solvers
from clado.choosing.choice import safe_methods
from clado.choosing.proposals import Budget, program_of
from clado.errors import ConfigurationError, InfeasibleError
from clado.records.results import CHOSEN, UNIFORM
from clado.records.run_record import RunRecord
from clado.run.limits import limit_of, limits_of, scale_bytes
from clado.run.opened_run import open_run
from clado.settings.loading import parse_config, parse_limit
from clado.space import Layer, SearchSpace
from flows.commands.smallest import FIRST, find, solver_of, text
from flows.commands.stored import StoredRun, solution_text
from flows.commands.sweep import dominated_by, propose_front, sweep
from tests.running import copy_of


@pytest.fixture(scope="module")
def stored(finished) -> StoredRun:
    return StoredRun.open(finished.folder)


@pytest.mark.parametrize(
    ("budget", "limits"),
    [
        (Budget("average_bits", 2.7), []),
        (Budget("size", 90_000), []),
        (Budget("relative_size", 35.0), []),
        (Budget("average_bits", 3.0), ["bops=8.5e8"]),
        (Budget("average_bits", 3.0), ["bops=8.5e8", "size=95000"]),
    ],
)
def test_an_answer_keeps_every_limit_and_beats_its_rivals_on_the_same_matrix(stored, budget, limits):
    space = stored.measured.space
    every = [budget.limit(space), *(limit_of(parse_limit(limit), stored.config, space) for limit in limits)]
    for name, matrix, solution in stored.solve(budget, limits):
        assert str(solution.status) == "optimal"
        assert all(constraint.holds(space, solution.assignment) for constraint in every)
        assert set(solution.slack) == {constraint.name for constraint in every}
        assert solution.objective == pytest.approx(matrix.predicted_increase(solution.assignment))
        if name != "pairwise":  # which minimises the clipped matrix
            rivals = stored.rivals(matrix, budget, limits)
            assert all(solution.objective <= rival.objective + 1e-6 * abs(rival.objective) for rival in rivals.values())
        assert "Proven" in solution_text(name, matrix, solution)


def test_two_limits_on_one_cost_are_the_tighter_one(stored):
    tight = {name: s.assignment for name, _, s in stored.solve(Budget("size", 80_000))}
    both = {name: s.assignment for name, _, s in stored.solve(Budget("size", 95_000), ["size=80000"])}
    assert tight == both


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        *((limit, "has a bound that is not a number; expected KIND=BOUND") for limit in ("bops", "bops=", "bops=x", "=3x")),
        *((limit, "unknown name") for limit in ("=3", "bop=3")),
        *((limit, "finite number") for limit in ("size=inf", "bops=nan")),
        ("size=-1", "greater than 0"),
        *((limit, "needs path") for limit in ("latency=0.002", "table=5")),
        *((limit, "takes no path") for limit in ("bops=4e9:times.csv", "size=1000:times.csv")),
    ],
)
def test_a_limit_that_is_none_is_refused(limit, said, stored):
    with pytest.raises(ConfigurationError, match=said):
        list(stored.solve(Budget("average_bits", 3.0), [limit]))


@pytest.mark.parametrize("kind", ["average_bits", "size", "relative_size"])
def test_a_budget_that_is_no_number_is_refused_and_none_at_all_gives_the_widest(kind, stored):
    with pytest.raises(ConfigurationError, match="the bound is NaN"):
        Budget(kind, nan).limit(stored.measured.space)
    assert Budget(kind, inf).limit(stored.measured.space).holds(stored.measured.space, stored.measured.space.widest)


@pytest.mark.parametrize("damaged", [False, True], ids=["all finite", "one candidate without a finite loss"])
@pytest.mark.parametrize("kind", ["average_bits", "size", "relative_size", "bops"])
def test_a_front_of_every_kind_reaches_from_the_narrowest_that_works_to_the_widest(kind, damaged, finished):
    stored = StoredRun.open(finished.folder)
    space = stored.measured.space
    if damaged:  # the first layer at 2 bits
        sums = {name: array.copy() for name, array in stored.measured.sums.items()}
        sums["singles"][0, 1] = sums["gram"][0, 0, 1] = nan
        sums["gram"][0, 2 :: space.num_options, 1] = nan
        stored = replace(stored, measured=replace(stored.measured, sums=sums))
    proposals = propose_front(stored, kind, 5)
    answers = [p for p in proposals if p.solution is not None]
    assert all(p.budget.limit(space).holds(space, p.assignment) for p in answers)
    assert len({p.budget for p in proposals}) == 5
    for name in {p.method for p in answers}:
        assert any(p.assignment == space.widest or p.budget == answers[-1].budget for p in answers if p.method == name)
    assert all((p.assignment.bits[0] != 2) or not damaged for p in answers)
    least, most, solve = solver_of(stored)
    sizes = [least + k * (most - least) // (FIRST - 1) for k in range(FIRST)]
    assert min(space.size_bytes(a) for a in solve(sizes)) == least
    assert (least > space.size_bytes(space.narrowest)) == damaged


def test_the_smallest_is_looked_for_within_the_limits_of_the_run(finished, tmp_path):
    document = {**copy_of(finished, tmp_path / "run"), "constraints": [{"kind": "size", "bound": 90_000}]}
    document["data"] = {**document["data"], "selection_images": 64}
    (tmp_path / "run" / "config.yaml").write_text(parse_config(document).to_yaml())
    stored = StoredRun.open(tmp_path / "run")
    space, (least, most, _) = stored.measured.space, solver_of(stored)
    assert (least, most) == (space.size_bytes(space.narrowest), 90_000)
    answer = find(stored, open_run(parse_config(document)), 100.0, top1=False)
    assert max(c.size_bytes for c in answer.measured) <= most < space.size_bytes(space.widest)
    reachable = max(solution.minimised for _, _, solution in stored.solve(Budget("size", most)))
    for _, _, solution in stored.smallest_predicted(reachable + 1e-3):
        assert space.size_bytes(solution.assignment) <= most


@pytest.fixture
def forbidden(finished) -> StoredRun:
    """A run in which the first two layers have no finite loss at 2 bits together; each alone has."""
    stored = StoredRun.open(finished.folder)
    sums = {name: array.copy() for name, array in stored.measured.sums.items()}
    k = stored.measured.space.num_options
    first, second = stored.measured.space.option(0, 2), stored.measured.space.option(1, 2)
    sums["pairs"][0, first, second] = nan
    sums["gram"][0, 2 + first, 1 + second] = sums["gram"][0, 2 + second, 1 + first] = nan
    assert sums["pairs"].shape[1:] == (k, k)
    return replace(stored, measured=replace(stored.measured, sums=sums))


def test_a_front_goes_on_above_what_forbidden_pairs_leave_nothing_at(forbidden):
    space = forbidden.measured.space
    proposals = propose_front(forbidden, "size", 6)
    of = {name: [p.budget.bound for p in proposals if p.method == name] for name in ("layerwise", "pairwise")}
    assert len(of["layerwise"]) == 6
    assert of["pairwise"] == of["layerwise"][1:]
    _, _, solve = solver_of(forbidden)
    least = space.size_bytes(space.narrowest)
    assert {space.size_bytes(a) for a in solve([least])} == {least}  # of the others


def test_a_limit_on_what_is_swept_costs_no_method_a_budget(stored):
    """All budgets above the limit have the answer at the limit."""
    limited = replace(
        stored,
        config=parse_config({**stored.config.model_dump(mode="json"), "constraints": [{"kind": "average_bits", "bound": 2.5}]}),
    )
    proposals = propose_front(limited, "average_bits", 5)
    budgets = {p.budget for p in proposals if p.method == UNIFORM}
    assert len(budgets) == 5
    for name in ("layerwise", "pairwise", "gauss_newton"):
        by_budget = {p.budget: p.assignment for p in proposals if p.method == name}
        assert set(by_budget) == budgets
        assert len({by_budget[b] for b in by_budget if b.bound >= 2.5}) == 1


def test_an_impossible_limit_says_what_is_reachable(stored):
    with pytest.raises(InfeasibleError, match="smallest"):
        list(stored.solve(Budget("average_bits", 3.0), ["bops=1"]))


def test_ties_of_the_configuration_hold_in_every_answer(finished, tmp_path):
    document = copy_of(finished, tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    path.write_text(parse_config({**document, "layers": {"ties": [["layer1.*"], ["layer3.2.*", "fc.*"]]}}).to_yaml())
    stored = StoredRun.open(tmp_path / "run")
    for _, _, solution in stored.solve(Budget("average_bits", 2.8)):
        bits = dict(zip(stored.measured.space.names, solution.assignment.bits, strict=True))
        assert len({b for name, b in bits.items() if name.startswith("layer1.")}) == 1
        assert len({b for name, b in bits.items() if name.startswith(("layer3.2.", "fc."))}) == 1


def test_a_size_that_counts_scales_is_the_weights_plus_four_bytes_a_channel(finished):
    space = SearchSpace.uniform([Layer("a", (3, 5), "linear"), Layer("b", (7, 2), "linear")], (2, 8))
    config = parse_config({**finished.document, "constraints": [{"kind": "size", "bound": 60, "scales": True}]})
    assert scale_bytes(config, space) == {"a": 12, "b": 28}
    (limit,) = limits_of(config, space)
    assert limit.name == "size_with_scales"
    assert limit.value(space, space.narrowest) == space.size_bytes(space.narrowest) + 40


def test_a_sweep_measures_every_answer_and_marks_the_dominated(finished, tmp_path):
    run = open_run(parse_config(copy_of(finished, tmp_path / "run")))
    said, receipt = sweep(StoredRun.open(tmp_path / "run"), run, "average_bits", 4)
    record = RunRecord.load(tmp_path / "run" / "sweep" / "record.json")
    assert len(record.budgets) == 4
    for budget in record.budgets:
        chosen = record.find(budget, CHOSEN)
        assert chosen is not None
        assert all(
            chosen.loss_deployed <= r.loss_deployed for r in record.results if r.budget == budget and r.method in safe_methods()
        )
    chosen_rows = [r for r in record.results if r.method == CHOSEN]
    assert not any(dominated_by(chosen_rows)) or "dominated" in said
    assert receipt.delivered
    assert receipt.num_children == len(record.results)
    assert (tmp_path / "run" / "sweep" / "loss_against_size.png").stat().st_size > 1000


def test_domination_needs_less_of_one_and_no_more_of_the_other(finished):
    row = RunRecord.load(finished.folder / "record.json").results[0]
    points = [(10, 1.0, 0.5), (10, 1.0, 0.5), (11, 1.0, 0.5), (9, 2.0, 0.6), (12, 0.5, 0.4), (12, 0.6, 0.4), (12, 0.6, 0.3)]
    rows = [
        replace(row, size_bytes=size, loss_deployed=loss, brier_deployed=brier, agreement_deployed=0.9)
        for size, loss, brier in points
    ]
    assert dominated_by(rows) == [False, False, True, False, False, True, False]
    assert not any(dominated_by([*rows[:2], replace(rows[2], agreement_deployed=0.91)]))
    assert dominated_by([replace(row, brier_deployed=None, agreement_deployed=None) for row in rows[:3]]) == [False, False, True]


@pytest.mark.parametrize("top1", [True, False])
def test_the_smallest_network_keeps_its_bound_as_measured(finished, tmp_path, top1):
    document = copy_of(finished, tmp_path / "run")
    document["data"] = {**document["data"], "selection_images": 100}
    run = open_run(parse_config(document))
    bound = 0.2 if top1 else 0.5
    least = find(StoredRun.open(tmp_path / "run"), run, bound, top1)
    assert least.answer.measured.high <= bound
    assert least.answer.measured.num_images == 100
    assert least.smaller is None or least.smaller.measured.high > bound
    assert f"{least.answer.size_bytes:,}" in text(least, run, top1)


def test_the_smallest_by_prediction_keeps_its_bound_and_one_byte_less_does_not(stored):
    space = stored.measured.space
    for _, matrix, solution in stored.smallest_predicted(0.05):
        assert solution.objective <= 0.05  # what is printed: not of the clipped matrix, which is never less
        assert solution.objective == pytest.approx(matrix.predicted_increase(solution.assignment))
        size = space.size_bytes(solution.assignment)
        below = solvers.solve(program_of(matrix, [Budget("size", size - 1).limit(space)], "raw"))
        assert below.objective > 0.05


def test_solutions_are_written_as_assignments_that_load(stored):
    budget = Budget("average_bits", 2.6)
    name, matrix, solution = next(stored.solve(budget))
    document = json.loads(stored.document(matrix, solution, budget, ["size=90000"]))
    assert (document["budget"], document["limits"]) == ("2.6 bits", ["size=90000"])
    assert stored.measured.space.from_json(document) == solution.assignment
    assert document["estimator"] == name
