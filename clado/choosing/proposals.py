"""Proposals: every matrix's answer to every budget, within the standing limits.

A proposal is not measured yet. `choice.py` decides among proposals after they are measured. NumPy only.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

import numpy as np

from clado.bits import FLOAT_BITS
from clado.choosing import constraints, solvers
from clado.choosing.constraints import Constraint
from clado.choosing.program import Program
from clado.choosing.solution import Solution
from clado.choosing.solvers import Solve
from clado.errors import InfeasibleError
from clado.interaction import estimators
from clado.interaction.estimators import Measured, unreported_estimators
from clado.interaction.matrix import Convexity, InteractionMatrix
from clado.records.results import UNIFORM
from clado.space import Assignment, SearchSpace

LAYERWISE_PLAIN = "layerwise_plain"  # `layerwise` of layers without corrections, deployed without them


@dataclass(frozen=True)
class Budget:
    """One limit on the answer of a row of the table."""

    constraint: str
    """Name of a constraint (`clado.choosing.constraints`)."""
    bound: float
    """The most that an answer may cost, in the constraint's unit."""
    path: str | None = None
    """Table of costs, where the constraint reads one."""

    @property
    def name(self) -> str:
        """Its name in tables and files. Two budgets of a run never have the same name."""
        text = constraints.kind_of(self.constraint).text
        return text(self.bound) if text else f"{self.constraint} {self.bound:g}"

    def limit(self, space: SearchSpace) -> Constraint:
        """The budget as a constraint on a space."""
        settings = {} if self.path is None else {"path": self.path}
        return constraints.constraint(self.constraint, space, self.bound, **settings)


@dataclass(frozen=True)
class Proposal:
    """One method's answer to one budget, not yet measured."""

    budget: Budget
    """The budget that it fits."""
    method: str
    """The name of the method."""
    assignment: Assignment
    """The bits of each layer."""
    loss_predicted: float | None = None
    """The predicted loss, if the method predicts one."""
    solution: Solution | None = None
    """The solver's answer. None for the uniform assignment."""
    reported: bool = True
    """Whether the method has a row in tables. Variants and assignments of local searches compete, but have no row."""


def budgets_of(
    average_bits: Iterable[float] = (),
    size_bytes: Iterable[float] = (),
    percent_of_8_bit: Iterable[float] = (),
    bops: Iterable[float] = (),
    latency: Iterable[float] = (),
    latency_table: Path | None = None,
) -> tuple[Budget, ...]:
    """Budgets in the given order, without duplicates. Budgets of latency read `latency_table`."""
    by_keyword = (("average_bits", average_bits), ("size", size_bytes), ("relative_size", percent_of_8_bit), ("bops", bops))
    budgets = [Budget(constraint, bound) for constraint, bounds in by_keyword for bound in bounds]
    budgets += [Budget("latency", bound, None if latency_table is None else str(latency_table)) for bound in latency]
    return tuple(dict.fromkeys(budgets))


def check_budgets(space: SearchSpace, budgets: Iterable[Budget], limits: Sequence[Constraint] = ()) -> None:
    """Raises InfeasibleError for a budget that no assignment meets together with `limits`; needs no measurement."""
    order = space.num_options
    nothing = InteractionMatrix(space, np.zeros((order, order)), "none", "none", 0.0, 1)
    least, most = space.narrowest, space.widest
    for budget in budgets:
        try:
            program = Program.build(nothing, merge_limits(budget.limit(space), limits))
            if len(program.limits) > 1:  # each limit can be met alone; only a solver can say whether all can
                solvers.solve(program, "scip", time_limit=10)
        except InfeasibleError as error:
            raise InfeasibleError(
                f"budget {budget.name}: {error}. The space reaches from {space.size_bytes(least):,} to "
                f"{space.size_bytes(most):,} bytes of weights, "
                f"{space.average_bits(least):g} to {space.average_bits(most):g} bits a weight"
            ) from None


def merge_limits(budget: Constraint, limits: Sequence[Constraint]) -> list[Constraint]:
    """The budget, followed by the limits of the run. Of several limits on the same cost, the tightest.

    Different costs with the same name, such as two tables, get a number.
    """
    tightest: dict[str, Constraint] = {}
    for limit in (budget, *limits):
        names = chain([limit.name], (f"{limit.name} {k}" for k in count(2)))
        name = next(name for name in names if name not in tightest or tightest[name].costs == limit.costs)
        tightest[name] = min(tightest.get(name, limit), limit, key=lambda c: c.bound)
    return [replace(limit, name=name) for name, limit in tightest.items()]


