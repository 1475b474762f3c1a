"""From matrices to an answer: propose with several estimators, measure the true loss of every proposal, return the best.

The quadratic model only proposes; what is returned was measured. NumPy only: the solver and the measured losses are given.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from clado import constraints
from clado.constraints import Constraint
from clado.interaction import InteractionMatrix
from clado.program import Convexity, Program, Solution
from clado.records import CHOSEN, UNIFORM, Result
from clado.solvers import Solve
from clado.space import Assignment, SearchSpace

# Noisy measured pairs make the matrix indefinite, and an optimiser exploits that; clipping regularises (CLADO, section 4.2).
CONVEXITY: Mapping[str, Convexity] = {"pairwise": "clip_psd"}


@dataclass(frozen=True)
class Budget:
    """One limit on the answer: `kind` is a constraint of `clado.constraints` and `bound` its limit, in its unit."""

    kind: str
    bound: float

    @property
    def name(self) -> str:
        """How tables and files call it."""
        return f"{self.bound:g} bits" if self.kind == "average_bits" else f"{self.bound / 1000:g} kB"

    def constraint(self, space: SearchSpace) -> Constraint:
        """The limit as a constraint on a space."""
        return constraints.constraint(self.kind, space, self.bound)


@dataclass(frozen=True)
class Proposal:
    """One method's answer to one budget, not yet measured; `solution` is None for the uniform assignment."""

    budget: Budget
    method: str
    assignment: Assignment
    loss_predicted: float | None = None
    solution: Solution | None = None


def budgets_of(average_bits: Iterable[float], size_bytes: Iterable[int]) -> tuple[Budget, ...]:
    """Budgets in the order given, duplicates dropped."""
    budgets = [Budget("average_bits", b) for b in average_bits] + [Budget("size", s) for s in size_bytes]
    return tuple(dict.fromkeys(budgets))


def check_budgets(space: SearchSpace, budgets: Iterable[Budget], probe: InteractionMatrix) -> None:
    """Raises InfeasibleError for a budget that no assignment meets; needs no measurement (`probe` is any matrix of the space)."""
    for budget in budgets:
        Program.build(probe, [budget.constraint(space)])


def program_of(matrix: InteractionMatrix, limits: Sequence[Constraint]) -> Program:
    """The program that a matrix poses, with the convexity that suits its estimator and without its quarantined options."""
    convexity = CONVEXITY.get(matrix.estimator, "raw")
    return Program.build(matrix, limits, convexity=convexity, quarantined=matrix.quarantined, forbidden=matrix.forbidden)


def widest_uniform(space: SearchSpace, limit: Constraint) -> Assignment:
    """The widest uniform assignment that meets a limit; the narrowest bits everywhere where none does."""
    fitting = [assignment for _, assignment in space.uniform_assignments() if limit.holds(space, assignment)]
    return fitting[-1] if fitting else space.narrowest


def propose(
    matrices: Mapping[str, InteractionMatrix],
    budgets: Sequence[Budget],
    prepare: Callable[[Program], Solve],
    solved: Callable[[Budget, str], None] = lambda budget, method: None,
) -> list[Proposal]:
    """For every budget the widest uniform assignment and each matrix's optimum; convexification is shared over the budgets."""
    space = next(iter(matrices.values())).space
    proposals = [Proposal(budget, UNIFORM, widest_uniform(space, budget.constraint(space))) for budget in budgets]
    for method, matrix in matrices.items():
        solvers: dict[str, tuple[Program, Solve]] = {}
        for budget in budgets:
            limit = budget.constraint(space)
            if budget.kind not in solvers:
                program = program_of(matrix, [limit])
                solvers[budget.kind] = program, prepare(program)
            program, solve = solvers[budget.kind]
            solution = solve(program.with_bounds({limit.name: limit.bound}))
            proposals.append(Proposal(budget, method, solution.assignment, matrix.baseline + solution.objective, solution))
            solved(budget, method)
    return proposals


def choose(space: SearchSpace, proposals: Sequence[Proposal], losses: Mapping[Assignment, float]) -> list[Result]:
    """One Result for each proposal, and one `chosen` for each budget: of all proposals that fit the budget, made for it or for a
    smaller one, the one of least measured loss (of the smaller on a tie). So `chosen` is never worse than uniform or layerwise
    on the images that it was measured on, nor than what a smaller budget got."""
    results = []
    for budget in dict.fromkeys(proposal.budget for proposal in proposals):
        limit = budget.constraint(space)
        own = [proposal for proposal in proposals if proposal.budget == budget]
        results += [_result(space, proposal, losses) for proposal in own]
        # of equal assignments the one made for this budget comes first, so that it gets the credit
        fitting = own + [p for p in proposals if p.budget != budget and limit.holds(space, p.assignment)]
        best = min(fitting, key=lambda p: (losses[p.assignment], space.size_bits(p.assignment)))
        others = [losses[p.assignment] for p in own if p.assignment != best.assignment]
        winner = best.method if best.budget == budget else f"{best.method} for {best.budget.name}"
        row = _result(space, Proposal(budget, CHOSEN, best.assignment, best.loss_predicted, best.solution), losses)
        gain = min(others) - losses[best.assignment] if others else 0.0
        results.append(Result(**{**row.__dict__, "winner": winner, "gain": gain}))
    return results


def _result(space: SearchSpace, proposal: Proposal, losses: Mapping[Assignment, float]) -> Result:
    solution, assignment = proposal.solution, proposal.assignment
    return Result(
        budget=proposal.budget.name,
        method=proposal.method,
        assignment=assignment,
        size_bytes=space.size_bytes(assignment),
        average_bits=space.average_bits(assignment),
        loss_shipped=losses[assignment],
        loss_predicted=proposal.loss_predicted,
        status=None if solution is None else str(solution.status),
        objective=None if solution is None else solution.objective,
        bound=None if solution is None else _finite(solution.bound),
        gap=None if solution is None else _finite(solution.gap),
        seconds=None if solution is None else solution.seconds,
    )


def _finite(value: float) -> float | None:
    return value if abs(value) != float("inf") else None
