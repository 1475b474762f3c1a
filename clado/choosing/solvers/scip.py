"""SCIP through PySCIPOpt: the solver that proves. The only module that imports pyscipopt.

SCIP keeps the tree, the bounds and the proof; its linear relaxation is replaced, because for this dense program it is weak and
slow (a quadratic epigraph leaves gaps of 100 % where this takes a second). The recipe, all of it from plugins:

1. a start (`_start`), by descent;
2. convex forms (`_convexify`, `_forms`) of the function, equal to it at 0/1 points: tight ones and curved ones race for a few
   hundred nodes, and the one with the highest bound goes on;
3. a relaxator that bounds each node by the convex program (`_bound`), rules out choices by reduced cost, and rounds now and
   then;
4. branching that splits one group's ordered bit-widths into {narrow} | {wide};
5. a constraint handler that checks t ≥ f(x) on whole points with the program's own function.

A program without interactions is an integer linear program, which SCIP's defaults solve. Should a plugin fail, the factored
form (y = Lᵀx, t ≥ Σ y²) of the same convex function takes over.
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

from clado.choosing.program import Choices, Program, Status
from clado.choosing.solvers import TOLERANCE, Outcome, Solver, Task
from clado.choosing.solvers._bound import Bound, Mask, NodeBound
from clado.choosing.solvers._convexify import Form
from clado.choosing.solvers._forms import Forms
from clado.choosing.solvers._start import Descent, start
from clado.interaction.matrix import Array

OBJECTIVE = 100.0  # SCIP's absolute tolerances are made for numbers of this size
HEAT_NODES, SEMIFINAL_NODES = 300, 2000
ROUNDED_CALLS = 512


def search(program: Program, task: Task) -> Outcome:
    """Solves to proven optimality (relative tolerance 1e-6) unless a limit or Ctrl-C ends it before."""
    with _one_thread():
        first = None
        try:
            first = start(program, task.starts, task.deadline)
            if program.is_linear:
                return _linear(program, task, first)
            return _race(program, task, _forms(program, task), first)
        except KeyboardInterrupt:
            return Outcome(Status.INTERRUPTED, first, -np.inf)


def _race(program: Program, task: Task, forms: Forms, first: Choices | None) -> Outcome:
    """Gives each cheap convex form a few nodes and the one with the highest bound some more; if that does not settle it, the
    costly forms as well; then all that is left to the best. Whatever finishes first wins.
    """
    forms.deadline = task.deadline
    best, bound, nodes = first, -np.inf, 0
    scores: list[tuple[float, Form]] = []

    def run(form: Form, limit: int | None) -> tuple[Outcome, bool]:
        nonlocal best, bound, nodes
        left = limit if task.node_limit is None else min(limit or task.node_limit, max(1, task.node_limit - nodes))
        outcome = _searched(program, form, replace(task, node_limit=left), best)
        if limit == HEAT_NODES:  # only bounds from equally many nodes compare
            scores.append((outcome.bound, form))
        best, bound, nodes = outcome.choices, max(bound, outcome.bound), nodes + outcome.nodes
        ended = (
            outcome.status is not Status.LIMIT
            or not task.seconds_left
            or (task.node_limit is not None and nodes >= task.node_limit)
        )
        return replace(outcome, bound=bound, nodes=nodes), ended or _gap(program, best, bound) <= task.gap_limit

    def highest() -> Form:
        return max(scores, key=lambda score: score[0])[1]

    heats: list[tuple[Callable[[], Form], int | None]] = [
        (lambda: forms.nearest, HEAT_NODES),
        (lambda: forms.half_quick, HEAT_NODES),
        (lambda: forms.quick, HEAT_NODES),
        (highest, SEMIFINAL_NODES),
        (lambda: forms.half_long, HEAT_NODES),
        (lambda: forms.long, HEAT_NODES),
        (highest, None),
    ]
    outcome = Outcome(Status.LIMIT, best, bound)
    try:
        for form, limit in heats:
            outcome, ended = run(form(), limit)
            if ended:
                break
    except KeyboardInterrupt:
        return Outcome(Status.INTERRUPTED, best, bound, nodes)
    return outcome


def _searched(program: Program, form: Form, task: Task, first: Choices | None) -> Outcome:
    """One tree, or the factored form should a plugin fail."""
    tree = Tree(program, form, first)
    try:
        return tree.search(task)
    except PluginError as error:
        outcome = _factored(program, form, task, tree.best)
        return replace(outcome, message=f"Solved without plugins, after: {error}. {outcome.message}".strip())


def _gap(program: Program, choices: Choices | None, bound: float) -> float:
    """Relative gap, as `Solution.gap`."""
    if choices is None:
        return np.inf
    value = program.minimised(choices)
    return (value - bound) / max(abs(value), float(np.finfo(float).tiny))


class PluginError(Exception):
    """A callback raised inside SCIP."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps BLAS to one thread, where threadpoolctl can: the matrices are small, and sums stay the same whatever the machine."""
    try:
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
    except ImportError:
        yield
        return
    with threadpool_limits(limits=1, user_api="blas"):
        yield