def program_of(matrix: InteractionMatrix, limits: Sequence[Constraint], convexity: Convexity | None = None) -> Program:
    """The program of a matrix, without its quarantined options. The default convexity is that of the matrix."""
    convexity = convexity or matrix.convexity
    return Program.build(matrix, limits, convexity=convexity, quarantined=matrix.quarantined, forbidden=matrix.forbidden)


def widest_uniform(space: SearchSpace, limits: Sequence[Constraint]) -> Assignment:
    """The widest uniform assignment that meets every limit. If none does, the narrowest bits everywhere.

    If there are several activation widths, the one whose narrower side (weights or activations) is widest is taken, then the
    one with the widest activations. Activations suffer more from narrow bits than weights do.
    """
    fitting = [
        ((min(b, width), width, b), a)
        for b, a in space.uniform_assignments()
        for width in [next((width for width in a.activation_bits if width is not None), FLOAT_BITS)]
        if all(limit.holds(space, a) for limit in limits)
    ]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else space.narrowest


Optima = Callable[
    [InteractionMatrix, Mapping[Budget, Sequence[Constraint]], Callable[[Program], Solve]],
    Iterable[tuple[Budget, Solution | InfeasibleError]],
]
"""Solves a matrix for budgets with their limits, by a prepared solver: (budget, its optimum, or why there is none). A budget may
be left out."""


def budget_solver(
    matrix: InteractionMatrix, prepare: Callable[[Program], Solve], convexity: Convexity | None = None
) -> Callable[[Budget, Sequence[Constraint]], Solution]:
    """Solves a matrix for one budget and its limits (from `merge_limits`) at a time.

    Work that budgets of one kind share is done once. Raises InfeasibleError if a budget has no answer.
    """
    prepared: dict[str, tuple[Program, Solve]] = {}

    def solved(budget: Budget, limits: Sequence[Constraint]) -> Solution:
        if budget.constraint not in prepared:
            program = program_of(matrix, limits, convexity)
            prepared[budget.constraint] = program, prepare(program)
        program, solve = prepared[budget.constraint]
        return solve(program.with_bounds({limit.name: limit.bound for limit in limits}))

    return solved


def each_budget(
    matrix: InteractionMatrix,
    fit: Mapping[Budget, Sequence[Constraint]],
    prepare: Callable[[Program], Solve],
    convexity: Convexity | None = None,
) -> Iterator[tuple[Budget, Solution | InfeasibleError]]:
    """The optima of a matrix, each solved separately. InfeasibleError if a layer has no candidate left."""
    if matrix.quarantined or matrix.forbidden:
        program_of(matrix, [], "raw")
    solve = budget_solver(matrix, prepare, convexity)
    for budget, limits in fit.items():
        try:
            yield budget, solve(budget, limits)
        except InfeasibleError as error:
            yield budget, error


def propose(
    matrices: Mapping[str, InteractionMatrix],
    budgets: Sequence[Budget],
    prepare: Callable[[Program], Solve],
    limits: Sequence[Constraint] = (),
    solved: Callable[[Budget, str], None] = lambda budget, method: None,
    without_answer: Callable[[Budget, str, InfeasibleError], None] = lambda budget, method, error: None,
    optima: Optima = each_budget,
) -> list[Proposal]:
    """For every budget the widest uniform assignment and each matrix's optimum, which also meet the `limits` of the run.

    Without quarantined options and forbidden pairs, a matrix may have no assignment for a budget. Then `without_answer` is
    called.

    Args:
        matrices: Matrices by method.
        budgets: What to answer.
        prepare: A solver for a program.
        limits: Limits that hold for every budget.
        solved: Called with each budget and method.
        without_answer: Called with each budget for which a method has no answer.
        optima: How a matrix is solved for the budgets.

    Raises:
        InfeasibleError: No matrix has an answer for any budget, or a layer has no candidate left.
    """
    space = next(iter(matrices.values())).space
    fit = {budget: merge_limits(budget.limit(space), limits) for budget in budgets}
    proposals = [Proposal(budget, UNIFORM, widest_uniform(space, fit[budget])) for budget in budgets]
    errors: list[InfeasibleError] = []

    def refused(budget: Budget, method: str, error: InfeasibleError) -> None:
        errors.append(error)
        without_answer(budget, method, error)

    for method, matrix in matrices.items():
        proposals += _proposed(method, matrix, optima(matrix, fit, prepare), solved, refused)
    if errors and len(errors) == len(matrices) * len(budgets):
        raise errors[0]
    return proposals


