"""SCIP through PySCIPOpt: the solver that proves optimality. The only module that imports pyscipopt.

SCIP keeps the tree, the bounds and the proof. Its linear relaxation is replaced, because it is weak and slow for this dense
program. A quadratic epigraph leaves gaps of 100 % on programs that this method solves in a second. The method has five parts:

1. a start (`_start`), by descent;
2. convex forms (`_convexify`, `_forms`) of the function, equal to it at 0/1 points. Tight forms and curved forms race for a few
   hundred nodes (`_race`), and the form with the highest bound goes on;
3. a relaxator that bounds each node by the convex program (`_bound`), excludes choices by reduced cost, and sometimes rounds;
4. branching that splits one group's ordered bit-widths into {narrow} | {wide} (`_tree`);
5. a constraint handler that checks t ≥ f(x) on whole points with the program's own function.

SCIP's defaults solve a program without interactions, which is an integer linear program. If a plugin fails, the factored form
(y = Lᵀx, t ≥ Σ y²) of the same convex function is solved instead.
"""

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from pyscipopt import Branchrule, Conshdlr, Model, quicksum
from pyscipopt.scip import PY_SCIP_PARAMSETTING as SCIP_PARAMSETTING
from pyscipopt.scip import PY_SCIP_RESULT as SCIP_RESULT
from pyscipopt.scip import Relax

from clado.choosing.program import Choices, Program
from clado.choosing.solution import Status
from clado.choosing.solvers import TOLERANCE, Outcome, Solver, Task
from clado.choosing.solvers._bound import Mask
from clado.choosing.solvers._convexify import Form
from clado.choosing.solvers._forms import Forms
from clado.choosing.solvers._race import Race
from clado.choosing.solvers._start import start
from clado.choosing.solvers._tree import Tree
from clado.interaction.matrix import Array

OBJECTIVE = 100.0  # size of the objective that SCIP sees, because its absolute tolerances fit such numbers
ROUNDED_CALLS = 512  # the relaxator rounds its point only in some of its first calls, up to this number


def search(program: Program, task: Task) -> Outcome:
    """Solves to proven optimality (relative tolerance 1e-6), unless a limit or Ctrl-C ends it earlier."""
    with _one_thread():
        initial = None
        try:
            initial = start(program, task.starts, task.deadline)
            if program.is_linear:
                return _linear(program, task, initial)
            return Race(program, task, _search_form, initial).run(_forms(program, task))
        except KeyboardInterrupt:
            return Outcome(Status.INTERRUPTED, initial, -np.inf)


def _search_form(program: Program, form: Form, task: Task, initial: Choices | None) -> Outcome:
    """Solves with one tree. If a plugin fails, solves the factored form."""
    tree = ScipTree(program, form, initial)
    try:
        return tree.search(task)
    except PluginError as error:
        outcome = _factored(program, form, task, tree.best)
        return replace(outcome, message=f"Solved without plugins, after: {error}. {outcome.message}".strip())


class PluginError(Exception):
    """A callback inside SCIP raised an exception."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limits BLAS to one thread if threadpoolctl is installed. Matrices are small, and sums are the same on every machine."""
    try:
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
    except ImportError:
        yield
        return
    with threadpool_limits(limits=1, user_api="blas"):
        yield


def _forms(program: Program, task: Task) -> Forms:
    """The convex forms to bound with. Programs that differ only in their bounds share them."""
    if task.shared is None:
        return Forms(program)
    forms = task.shared.kept.get("forms")
    if not isinstance(forms, Forms):
        forms = task.shared.kept["forms"] = Forms(task.shared.program)
    return forms


