"""Solvers: never a wrong "optimal", limits that keep the incumbent, and answers that say what they are."""

import itertools
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix

from clado.choosing import constraints, solvers
from clado.choosing.program import Program
from clado.choosing.solution import Status
from clado.choosing.solvers import _convexify, scip
from clado.choosing.solvers._bound import STEPS, NodeBound
from clado.choosing.solvers._forms import Forms
from clado.errors import ConfigurationError, InfeasibleError, MeasurementError, SolverError
from clado.interaction.matrix import InteractionMatrix
from clado.space import Layer, SearchSpace
from tests.benchmarks.solver_instances import FAMILIES, instance
from tests.contracts.solver import SolverContract, random_case


class TestExhaustive(SolverContract):
    solver, exact = "exhaustive", True


class TestGreedy(SolverContract):
    solver, exact = "greedy", False


class TestScip(SolverContract):
    solver, exact = "scip", True
    num_cases = 200
    num_activation_cases = 60


class TestFactored(SolverContract):
    """What takes over when a plugin fails, on its own."""

    solver, exact = "scip", True
    num_cases = 25
    num_activation_cases = 4  # without bounds of its own SCIP takes minutes where many candidates are nearly equal

    @pytest.fixture(autouse=True)
    def _broken_plugins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: object) -> None:
            raise ZeroDivisionError("a broken plugin")

        monkeypatch.setattr(scip.ScipTree, "visit", broken)


@pytest.mark.benchmark
@pytest.mark.timeout(3600)
def test_thousands_of_small_programs() -> None:
    contract = TestScip()
    for seed in range(10_000, 15_000):
        contract.check(seed)


def program_of(family: str = "medium", average: float = 4.0, network: str = "resnet20", **settings: object) -> Program:
    matrix = instance(network, (2, 4, 8), family, 0)
    limit = constraints.constraint("average_bits", matrix.space, average)
    return Program.build(matrix, [limit], **settings)  # type: ignore[arg-type]


def by_highs(program: Program) -> float:
    """Optimal value by linearisation: a variable per pair of choices, marginals tied to the choices (RLT-1); solved by HiGHS."""
    n = program.num_choices
    pairs = [(k, m) for k in range(n) for m in range(k + 1, n) if program.owner[k] != program.owner[m]]
    column = {pair: n + c for c, pair in enumerate(pairs)}
    objective = np.zeros(n + len(pairs))
    objective[:n] = 0.5 * np.diag(program.quadratic)
    for (k, m), c in column.items():
        objective[c] = program.quadratic[k, m]
    rows, low, high = [], [], []
    groups = [range(a, b) for a, b in itertools.pairwise(program.starts)]
    for group in groups:
        rows.append(dict.fromkeys(group, 1.0))
        low.append(1.0)
        high.append(1.0)
    for costs, limit in zip(program.costs, program.limits, strict=True):
        rows.append({k: float(c) for k, c in enumerate(costs)})
        low.append(-np.inf)
        high.append(float(limit))
    for k in range(n):
        for g, group in enumerate(groups):
            if g != program.owner[k]:
                rows.append({**{column[min(k, m), max(k, m)]: 1.0 for m in group}, k: -1.0})
                low.append(0.0)
                high.append(0.0)
    matrix = lil_matrix((len(rows), len(objective)))
    for r, row in enumerate(rows):
        for c, value in row.items():
            matrix[r, c] = value
    integrality = np.zeros(len(objective))
    integrality[:n] = 1
    scale = np.abs(objective).max()
    answer = milp(
        objective / scale,
        constraints=LinearConstraint(matrix.tocsr(), low, high),
        bounds=Bounds(0, 1),
        integrality=integrality,
        options={"mip_rel_gap": 1e-7},
    )
    assert answer.status == 0, answer.message
    return float(answer.fun * scale)