def _forms(program: Program, task: Task) -> Forms:
    """The convex forms to bound with: shared among programs that differ in their bounds."""
    if task.shared is None:
        return Forms(program)
    kept = task.shared.kept.get("forms")
    if not isinstance(kept, Forms):
        kept = task.shared.kept["forms"] = Forms(task.shared.program)
    return kept


class Tree:
    """What the plugins of one search share. `best` and `value` are the incumbent, recomputed and checked by the program
    itself.
    """

    def __init__(self, program: Program, form: Form, first: Choices | None) -> None:
        self.program = program
        self.bounds = NodeBound(program, form)
        self.descent = Descent(program)
        self.best: Choices | None = None
        self.value = np.inf
        self.smallest = TOLERANCE * 1e-6 * self.descent.scale  # what counts as zero
        self.calls = 0
        self.error: BaseException | None = None
        self.warm: dict[int, tuple[bytes, Mask, list[int]]] = {}
        self.node: tuple[Mask, Bound] | None = None
        self.model = Model()
        self.variables: list[Any] = []
        self.t: Any = None
        self.unit = 1.0
        if first is not None:
            self.offer(first)

    @property
    def cutoff(self) -> float:
        """Nodes with a bound at or above this hold nothing better, within the tolerance."""
        return self.value - self.margin if self.best is not None else np.inf

    @property
    def margin(self) -> float:
        """The tolerance in the objective's own unit."""
        return max(TOLERANCE * abs(self.value), self.smallest)

    def offer(self, choices: Choices) -> bool:
        """Takes choices as the incumbent when they are feasible and better."""
        value = self.program.minimised(choices)
        if value >= self.value or not self.program.is_feasible(choices):
            return False
        self.best, self.value = choices.copy(), value
        return True

    def search(self, task: Task) -> Outcome:
        """Runs SCIP and reads the outcome; raises PluginError when a callback failed."""
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
        _limit(model, task)
        if self.best is not None:
            self._add(self.best, self.value)
        _optimize(model)
        if self.error is not None:
            if isinstance(self.error, KeyboardInterrupt):
                return Outcome(Status.INTERRUPTED, self.best, self._bound(), model.getNTotalNodes())
            raise PluginError(f"{type(self.error).__name__}: {self.error}") from self.error
        ended = model.getStatus()
        nodes = int(model.getNTotalNodes())
        if ended in ("optimal", "infeasible", "inforunbd"):
            if self.best is None:
                return Outcome(Status.INFEASIBLE, None, np.inf, nodes)
            if self._disagrees():
                return Outcome(Status.DOUBTFUL, self.best, self.value - self.margin, nodes)
            return Outcome(Status.OPTIMAL, self.best, self.value - self.margin, nodes)
        status = Status.INTERRUPTED if ended == "userinterrupt" else Status.LIMIT
        if ended in ("unknown", "unbounded"):
            raise PluginError(f"SCIP ended with {ended}")
        return Outcome(status, self.best, self._bound(), nodes, f"SCIP stopped at its {ended}." if status is Status.LIMIT else "")

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
        """The lowest bound of the open nodes, in the objective's unit."""
        bound = self.model.getDualbound()
        return min(bound / self.unit if abs(bound) < self.model.infinity() else -np.inf if bound < 0 else np.inf, self.cutoff)

    def _add(self, choices: Choices, value: float) -> None:
        """Gives SCIP a solution. A refusal does no harm: cutting off looks at `value`, not at SCIP's."""
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
        """One node: its bound, what it rules out, and what it finds."""
        model, program = self.model, self.program
        node: Any = model.getCurrentNode()
        allowed = np.array([v.getUbLocal() for v in self.variables]) > 0.5
        if not np.logical_or.reduceat(allowed, program.starts[:-1]).all():
            return {"result": SCIP_RESULT.CUTOFF}
        if allowed.sum() == program.num_groups:
            return self._leaf(allowed)
        support, active = self._warm_start(node.getParent(), len(allowed))
        bound = self.bounds.solve(allowed, support, active, self.cutoff)
        self.calls += 1
        if self.calls <= ROUNDED_CALLS and self.calls & (self.calls - 1) == 0:
            self._round(bound)
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

    def _warm_start(self, parent: Any, count: int) -> tuple[Mask | None, Mask | None]:
        """Where the parent's bound ended; forgotten once both children have asked."""
        if parent is None or parent.getNumber() not in self.warm:
            return None, None
        packed, active, children = self.warm[parent.getNumber()]
        children[0] -= 1
        if not children[0]:
            del self.warm[parent.getNumber()]
        return np.unpackbits(np.frombuffer(packed, np.uint8), count=count).astype(bool), active

    def _leaf(self, allowed: Mask) -> dict[str, Any]:
        choices = np.flatnonzero(allowed)
        if self.offer(choices):
            self._add(choices, self.value)
        return {"result": SCIP_RESULT.CUTOFF}

    def _round(self, bound: Bound) -> None:
        """The largest share of each group, repaired and improved."""
        order = np.lexsort((-bound.x, self.program.owner))
        improved = self.descent.improved(order[self.program.starts[:-1]])
        if improved is not None and self.offer(improved):
            self._add(improved, self.value)

    def split(self) -> tuple[list[int], list[int]]:
        """Narrow and wide choices of the group whose split bends the function most: the score is L (1 − L) uᵀ H u, with L the
        share of the narrow ones and u the move from the centre of one side to that of the other.
        """
        assert self.node is not None  # SCIP branches only after the relaxator ran
        allowed, bound = self.node
        best: tuple[float, list[int], int] | None = None
        starts, h = self.program.starts, self.bounds.h
        for group in np.flatnonzero(np.add.reduceat(allowed.astype(np.intp), starts[:-1]) > 1):
            choices = starts[group] + np.flatnonzero(allowed[starts[group] : starts[group + 1]])
            x = np.maximum(bound.x[choices], 0.0)
            below = np.cumsum(x)[:-1]
            for cut, share in enumerate(below, start=1):
                score = 0.0
                if 1e-9 < share < x.sum() - 1e-9:
                    u = np.concatenate([x[:cut] / share, -x[cut:] / x[cut:].sum()])
                    score = float(share * (1 - share) * (u @ h[np.ix_(choices, choices)] @ u)) + 1e-12 * share * (1 - share)
                if best is None or score > best[0]:
                    best = (score, choices.tolist(), cut)
        assert best is not None  # a node with one choice per group is cut off before branching
        _, listed, cut = best
        return listed[:cut], listed[cut:]


