"""What every solver owes. Subclass it, set `solver`, and `exact` where it proves optimality.

The reference enumerates assignments of the space and shares no code with `Program`: ties, pins, quarantine, forbidden pairs and
constraints are checked on the bit-widths themselves.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from clado.choosing import constraints, solvers
from clado.choosing.constraints import Constraint
from clado.choosing.program import Convexity, Program
from clado.choosing.solution import Solution, Status
from clado.errors import InfeasibleError, SolverError
from clado.interaction.matrix import InteractionMatrix
from clado.space import Assignment, Layer, SearchSpace

CONVEXITIES: tuple[Convexity, ...] = ("raw", "clip_psd")


@dataclass(frozen=True)
class Case:
    """A small random program, and what is needed to enumerate it independently."""

    matrix: InteractionMatrix
    limits: tuple[Constraint, ...]
    candidates: dict[str, list[int]]
    quarantined: tuple[int, ...]
    forbidden: tuple[tuple[int, int], ...]
    convexity: Convexity

    def program(self) -> Program:
        return Program.build(
            self.matrix,
            self.limits,
            candidates=self.candidates,
            quarantined=self.quarantined,
            forbidden=self.forbidden,
            convexity=self.convexity,
        )

    def permits(self, assignment: Assignment) -> bool:
        """Whether an assignment keeps every rule, judged by its bit-widths."""
        space = self.matrix.space
        bits, pairs = assignment.bits, assignment.pairs
        options = {space.option(i, b, a) for i, (b, a) in enumerate(pairs) if b is not None}
        return (
            all(len({pairs[i] for i in tie}) == 1 for tie in space.ties)
            and all(bits[space.names.index(name)] in allowed for name, allowed in self.candidates.items())
            and not options & set(self.quarantined)
            and not any(a in options and b in options for a, b in self.forbidden)
            and all(limit.holds(space, assignment) for limit in self.limits)
        )

    def least(self) -> tuple[float, Assignment] | None:
        """Least minimised value over every permitted assignment, one after another; None when there is none."""
        values = self.matrix.clip_psd().values if self.convexity == "clip_psd" else self.matrix.values
        best: tuple[float, Assignment] | None = None
        space = self.matrix.space
        for pairs in itertools.product(*(space.candidates(i) for i in range(space.num_layers))):
            bits, widths = zip(*pairs, strict=True)
            assignment = Assignment(bits, widths if space.has_activations else ())
            if self.permits(assignment):
                chosen = space.chosen_options(assignment)
                value = 0.5 * float(values[np.ix_(chosen, chosen)].sum())
                if best is None or value < best[0]:
                    best = value, assignment
        return best


def random_case(seed: int, activation_widths: tuple[int, ...] = ()) -> Case:
    """Three to six layers (four, with activation widths); any mix of ties, pins, quarantine, forbidden pairs and up to three
    constraints; often indefinite.
    """
    rng = np.random.default_rng(seed)
    num_layers = int(rng.integers(3, 5 if activation_widths else 7))
    layers = [
        Layer(f"layer{i}", (int(rng.integers(1, 40)), 3), "conv2d", macs=int(rng.integers(1, 99))) for i in range(num_layers)
    ]
    if rng.random() < 0.5:
        widths = [(2, 4, 8)] * num_layers
    else:
        widths = [tuple(sorted(rng.choice([2, 3, 4, 6, 8], size=rng.integers(1, 5), replace=False).tolist())) for _ in layers]
    ties: tuple[tuple[int, ...], ...] = ()
    if rng.random() < 0.4:
        ties = ((0, num_layers - 1),)
        widths[-1] = widths[0]
    space = SearchSpace(tuple(layers), tuple(widths), ties).with_activations(activation_widths)
    k = space.num_options
    noises = np.array([2.0**-o.bits + (2.0**-o.activation_bits if o.activation_bits else 0.0) for o in space.options])
    scale = noises * rng.lognormal(0, 0.7, num_layers)[[o.layer for o in space.options]]
    rank = int(rng.integers(1, 8))
    factor = rng.normal(size=(k, rank))
    noise = rng.normal(size=(k, k))
    gram = factor @ factor.T / rank + rng.choice([0.0, 0.1, 1.0]) * (noise + noise.T)
    values = gram * scale[:, None] * scale[None, :] * 10.0 ** rng.integers(-5, 4)
    matrix = InteractionMatrix(space, (values + values.T) / 2, "random", "none", 0.0, 1)
    if rng.random() < 0.5:
        off_diagonal = matrix.in_layer_mask() & ~np.eye(k, dtype=bool)
        matrix = InteractionMatrix(space, np.where(off_diagonal, 0.0, matrix.values), "random", "none", 0.0, 1)
    limits: list[Constraint] = []
    for name in rng.permutation(["size", "average_bits", "bops"])[: rng.integers(0, 4)]:
        unbounded = constraints.constraint(str(name), space, 1.0)
        low, high = unbounded.value(space, space.narrowest), unbounded.value(space, space.widest)
        limits.append(unbounded.with_bound(float(np.floor(low + rng.uniform(0.02, 0.9) * (high - low)))))
    free = [
        o for i, (first, last) in enumerate(itertools.pairwise(space.offsets)) if last - first > 1 for o in range(first + 1, last)
    ]
    quarantined = tuple(rng.choice(free, size=1).tolist()) if free and rng.random() < 0.3 else ()
    candidates = {}
    if rng.random() < 0.3:
        candidates = {"layer1": [int(rng.choice(widths[1]))]}
        quarantined = tuple(o for o in quarantined if space.options[o].layer != 1)
    pairs = (
        [tuple(sorted(rng.choice(k, size=2, replace=False).tolist())) for _ in range(rng.integers(0, 4))]
        if rng.random() < 0.4
        else []
    )
    forbidden = tuple(pair for pair in pairs if len(space.bit_widths[space.options[pair[0]].layer]) > 1)
    return Case(matrix, tuple(limits), candidates, quarantined, forbidden, CONVEXITIES[int(rng.integers(2))])


class SolverContract:
    """Laws of a solver."""

    solver: str
    exact: bool = False
    num_cases = 40
    num_activation_cases = 20

    def check(self, seed: int, activation_widths: tuple[int, ...] = ()) -> None:
        case = random_case(seed, activation_widths)
        least = case.least()
        if least is None:
            with pytest.raises(InfeasibleError if self.exact else (InfeasibleError, SolverError)):
                solvers.solve(case.program(), self.solver)
            return
        try:
            solution = solvers.solve(case.program(), self.solver)
        except SolverError:
            assert not self.exact, f"case {seed}: gave up on a feasible program"
            return
        self.check_solution(case, solution, least[0], f"case {seed}")

    def check_solution(self, case: Case, solution: Solution, least: float, label: str) -> None:
        scale = float(np.abs(case.matrix.values).max())
        assert case.permits(solution.assignment), f"{label}: {solution.assignment} breaks a rule"
        chosen = case.matrix.space.chosen_options(solution.assignment)
        assert solution.objective == pytest.approx(
            0.5 * case.matrix.values[np.ix_(chosen, chosen)].sum(), rel=1e-9, abs=1e-12 * scale
        )
        assert solution.minimised >= least - 1e-9 * scale, f"{label}: better than the best"
        assert solution.bound <= least + 1e-9 * scale + 2e-6 * abs(least), f"{label}: the bound {solution.bound} is above {least}"
        for limit in case.limits:
            assert solution.values[limit.name] == pytest.approx(limit.value(case.matrix.space, solution.assignment))
            assert solution.slack[limit.name] == pytest.approx(limit.bound - solution.values[limit.name])
        if self.exact:
            assert solution.status is Status.OPTIMAL, f"{label}: {solution.status}"
            assert solution.minimised == pytest.approx(least, rel=2e-6, abs=1e-9 * scale), label
        assert solution.advice

    def test_agrees_with_enumeration(self) -> None:
        for seed in range(self.num_cases):
            self.check(seed)

    @pytest.mark.parametrize("activation_widths", [(8,), (4, 8)])
    def test_agrees_with_enumeration_of_activation_widths(self, activation_widths: tuple[int, ...]) -> None:
        for seed in range(self.num_activation_cases):
            self.check(seed, activation_widths)

    def test_same_answer_twice(self) -> None:
        cases = [case for case in map(random_case, range(1000, 1010)) if case.least() is not None and not case.forbidden]
        assert len(cases) >= 3
        for case in cases:
            first, second = (solvers.solve(case.program(), self.solver) for _ in range(2))
            assert (first.assignment, first.nodes, first.bound) == (second.assignment, second.nodes, second.bound)

    def test_the_law_can_fail(self) -> None:
        """A worse answer, called optimal, does not pass."""
        case = next(c for c in map(random_case, range(100)) if not c.limits and c.least() is not None and not c.forbidden)
        least = case.least()
        assert least is not None
        program = case.program()
        everything = itertools.product(*(range(a, b) for a, b in itertools.pairwise(program.starts)))
        worst = max((np.array(choices) for choices in everything), key=program.minimised)
        wrong = program.solution(worst, Status.OPTIMAL, program.minimised(worst), solver=self.solver)
        with pytest.raises(AssertionError):
            self.check_solution(case, wrong, least[0], "wrong")