class ScipTree(Tree):
    """A tree that SCIP runs, and what its plugins share."""

    def __init__(self, program: Program, form: Form, initial: Choices | None) -> None:
        super().__init__(program, form, initial)
        self.calls = 0  # of the relaxator
        self.error: BaseException | None = None
        self.model = Model()
        self.variables: list[Any] = []
        self.t: Any = None
        self.unit = 1.0

    def search(self, task: Task) -> Outcome:
        """Runs SCIP and reads the outcome. Raises PluginError if a callback has failed."""
        self._set_up()
        _limit(self.model, task)
        if self.best is not None:
            self._add(self.best, self.value)
        _optimize(self.model)
        nodes = int(self.model.getNTotalNodes())
        if isinstance(self.error, KeyboardInterrupt):
            return Outcome(Status.INTERRUPTED, self.best, self._bound(), nodes)
        if self.error is not None:
            raise PluginError(f"{type(self.error).__name__}: {self.error}") from self.error
        return self._outcome(self.model.getStatus(), nodes)

    def _set_up(self) -> None:
        """Gives SCIP the variables, the plugins and the settings."""
        model = self.model
        model.hideOutput()
        reference = self.value if self.best is not None else self.program.minimised(self.program.widest)
        self.unit = OBJECTIVE / max(abs(reference), 1e-3 * self.descent.scale)
        self.variables = _choices(model, self.program)
        self.t = model.addVar(name="t", lb=None)
        model.setObjective(self.t)
        model.includeRelax(
            NodeRelaxation(self), "qp", "convex quadratic program over simplices and knapsacks", priority=1_000_000, freq=1
        )
        model.includeBranchrule(
            OrderedSplit(self), "ordered", "narrow or wide", priority=10_000_000, maxdepth=-1, maxbounddist=1.0
        )
        model.includeConshdlr(
            Epigraph(self),
            "epigraph",
            "t is at least the function",
            enfopriority=-5_000_000,
            chckpriority=-5_000_000,
            needscons=False,
        )
        model.setPresolve(SCIP_PARAMSETTING.OFF)
        model.setHeuristics(SCIP_PARAMSETTING.OFF)
        model.setSeparating(SCIP_PARAMSETTING.OFF)
        for name, setting in {
            "lp/solvefreq": -1,
            "misc/allowstrongdualreds": False,
            "misc/allowweakdualreds": False,
            "misc/usesymmetry": 0,
            "conflict/enable": False,
            "presolving/maxrestarts": 0,
            "nodeselection/bfs/stdpriority": 1_000_000,
        }.items():
            model.setParam(name, setting)

    def _outcome(self, scip_status: str, nodes: int) -> Outcome:
        """The outcome of a search without an error. Raises PluginError for a status that the plugins exclude."""
        if scip_status in ("optimal", "infeasible", "inforunbd"):
            if self.best is None:
                return Outcome(Status.INFEASIBLE, None, np.inf, nodes)
            status = Status.DOUBTFUL if self._disagrees() else Status.OPTIMAL
            return Outcome(status, self.best, self.value - self.margin, nodes)
        if scip_status in ("unknown", "unbounded"):
            raise PluginError(f"SCIP ended with {scip_status}")
        if scip_status == "userinterrupt":
            return Outcome(Status.INTERRUPTED, self.best, self._bound(), nodes)
        return Outcome(Status.LIMIT, self.best, self._bound(), nodes, f"SCIP stopped at its {scip_status}.")

    def _disagrees(self) -> bool:
        """Whether the convex form, or SCIP's own solution, contradicts the incumbent's recomputed value."""
        if self.best is None:
            return False
        form = self.bounds.form
        convex = (
            form.constant + float(form.linear[self.best].sum()) + 0.5 * float(form.hessian[np.ix_(self.best, self.best)].sum())
        )
        claimed = self.model.getPrimalbound() / self.unit if self.model.getNSols() else self.value
        slack = 10 * self.margin + 1e-9 * self.descent.scale
        return abs(convex - self.value) > slack or claimed < self.value - slack

    def _bound(self) -> float:
        """The lowest bound of the open nodes, in the unit of the minimised function."""
        bound = self.model.getDualbound()
        return min(bound / self.unit if abs(bound) < self.model.infinity() else -np.inf if bound < 0 else np.inf, self.cutoff)

    def _add(self, choices: Choices, value: float) -> None:
        """Gives SCIP a solution. SCIP may refuse it, because nodes are cut off by `value`."""
        model = self.model
        solution = model.createSol()
        for k in choices:
            model.setSolVal(solution, self.variables[k], 1.0)
        model.setSolVal(solution, self.t, self.unit * value + 1e-9 * OBJECTIVE)
        if model.getStageName() == "PROBLEM":
            model.addSol(solution)
        else:
            model.trySol(solution, printreason=False)

    def visit(self) -> dict[str, Any]:
        """One node: its bound, the choices that it excludes, and a rounded point."""
        model, program = self.model, self.program
        node: Any = model.getCurrentNode()
        parent = node.getParent()
        allowed = np.array([v.getUbLocal() for v in self.variables]) > 0.5
        if not np.logical_or.reduceat(allowed, program.starts[:-1]).all():
            return {"result": SCIP_RESULT.CUTOFF}
        if allowed.sum() == program.num_groups:
            return self._leaf(allowed)
        support, active = self.warm_start(None if parent is None else parent.getNumber(), len(allowed))
        bound = self.bounds.solve(allowed, support, active, self.cutoff)
        self.calls += 1
        if self.calls <= ROUNDED_CALLS and self.calls & (self.calls - 1) == 0:
            rounded = self.rounded(bound)
            if rounded is not None and self.offer(rounded):
                self._add(rounded, self.value)
        if bound.value >= self.cutoff:
            return {"result": SCIP_RESULT.CUTOFF}
        hopeless = allowed & (bound.value + bound.reduced_cost >= self.cutoff)
        allowed = allowed & ~hopeless
        if allowed.sum() == program.num_groups:
            return self._leaf(allowed)
        for k in np.flatnonzero(hopeless):
            model.tightenVarUb(self.variables[k], 0.0)
        self.warm[node.getNumber()] = (np.packbits(bound.support).tobytes(), bound.active, [2])
        self.node = (allowed, bound)
        return {"result": SCIP_RESULT.SUCCESS, "lowerbound": max(self.unit * bound.value, -model.infinity())}

    def _leaf(self, allowed: Mask) -> dict[str, Any]:
        """A node with one choice per group."""
        choices = np.flatnonzero(allowed)
        if self.offer(choices):
            self._add(choices, self.value)
        return {"result": SCIP_RESULT.CUTOFF}