class NodeRelaxation(Relax):
    """Hands a node to the tree; an exception ends the search instead of vanishing inside SCIP."""

    def __init__(self, tree: Tree) -> None:
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

    def __init__(self, tree: Tree) -> None:
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
            for kept, dropped in ((narrow, wide), (wide, narrow)):
                child = model.createChild(float(x[kept].sum()), estimate)
                for k in dropped:
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

    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    def conscheck(
        self, constraints: Any, solution: Any, checkintegrality: bool, checklprows: bool, printreason: bool, completely: bool
    ) -> dict[str, Any]:
        """Whether a proposed solution is one."""
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
        """Nodes are settled by the relaxator; whatever else SCIP proposes has t too low."""
        return {"result": SCIP_RESULT.INFEASIBLE}

    def consenfops(self, constraints: Any, nusefulconss: int, solinfeasible: bool, objinfeasible: bool) -> dict[str, Any]:
        """As for LP solutions."""
        return {"result": SCIP_RESULT.INFEASIBLE}

    def conslock(self, constraint: Any, locktype: Any, nlockspos: int, nlocksneg: int) -> None:
        """Every variable may be stopped from moving either way."""
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
    """The same knapsack counted from each group's least cost and without a common divisor, so that SCIP's relative tolerance is
    below one unit; what is left of the tolerance is caught by checking answers exactly.
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
    """Runs SCIP; its own Ctrl-C handling can only be had in the main thread."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        model.setParam("misc/catchctrlc", False)
    model.optimize()