@pytest.mark.parametrize("family", ["medium", "strong", "lowrank"])
def test_mid_size_agrees_with_an_independent_solver(family: str) -> None:
    """Twelve layers, raw indefinite matrix: 531,441 assignments, HiGHS on a linearisation."""
    whole = instance("resnet20", (2, 4, 8), family, 3)
    layers = whole.space.layers[:12]
    matrix = InteractionMatrix(SearchSpace.uniform(layers, (2, 4, 8)), whole.values[:36, :36].copy(), "cut", "none", 0.0, 1)
    program = Program.build(matrix, [constraints.constraint("average_bits", matrix.space, 3.7)])
    solution = solvers.solve(program)
    assert solution.status is Status.OPTIMAL
    assert solution.minimised == pytest.approx(by_highs(program), rel=3e-6)
    assert solvers.solve(program, "exhaustive").minimised == pytest.approx(solution.minimised, rel=3e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("convexity", ["raw", "clip_psd"])
def test_the_shipped_size_is_proven(family: str, convexity: str) -> None:
    for average in (2.5, 4.0):
        solution = solvers.solve(program_of(family, average, convexity=convexity))
        assert solution.status is Status.OPTIMAL
        assert solution.gap <= 2e-6
        assert solution.bound <= solution.minimised


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bound_does_not_depend_on_where_it_starts(family: str) -> None:
    """Nor on a start of one choice per group that the knapsack forbids and cannot move from."""
    program = program_of(family, 4.0, convexity="clip_psd")
    bounds = NodeBound(program, Forms(program).nearest)
    everything = np.ones(program.num_choices, dtype=bool)
    cold = bounds.solve(everything)
    assert bounds.costs @ cold.x <= bounds.limits + 1e-9
    rng = np.random.default_rng(0)
    for choices in (program.widest, program.narrowest, *(rng.integers(0, 3, 22) + program.starts[:-1] for _ in range(20))):
        vertex = np.isin(np.arange(program.num_choices), choices)
        for active in (True, False):
            warm = bounds.solve(everything, vertex, np.array([active]))
            assert warm.value <= cold.value + 1e-9 * abs(cold.value)  # of a valid bound there is only one best
            if warm.steps < STEPS:
                assert warm.value == pytest.approx(cold.value, rel=1e-6)


def test_tightening_the_budget_notch_by_notch() -> None:
    """Just under the optimum's own cost the optimum is another one, not better; at its cost it stays."""
    program = program_of("strong")
    best = solvers.solve(program)
    for _ in range(6):
        used = best.values["average_bits"]
        same = solvers.solve(program.with_bounds({"average_bits": used}))
        assert same.minimised == pytest.approx(best.minimised, rel=3e-6)
        assert same.slack["average_bits"] >= 0
        tighter = solvers.solve(program.with_bounds({"average_bits": used - 1}))
        assert tighter.status is Status.OPTIMAL
        assert tighter.values["average_bits"] <= used - 1
        assert tighter.minimised >= best.minimised - 3e-6 * abs(best.minimised)
        best = tighter


def test_budgets_in_large_numbers_are_exact() -> None:
    """One unit below what an assignment needs of 10^11 is too little, although SCIP's relative tolerance would let it pass."""
    space = SearchSpace.uniform([Layer(f"layer{i}", (10**10 + i,), "linear") for i in range(4)], (2, 4, 8))
    values = np.diag(np.tile([1.0, 0.1, 0.001], 4)) + 1e-3
    program = Program.build(
        InteractionMatrix(space, values, "large", "none", 0.0, 1), [constraints.constraint("average_bits", space, 4.0)]
    )
    for part in (program, program.layerwise()):
        uniform = 4 * space.num_weights
        fits = solvers.solve(part.with_bounds({"average_bits": uniform}))
        below = solvers.solve(part.with_bounds({"average_bits": uniform - 1}))
        assert fits.assignment.bits == (4, 4, 4, 4)
        assert below.values["average_bits"] <= uniform - 1
        assert below.minimised == pytest.approx(
            solvers.solve(part.with_bounds({"average_bits": uniform - 1}), "exhaustive").minimised
        )


@pytest.mark.parametrize("seed", range(30))
def test_linear_programs_are_solved_to_the_same_relative_precision_whatever_their_spread(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers = [Layer(f"layer{i}", (int(rng.integers(1, 2000)),), "linear") for i in range(5)]
    space = SearchSpace.uniform(layers, (2, 4, 8, 16))
    spread = np.array([4.0 ** (-2 * option.bits) for option in space.options])
    losses = spread * 10 ** rng.uniform(-16, 0, space.num_options)
    matrix = InteractionMatrix(space, np.diag(losses), "wide", "none", 0.0, 1)
    bound = rng.uniform(9.6, 15.7)  # so generous that the best answer is many orders of magnitude below the worst option
    program = Program.build(matrix, [constraints.constraint("average_bits", space, bound)])
    exact, outcome = solvers.solve(program, "exhaustive"), solvers.solve(program)
    assert outcome.status == Status.OPTIMAL
    assert outcome.minimised == pytest.approx(exact.minimised, rel=3e-6, abs=0)
    assert outcome.bound <= exact.minimised * (1 + 3e-6)


def test_layerwise_is_an_integer_linear_program() -> None:
    program = program_of("medium", network="resnet50").layerwise()
    solution = solvers.solve(program)
    assert solution.status is Status.OPTIMAL
    assert solution.gap <= 2e-6


def test_forms_equal_the_function_and_are_convex() -> None:
    for seed in range(30):
        case = random_case(seed)
        if case.least() is None:
            continue
        program = case.program()
        forms = Forms(program)
        for form in (forms.nearest, forms.half_quick, forms.long):
            assert _convexify.least_eigenvalue(form)[0] >= -1e-12 * np.abs(program.quadratic).max()
            for choices in itertools.islice(itertools.product(*(range(a, b) for a, b in itertools.pairwise(program.starts))), 20):
                taken = list(choices)
                value = form.constant + form.linear[taken].sum() + 0.5 * form.hessian[np.ix_(taken, taken)].sum()
                assert value == pytest.approx(
                    program.minimised(np.array(taken)), rel=1e-8, abs=1e-8 * np.abs(program.quadratic).max()
                )


def test_node_bounds_are_below_everything_that_is_allowed() -> None:
    """Over random subsets of choices; and ruling out by reduced cost never rules out what is better."""
    rng = np.random.default_rng(0)
    checked = 0
    for seed in range(150):
        case = random_case(seed)
        if case.least() is None:
            continue
        program = case.program()
        bounds = NodeBound(program, Forms(program).half_quick)
        allowed = rng.random(program.num_choices) < 0.7
        allowed[[rng.integers(a, b) for a, b in itertools.pairwise(program.starts)]] = True
        bound = bounds.solve(allowed)
        within = itertools.product(*(a + np.flatnonzero(allowed[a:b]) for a, b in itertools.pairwise(program.starts)))
        for choices in itertools.islice(within, 300):
            taken = np.array(choices)
            if program.is_feasible(taken):
                value = program.minimised(taken)
                slack = 1e-9 * np.abs(program.quadratic).max()
                assert bound.value <= value + slack
                assert bound.value + bound.reduced_cost[taken].max() <= value + slack
                checked += 1
    assert checked > 1000


def test_infeasible_together_says_what_each_needs() -> None:
    space = SearchSpace.uniform([Layer(f"layer{i}", (100,), "linear", macs=10) for i in range(4)], (2, 8))
    matrix = InteractionMatrix(space, np.eye(8) + 0.1, "none", "none", 0.0, 1)
    narrow = constraints.constraint("size", space, 4 * 25 + 75)  # one layer at most at 8 bits
    wide = constraints.Constraint(
        "quality", "points", tuple(-float(b) for _, b, _ in space.options), -20.0
    )  # at least two at 8 bits
    program = Program.build(matrix, [narrow, wide])
    for solver in ("scip", "exhaustive"):
        with pytest.raises(
            InfeasibleError, match=r"(?s)size: .* 100 to 400; .*size needs at least 250 bytes.*quality needs at least -14"
        ):
            solvers.solve(program, solver)


def test_a_budget_of_bit_operations_narrows_activations_before_weights_where_they_cost_less() -> None:
    """Each layer's loss is of its weights' bits, far less of its activations': the answer says so, and is proven."""
    layers = [Layer(f"layer{i}", (10,), "linear", macs=100 + i) for i in range(4)]
    space = SearchSpace.uniform(layers, (2, 4, 8)).with_activations((4, 8))
    losses = np.array([4.0**-o.bits + 1e-6 * 4.0**-o.activation_bits for o in space.options if o.activation_bits])
    matrix = InteractionMatrix(space, np.diag(losses), "diagonal", "none", 0.0, 1)
    macs = sum(layer.macs for layer in layers)
    answers = {}
    for solver in ("scip", "exhaustive"):
        limits = [constraints.constraint("bops", space, bound) for bound in (macs * 64, macs * 32, macs * 16)]
        answers[solver] = [solvers.solve(Program.build(matrix, [limit]), solver).assignment for limit in limits]
        assert [str(assignment) for assignment in answers[solver]][:2] == ["8/8 8/8 8/8 8/8", "8/4 8/4 8/4 8/4"]
        assert set(answers[solver][2].activation_bits) == {4}
    assert answers["scip"] == answers["exhaustive"]


def test_groups_of_one_choice_may_be_many_more_than_arrays_have_axes() -> None:
    space = SearchSpace.uniform([Layer(f"layer{i:02}", (10,), "linear") for i in range(80)], (2, 8))
    matrix = InteractionMatrix(space, np.diag(np.tile([0.0, 1.0], 80)), "none", "none", 0.0, 1)
    for free in ([], ["layer3?"]):
        pins = {f"layer{i:02}": [8] for i in range(80) if not (free and i // 10 == 3)}
        outcome = solvers.solve(Program.build(matrix, candidates=pins), "exhaustive")
        assert outcome.assignment.bits == tuple(2 if free and i // 10 == 3 else 8 for i in range(80))


def test_forbidden_pairs_can_make_it_infeasible() -> None:
    space = SearchSpace.uniform([Layer(f"layer{i}", (10,), "linear") for i in range(2)], (2, 8))
    matrix = InteractionMatrix(space, np.eye(4) + 0.1, "none", "none", 0.0, 1)
    with pytest.raises(InfeasibleError, match="4 forbidden pairs"):
        solvers.solve(Program.build(matrix, forbidden=[(0, 2), (0, 3), (1, 2), (1, 3)]))


@pytest.mark.parametrize("solver", ["scip", "exhaustive", "greedy"])
def test_one_layer_and_all_pinned(solver: str) -> None:
    matrix = instance("resnet20", (2, 4, 8), "medium", 0)
    pinned = Program.build(matrix, candidates={"*": [4]})
    assert set(solvers.solve(pinned, solver).assignment.bits) == {4}
    single = InteractionMatrix(
        SearchSpace.uniform(matrix.space.layers[:1], (2, 4, 8)), np.diag([3.0, 1.0, 2.0]), "one", "none", 0.0, 1
    )
    solution = solvers.solve(Program.build(single), solver)
    assert solution.assignment.bits == ((8,) if solver == "greedy" and solution.objective == 1.0 else (4,))


def test_nothing_to_gain() -> None:
    """A zero matrix, and one with only interactions."""
    space = SearchSpace.uniform([Layer(f"layer{i}", (10,), "linear") for i in range(4)], (2, 4, 8))
    limit = constraints.constraint("average_bits", space, 4.0)
    zero = solvers.solve(Program.build(InteractionMatrix(space, np.zeros((12, 12)), "zero", "none", 0.0, 1), [limit]))
    assert (zero.status, zero.objective) == (Status.OPTIMAL, 0.0)
    pairs = np.random.default_rng(0).normal(size=(12, 12))
    pairs = np.where(np.arange(12)[:, None] // 3 == np.arange(12) // 3, 0.0, pairs + pairs.T)
    program = Program.build(InteractionMatrix(space, pairs, "pairs", "none", 0.0, 1), [limit])
    assert solvers.solve(program).minimised == pytest.approx(solvers.solve(program, "exhaustive").minimised, rel=3e-6)


def test_a_node_limit_is_deterministic_and_keeps_the_incumbent() -> None:
    program = program_of("lowrank", 5.0, network="resnet50")
    first, second = (solvers.solve(program, node_limit=60, time_limit=None) for _ in range(2))
    assert first.status is Status.LIMIT
    assert first.nodes <= 62
    assert first.gap > 0
    assert first.bound < first.minimised
    assert (first.assignment, first.bound, first.nodes) == (second.assignment, second.bound, second.nodes)
    assert "limit" in first.advice


def test_a_time_limit_keeps_the_incumbent() -> None:
    solution = solvers.solve(program_of("lowrank", 5.0, network="resnet50"), time_limit=0.3)
    assert solution.status is Status.LIMIT
    assert solution.seconds < 20
    assert np.isfinite(solution.objective)


@pytest.mark.system
def test_a_gap_limit_stops_early() -> None:
    program = program_of("lowrank", 4.0, network="resnet50")
    early, tight = solvers.solve(program, gap_limit=0.5), solvers.solve(program)
    assert early.nodes < tight.nodes
    assert early.gap <= 0.5
    assert early.bound <= tight.minimised * (1 + 1e-9)


def test_starts_are_used_and_repaired() -> None:
    program = program_of("medium")
    best = solvers.solve(program)
    assert solvers.solve(program, starts=[best.assignment]).minimised <= best.minimised
    assert solvers.solve(program, starts=[program.space.widest]).minimised == pytest.approx(best.minimised, rel=3e-6)


def test_prepared_solvers_agree_with_fresh_ones() -> None:
    program = program_of("medium", 5.0)
    solve = solvers.prepare(program)
    for average in (2.5, 3.5, 6.0):
        bounded = program.with_bounds({"average_bits": average * program.space.num_weights})
        assert solve(bounded).minimised == pytest.approx(solvers.solve(bounded).minimised, rel=3e-6)
    other = program_of("strong", 3.0)
    assert solve(other).minimised == pytest.approx(solvers.solve(other).minimised, rel=3e-6)


def test_no_budget_gives_the_widest_bits() -> None:
    space = SearchSpace.uniform([Layer(f"layer{i}", (10,), "linear") for i in range(3)], (2, 8))
    honest = np.diag([1.0, 0.1] * 3)
    solution = solvers.solve(Program.build(InteractionMatrix(space, honest, "honest", "none", 0.0, 1)))
    assert solution.better_than_widest is None
    noisy = honest.copy()
    noisy[1, 3] = noisy[3, 1] = 2.0
    limited = [constraints.constraint("average_bits", space, 2.0)]  # the check looks past the budget
    solution = solvers.solve(Program.build(InteractionMatrix(space, noisy, "noisy", "none", 0.0, 1), limited))
    assert solution.better_than_widest is not None
    assert sorted(solution.better_than_widest.bits[:2]) == [2, 8]


def test_a_broken_plugin_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    program = random_case(7).program() if random_case(7).least() else program_of()
    expected = solvers.solve(program, "exhaustive") if program.num_groups < 8 else solvers.solve(program)

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a broken plugin")

    monkeypatch.setattr(scip.ScipTree, "split", broken)
    monkeypatch.setattr(scip.ScipTree, "rounded", broken)
    solution = solvers.solve(program)
    assert solution.status is Status.OPTIMAL
    assert solution.minimised == pytest.approx(expected.minimised, rel=3e-6)
    assert "ZeroDivisionError: a broken plugin" in solution.advice


def test_a_wrong_convex_form_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the convex form against the program can fail."""
    program = program_of("medium")

    def wrong(self: Forms) -> _convexify.Form:
        right = _convexify.nearest(program, self.source)
        return _convexify.Form(right.constant + 1.0, right.linear, right.hessian, right.free)

    monkeypatch.setattr(Forms, "nearest", property(wrong))
    assert solvers.solve(program).status is Status.DOUBTFUL


def test_what_is_refused() -> None:
    program = program_of()
    with pytest.raises(ConfigurationError, match="unknown solver 'gurobi'; expected one of exhaustive, greedy, scip"):
        solvers.solve(program, "gurobi")
    with pytest.raises(SolverError, match="assignments"):
        solvers.solve(program, "exhaustive")
    values = program.matrix.values.copy()
    values[4, 7] = values[7, 4] = np.nan
    with pytest.raises(MeasurementError, match="layer1 at 4 bits, layer2 at 4 bits"):
        InteractionMatrix(program.space, values, "nan", "none", 0.0, 1)


def test_importing_the_solvers_does_not_import_scip() -> None:
    imports = "import sys, clado.choosing.solvers, clado.choosing.pareto"
    script = f"{imports}; print(sorted({{'pyscipopt', 'torch', 'scipy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


INTERRUPTED = """
import os, signal
from tests.choosing.test_solvers import program_of
from clado.choosing import solvers
from clado.choosing.solvers import scip
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
visit = scip.ScipTree.visit
def interrupted_visit(tree):
    if tree.calls == 20:
        os.kill(os.getpid(), signal.SIGINT)
    return visit(tree)
scip.ScipTree.visit = interrupted_visit
program = program_of("lowrank", 5.0, network="resnet152")
solution = solvers.solve(program, time_limit=60)
print(solution.status, program.constraints[0].holds(program.space, solution.assignment), solution.gap > 0, solution.seconds < 50)
"""


def test_ctrl_c_returns_the_incumbent() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split()[-4:] == ["interrupted", "True", "True", "True"], done.stdout + done.stderr


def test_solving_in_a_thread() -> None:
    """Dask and Prefect call from threads, where Python allows no signal handlers."""
    handler = signal.getsignal(signal.SIGINT)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(solvers.solve(program_of())))
    thread.start()
    thread.join()
    assert answers[0].status is Status.OPTIMAL
    assert signal.getsignal(signal.SIGINT) is handler