class NodeRelaxation(Relax):
    """Gives a node to the tree. An exception ends the search and is kept."""

    def __init__(self, tree: ScipTree) -> None:
        self.tree = tree

    def relaxexec(self) -> dict[str, Any]:
        """SCIP's callback."""
        try:
            return self.tree.visit()
        except BaseException as error:  # kept, and raised after SCIP has returned
            self.tree.error = error
            self.model.interruptSolve()
            return {"result": SCIP_RESULT.DIDNOTRUN}


class OrderedSplit(Branchrule):
    """Two children: the narrow bit-widths of one group, or the wide ones."""

    def __init__(self, tree: ScipTree) -> None:
        self.tree = tree

    def _branch(self) -> dict[str, Any]:
        tree, model = self.tree, self.model
        try:
            if tree.error is not None:
                return {"result": SCIP_RESULT.DIDNOTRUN}
            narrow, wide = tree.split()
            assert tree.node is not None
            x = tree.node[1].x
            estimate = model.getLocalEstimate()
            for choices, excluded in ((narrow, wide), (wide, narrow)):
                child = model.createChild(float(x[choices].sum()), estimate)
                for k in excluded:
                    model.chgVarUbNode(child, tree.variables[k], 0.0)
            return {"result": SCIP_RESULT.BRANCHED}
        except BaseException as error:  # kept, and raised after SCIP has returned
            tree.error = error
            model.interruptSolve()
            return {"result": SCIP_RESULT.DIDNOTRUN}

    def branchexeclp(self, allowaddcons: bool) -> dict[str, Any]:
        """SCIP's callback for LP solutions."""
        return self._branch()

    def branchexecext(self, allowaddcons: bool) -> dict[str, Any]:
        """SCIP's callback for external candidates."""
        return self._branch()

    def branchexecps(self, allowaddcons: bool) -> dict[str, Any]:
        """SCIP's callback for pseudo solutions."""
        return self._branch()