@dataclass(frozen=True)
class Matrices:
    """The matrices that propose for a run."""

    named: Mapping[str, InteractionMatrix]
    """Matrices of the estimators that the settings name."""
    extra: Mapping[str, InteractionMatrix]
    """Matrices of `unreported_estimators`, which compete too."""
    uncorrected: InteractionMatrix | None
    """`layerwise` of layers without corrections, where there are corrections."""

    @classmethod
    def of(cls, measured: Measured, names: Sequence[str]) -> "Matrices":
        """The matrices of the named estimators, and of those that are tried in addition."""
        named = {name: estimators.estimate(name, measured) for name in names}
        return cls(named, extra_matrices(measured, names), estimators.uncorrected(measured))

    @property
    def every(self) -> dict[str, InteractionMatrix]:
        """All matrices of corrected layers."""
        return {**self.named, **self.extra}


def extra_matrices(measured: Measured, named: Collection[str]) -> dict[str, InteractionMatrix]:
    """The matrices of `unreported_estimators`."""
    return {name: estimators.estimate(name, measured) for name in unreported_estimators(named, measured.sums)}


def propose_variants(
    matrices: Mapping[str, InteractionMatrix],
    budgets: Sequence[Budget],
    prepare: Callable[[Program], Solve],
    limits: Sequence[Constraint] = (),
    extra: Mapping[str, InteractionMatrix] | None = None,
) -> list[Proposal]:
    """Answers that are not reported. They cost solver time only.

    Matrices whose program is clipped are also solved unclipped, and with noisy terms shrunk. `extra` matrices are solved too.
    """
    proposals: list[Proposal] = []

    def add(method: str, matrix: InteractionMatrix, convexity: Convexity | None = None) -> None:
        fit = {budget: merge_limits(budget.limit(matrix.space), limits) for budget in budgets}
        proposals.extend(_proposed(method, matrix, each_budget(matrix, fit, prepare, convexity)))

    for method, matrix in matrices.items():
        if matrix.convexity == "clip_psd":
            add(f"{method}_raw", matrix, "raw")
            if matrix.standard_error is not None:
                add(f"{method}_shrunk", matrix.shrink())
    for method, matrix in (extra or {}).items():
        add(method, matrix)
    return [replace(proposal, reported=False) for proposal in proposals]


def propose_uncorrected(
    matrix: InteractionMatrix | None,
    budgets: Sequence[Budget],
    prepare: Callable[[Program], Solve],
    limits: Sequence[Constraint] = (),
) -> list[Proposal]:
    """Answers without corrections, which are not reported: the widest uniform assignment, and the optimum of the matrix.

    Args:
        matrix: `estimators.uncorrected`, or None if a run has no corrections: then there are no such answers.
        budgets: What to answer.
        prepare: A solver for a program.
        limits: Standing limits.
    """
    if matrix is None:
        return []
    fit = {budget: merge_limits(budget.limit(matrix.space), limits) for budget in budgets}
    proposals = [Proposal(budget, UNIFORM, widest_uniform(matrix.space, fit[budget])) for budget in budgets]
    with suppress(InfeasibleError):  # a layer works at no bit-width without corrections
        proposals += _proposed(LAYERWISE_PLAIN, matrix, each_budget(matrix, fit, prepare))
    return [replace(p, assignment=p.assignment.with_corrections("none"), reported=False) for p in proposals]


def _proposed(
    method: str,
    matrix: InteractionMatrix,
    answers: Iterable[tuple[Budget, Solution | InfeasibleError]],
    solved: Callable[[Budget, str], None] = lambda budget, method: None,
    without_answer: Callable[[Budget, str, InfeasibleError], None] = lambda budget, method, error: None,
) -> list[Proposal]:
    """One proposal for each answer."""
    proposals: list[Proposal] = []
    for budget, answer in answers:
        if isinstance(answer, InfeasibleError):
            without_answer(budget, method, answer)
        else:
            proposals.append(Proposal(budget, method, answer.assignment, matrix.loss_of(answer.objective), answer))
        solved(budget, method)
    return proposals