def _plain(
    program: Program,
    task: Task,
    first: Choices | None,
    unit: float,
    constant: float,
    build: Callable[[Model, list[Any]], None],
) -> Outcome:
    """Solves a program whose function SCIP knows: `build` adds it, as (function − constant) · unit.

    The answer is checked exactly: a point that breaks a constraint within SCIP's tolerance is ruled out, and the program solved
    again.
    """
    ruled_out: list[Choices] = []
    while True:
        model = Model()
        model.hideOutput()
        x = _choices(model, program)
        for choices in ruled_out:
            model.addCons(quicksum(x[k] for k in choices) <= program.num_groups - 1)
        build(model, x)
        model.setParam("numerics/feastol", 1e-9)
        _limit(model, task)
        _optimize(model)
        ended, nodes = model.getStatus(), int(model.getNTotalNodes())
        best = first
        if model.getNSols():
            found = np.array([k for k in range(program.num_choices) if model.getVal(x[k]) > 0.5], dtype=np.intp)
            if not program.is_feasible(found):
                ruled_out.append(found)
                continue
            if best is None or program.minimised(found) < program.minimised(best):
                best = found
        if ended == "infeasible" and best is None:
            return Outcome(Status.INFEASIBLE, None, np.inf, nodes)
        if ended == "infeasible":  # every other point is ruled out
            return Outcome(Status.DOUBTFUL, best, -np.inf, nodes, "SCIP calls the program infeasible; the start is feasible.")
        dual = model.getDualbound()
        bound = dual / unit + constant if abs(dual) < model.infinity() else -np.inf
        if ended != "optimal":
            return Outcome(Status.INTERRUPTED if ended == "userinterrupt" else Status.LIMIT, best, bound, nodes)
        if best is None:
            return Outcome(Status.DOUBTFUL, None, -np.inf, nodes, "SCIP calls the program solved but has no solution.")
        value = program.minimised(best)
        slack = 10 * TOLERANCE * abs(value) + 1e-8 * OBJECTIVE / unit
        return Outcome(Status.DOUBTFUL if abs(value - bound) > slack else Status.OPTIMAL, best, bound, nodes)


def _linear(program: Program, task: Task, first: Choices | None) -> Outcome:
    """Without interactions: the diagonal is a linear objective.

    Counted from each group's least, and on the scale of the best answer so far, beyond which a choice is as bad as any: widths
    differ by many orders of magnitude, of which SCIP's absolute tolerances see a few.
    """
    worth = 0.5 * np.diag(program.quadratic)
    least = np.minimum.reduceat(worth, program.starts[:-1])
    worth = worth - least[program.owner]
    while True:
        scale = max(float((worth if first is None else worth[first]).sum()), 1e-300)
        unit = OBJECTIVE / scale

        def build(model: Model, x: list[Any], unit: float = unit, most: float = 2 * scale) -> None:
            model.setObjective(quicksum(float(min(w, most) * unit) * v for w, v in zip(worth, x, strict=True)))

        outcome = _plain(program, task, first, unit, float(least.sum()), build)
        if outcome.choices is None or outcome.status != Status.OPTIMAL or float(worth[outcome.choices].sum()) >= 1e-3 * scale:
            return outcome
        if first is not None and np.array_equal(outcome.choices, first):
            return outcome
        first = outcome.choices


def _factored(program: Program, form: Form, task: Task, first: Choices | None) -> Outcome:
    """The convex function as t ≥ Σ y², y = Lᵀx, with SCIP's fast settings: no plugins, slower."""
    eigenvalues, vectors = np.linalg.eigh(form.hessian)
    kept = eigenvalues > 1e-12 * max(float(eigenvalues[-1]), 1e-300)
    factor = vectors[:, kept] * np.sqrt(eigenvalues[kept] / 2)
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

    return _plain(program, task, first, unit, form.constant, build)


solver = Solver(search)