class Epigraph(Conshdlr):
    """t ≥ f(x) on whole points, with the program's own function and its exact check of the constraints."""

    def __init__(self, tree: ScipTree) -> None:
        self.tree = tree

    def conscheck(
        self, constraints: Any, solution: Any, checkintegrality: bool, checklprows: bool, printreason: bool, completely: bool
    ) -> dict[str, Any]:
        """Whether a proposed solution holds."""
        tree = self.tree
        values = np.array([self.model.getSolVal(solution, v) for v in tree.variables])
        choices = np.flatnonzero(values > 0.5)
        holds = (
            len(choices) == tree.program.num_groups
            and tree.program.is_feasible(choices)
            and self.model.getSolVal(solution, tree.t) >= tree.unit * tree.program.minimised(choices) - 1e-9 * OBJECTIVE
        )
        return {"result": SCIP_RESULT.FEASIBLE if holds else SCIP_RESULT.INFEASIBLE}

    def consenfolp(self, constraints: Any, nusefulconss: int, solinfeasible: bool) -> dict[str, Any]:
        """The relaxator settles nodes. In every other point that SCIP proposes, t is too low."""
        return {"result": SCIP_RESULT.INFEASIBLE}

    def consenfops(self, constraints: Any, nusefulconss: int, solinfeasible: bool, objinfeasible: bool) -> dict[str, Any]:
        """As for LP solutions."""
        return {"result": SCIP_RESULT.INFEASIBLE}

    def conslock(self, constraint: Any, locktype: Any, nlockspos: int, nlocksneg: int) -> None:
        """The constraint may block every variable in both directions."""
        for variable in [*self.tree.variables, self.tree.t]:
            self.model.addVarLocksType(variable, locktype, nlockspos + nlocksneg, nlockspos + nlocksneg)


def _choices(model: Model, program: Program) -> list[Any]:
    """Binaries with one choice per group, the constraints and the forbidden pairs."""
    x = [model.addVar(vtype="B", name=f"x{k}") for k in range(program.num_choices)]
    for first, last in zip(program.starts[:-1], program.starts[1:], strict=True):
        model.addCons(quicksum(x[first:last]) == 1)
    for costs, limit in zip(program.costs, program.limits, strict=True):
        if np.isfinite(limit):
            costs, limit = _lowered(program, costs, float(limit))
            model.addCons(quicksum(float(c) * v for c, v in zip(costs, x, strict=True) if c) <= limit)
    for a, b in program.forbidden:
        model.addCons(x[a] + x[b] <= 1)
    return x


def _lowered(program: Program, costs: Array, limit: float) -> tuple[Array, float]:
    """The same knapsack, counted from each group's least cost and without a common divisor.

    SCIP's relative tolerance is then below one unit. Answers are also checked exactly.
    """
    least = np.minimum.reduceat(costs, program.starts[:-1])
    costs, limit = costs - least[program.owner], limit - float(least.sum())
    if np.all(costs == np.round(costs)) and costs.any() and costs.max() < 2**53:
        divisor = math.gcd(*(int(c) for c in costs))
        return costs / divisor, float(math.floor(limit / divisor))
    scale = float(costs.max(initial=0.0)) or 1.0
    return costs / scale, limit / scale


def _limit(model: Model, task: Task) -> None:
    """Time, nodes and gap."""
    model.setParam("limits/time", min(task.seconds_left, 1e20))
    model.setParam("limits/gap", task.gap_limit)
    model.setParam("randomization/randomseedshift", 0)
    if task.node_limit is not None:
        model.setParam("limits/totalnodes", task.node_limit)


def _optimize(model: Model) -> None:
    """Runs SCIP. Its own handling of Ctrl-C works in the main thread only."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        model.setParam("misc/catchctrlc", False)
    model.optimize()


def _plain(
    program: Program,
    task: Task,
    initial: Choices | None,
    unit: float,
    constant: float,
    build: Callable[[Model, list[Any]], None],
) -> Outcome:
    """Solves a program whose function SCIP knows: `build` adds it, as (function − constant) · unit.

    The answer is checked exactly. A point that breaks a constraint within SCIP's tolerance is excluded, and the program is solved
    again.
    """
    excluded: list[Choices] = []
    while True:
        model = Model()
        model.hideOutput()
        x = _choices(model, program)
        for choices in excluded:
            model.addCons(quicksum(x[k] for k in choices) <= program.num_groups - 1)
        build(model, x)
        model.setParam("numerics/feastol", 1e-9)
        _limit(model, task)
        _optimize(model)
        best = initial
        if model.getNSols():
            choices = np.array([k for k in range(program.num_choices) if model.getVal(x[k]) > 0.5], dtype=np.intp)
            if not program.is_feasible(choices):
                excluded.append(choices)
                continue
            if best is None or program.minimised(choices) < program.minimised(best):
                best = choices
        return _plain_outcome(program, model, best, unit, constant)


def _plain_outcome(program: Program, model: Model, best: Choices | None, unit: float, constant: float) -> Outcome:
    """The outcome of a model without plugins. `best` is SCIP's answer or the initial choices, whichever is better."""
    scip_status, nodes = model.getStatus(), int(model.getNTotalNodes())
    if scip_status == "infeasible" and best is None:
        return Outcome(Status.INFEASIBLE, None, np.inf, nodes)
    if scip_status == "infeasible":  # every other point is excluded
        return Outcome(Status.DOUBTFUL, best, -np.inf, nodes, "SCIP calls the program infeasible; the start is feasible.")
    dual = model.getDualbound()
    bound = dual / unit + constant if abs(dual) < model.infinity() else -np.inf
    if scip_status != "optimal":
        return Outcome(Status.INTERRUPTED if scip_status == "userinterrupt" else Status.LIMIT, best, bound, nodes)
    if best is None:
        return Outcome(Status.DOUBTFUL, None, -np.inf, nodes, "SCIP calls the program solved but has no solution.")
    value = program.minimised(best)
    slack = 10 * TOLERANCE * abs(value) + 1e-8 * OBJECTIVE / unit
    return Outcome(Status.DOUBTFUL if abs(value - bound) > slack else Status.OPTIMAL, best, bound, nodes)


def _linear(program: Program, task: Task, initial: Choices | None) -> Outcome:
    """Without interactions the diagonal is a linear objective.

    It is counted from each group's least value. Its scale is the best answer so far, and values far above are cut: bit-widths
    differ by many orders of magnitude, and SCIP's absolute tolerances cover only a few.
    """
    worth = 0.5 * np.diag(program.quadratic)
    least = np.minimum.reduceat(worth, program.starts[:-1])
    worth = worth - least[program.owner]
    while True:
        scale = max(float((worth if initial is None else worth[initial]).sum()), 1e-300)
        unit = OBJECTIVE / scale

        def build(model: Model, x: list[Any], unit: float = unit, most: float = 2 * scale) -> None:
            model.setObjective(quicksum(float(min(w, most) * unit) * v for w, v in zip(worth, x, strict=True)))

        outcome = _plain(program, task, initial, unit, float(least.sum()), build)
        if outcome.choices is None or outcome.status != Status.OPTIMAL or float(worth[outcome.choices].sum()) >= 1e-3 * scale:
            return outcome
        if initial is not None and np.array_equal(outcome.choices, initial):
            return outcome
        initial = outcome.choices


def _factored(program: Program, form: Form, task: Task, initial: Choices | None) -> Outcome:
    """The convex function as t ≥ Σ y², y = Lᵀx, with SCIP's fast settings: no plugins, slower."""
    eigenvalues, vectors = np.linalg.eigh(form.hessian)
    positive = eigenvalues > 1e-12 * max(float(eigenvalues[-1]), 1e-300)
    factor = vectors[:, positive] * np.sqrt(eigenvalues[positive] / 2)
    unit = OBJECTIVE / max(float(np.abs(program.quadratic).max(initial=0.0)), 1e-300)

    def build(model: Model, x: list[Any]) -> None:
        t = model.addVar(lb=0.0, name="t")
        squares = []
        for column in factor.T * np.sqrt(unit):
            y = model.addVar(lb=None)
            model.addCons(quicksum(float(c) * x[k] for k, c in enumerate(column) if c) == y)
            squares.append(y * y)
        model.addCons(quicksum(squares) <= t)
        model.setObjective(t + quicksum(float(c * unit) * v for c, v in zip(form.linear, x, strict=True)))
        model.setHeuristics(SCIP_PARAMSETTING.OFF)
        model.setSeparating(SCIP_PARAMSETTING.FAST)
        model.setPresolve(SCIP_PARAMSETTING.FAST)
        model.setParam("propagating/obbt/freq", -1)

    return _plain(program, task, initial, unit, form.constant, build)


solver = Solver(search)
