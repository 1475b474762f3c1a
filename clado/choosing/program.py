"""The integer quadratic program as data: its function, its limits, and its answer. NumPy only.

A *group* is a set of layers that share a candidate: a tie, or one layer. A *choice* is a group at one of its candidates (bits of
weights and activations). For the 0/1 vector x of choices the program is

    min ½ xᵀ Q x    s.t.  exactly one choice per group,  A x ≤ limits,  x_k + x_l ≤ 1 for forbidden pairs.

Q = Tᵀ Ĝ T, where T maps a choice to its options. One product merges the rows, columns and inner pairs of ties.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from clado.choosing._building import (
    check_constraints,
    choices_of,
    clashing_choices,
    excluded_options,
    forbidden_pairs,
    groups_of,
    listed,
    merged,
)
from clado.choosing.constraints import Constraint
from clado.choosing.solution import Solution, Status
from clado.errors import ConfigurationError, InfeasibleError
from clado.interaction.matrix import Array, Convexity, InteractionMatrix
from clado.space import Assignment, SearchSpace

Choices = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Program:
    """The program over n choices. Build it with `Program.build`."""

    matrix: InteractionMatrix
    """The interaction matrix as measured."""
    constraints: tuple[Constraint, ...]
    """The constraints, each with its own name."""
    convexity: Convexity
    """Which matrix is minimised: as measured, or clipped."""
    groups: tuple[tuple[int, ...], ...]
    """The layers of each group."""
    starts: Choices
    """The first choice of each group, then n."""
    options: tuple[tuple[int, ...], ...]
    """The options of each choice, one for each layer of its group."""
    quadratic: Array
    """Q of the minimised function, (n, n), symmetric."""
    costs: Array
    """The cost of each choice in each constraint, (number of constraints, n)."""
    forbidden: tuple[tuple[int, int], ...] = field(default=())
    """Pairs of choices that may not be chosen together."""

    @classmethod
    def build(
        cls,
        matrix: InteractionMatrix,
        constraints: Sequence[Constraint] = (),
        *,
        candidates: Mapping[str, Sequence[int | str | None]] | None = None,
        quarantined: Collection[int] = (),
        forbidden: Iterable[tuple[int, int]] = (),
        convexity: Convexity = "raw",
    ) -> "Program":
        """The program of a matrix under constraints.

        Args:
            matrix: The interaction matrix.
            constraints: Constraints on the space of the matrix, with different names.
            candidates: Pattern of layer names -> the bit-widths of weights that stay allowed. One bit-width pins these layers.
            quarantined: Options that may not be taken.
            forbidden: Pairs of options that may not be taken together.
            convexity: `raw` minimises the matrix as measured; solvers make it convex without changing its values. `clip_psd`
                minimises the nearest positive semidefinite matrix (CLADO, section 4.2). This changes the function, and
                regularises noisy matrices.

        Raises:
            ConfigurationError: An argument does not fit the space.
            InfeasibleError: A group has no choice left, or no assignment meets a constraint alone.
        """
        if convexity not in get_args(Convexity):
            raise ConfigurationError(f"unknown convexity {convexity!r}; expected one of {', '.join(get_args(Convexity))}")
        space = matrix.space
        check_constraints(space, constraints)
        groups, pairs = groups_of(space), forbidden_pairs(space, forbidden)
        excluded = excluded_options(space, candidates or {}, quarantined)
        options, starts = choices_of(space, groups, excluded, pairs)
        minimised = matrix.clip_psd().values if convexity == "clip_psd" else matrix.values
        costs = np.array([[sum(c.costs[o] for o in choice) for choice in options] for c in constraints]).reshape(
            len(constraints), len(options)
        )
        program = cls(
            matrix,
            tuple(constraints),
            convexity,
            groups,
            starts,
            tuple(options),
            merged(minimised, options),
            costs,
            clashing_choices(options, starts, pairs),
        )
        program._check_reach()
        return program

    @property
    def space(self) -> SearchSpace:
        """The space of the assignments."""
        return self.matrix.space

    @property
    def num_groups(self) -> int:
        """Number of decisions."""
        return len(self.groups)

    @property
    def num_choices(self) -> int:
        """n, the number of choices."""
        return len(self.options)

    @cached_property
    def owner(self) -> Choices:
        """Group of each choice."""
        return np.repeat(np.arange(self.num_groups), np.diff(self.starts))

    @cached_property
    def limits(self) -> Array:
        """Largest allowed value of each constraint."""
        return np.array([constraint.limit for constraint in self.constraints], dtype=np.float64)

    @cached_property
    def is_linear(self) -> bool:
        """Whether no two groups interact. The program is then an integer linear program."""
        return not np.any(self.quadratic[self.owner[:, None] != self.owner[None, :]])

    @property
    def narrowest(self) -> Choices:
        """The first choice of each group."""
        return self.starts[:-1].copy()

    @property
    def widest(self) -> Choices:
        """The last choice of each group."""
        return self.starts[1:] - 1

    def assignment(self, choices: Choices) -> Assignment:
        """The assignment for one choice per group."""
        return self.space.assignment([option for k in choices for option in self.options[k]])

    def choices(self, assignment: Assignment) -> Choices:
        """The choices of an assignment, one per group.

        Raises:
            ConfigurationError: The assignment is partial, breaks a tie, or takes an excluded candidate.
        """
        options = set(self.space.chosen_options(assignment))
        choices = [k for k, choice in enumerate(self.options) if options.issuperset(choice)]
        if len(choices) != self.num_groups:
            complete = {self.owner[k] for k in choices}
            incomplete = [self.groups[g] for g in range(self.num_groups) if g not in complete]
            raise ConfigurationError(
                f"the assignment gives {listed(self.space, incomplete[0])} a bit-width that the program does not offer"
            )
        return np.array(choices, dtype=np.intp)

    def offers(self, assignment: Assignment) -> bool:
        """Whether an assignment consists of choices: it keeps the ties and takes no excluded candidate."""
        try:
            self.choices(assignment)
        except ConfigurationError:
            return False
        return True

    def minimised(self, choices: Choices) -> float:
        """Value of the minimised function, ½ xᵀ Q x."""
        return 0.5 * float(self.quadratic[np.ix_(choices, choices)].sum())

    def is_feasible(self, choices: Choices) -> bool:
        """Whether every constraint holds (whole numbers exactly) and no forbidden pair is taken."""
        if np.any(self.costs[:, choices].sum(axis=1) > self.limits):
            return False
        numbers = set(choices.tolist())
        return not any(a in numbers and b in numbers for a, b in self.forbidden)

    def reachable(self, constraint: int) -> tuple[float, float]:
        """Smallest and largest value of one constraint, without the other constraints and forbidden pairs."""
        smallest = np.minimum.reduceat(self.costs[constraint], self.starts[:-1])
        largest = np.maximum.reduceat(self.costs[constraint], self.starts[:-1])
        return float(smallest.sum()), float(largest.sum())

    def why_infeasible(self) -> str:
        """The range of each constraint alone, and the layers that determine its smallest value."""
        lines = []
        for index, constraint in enumerate(self.constraints):
            smallest, largest = self.reachable(index)
            verdict = "below the smallest reachable" if smallest > constraint.limit else "reachable alone"
            bound, least, most = map(constraint.typed, (constraint.bound, smallest, largest))
            lines.append(
                f"{constraint.name}: the bound {bound} {constraint.typed_unit or constraint.unit} is {verdict}; reachable are "
                f"{least} to {most}; {self._pinned_by(index)}"
            )
        if self.forbidden:
            lines.append(f"{len(self.forbidden)} forbidden pairs")
        return "no assignment meets the constraints. " + ". ".join(lines)

    def _pinned_by(self, constraint: int) -> str:
        """The layers that determine a constraint's smallest value, in words."""
        least = np.minimum.reduceat(self.costs[constraint], self.starts[:-1])
        pinned = np.flatnonzero(np.diff(self.starts) == 1)
        if not len(pinned):
            heaviest = listed(self.space, self.groups[int(least.argmax())])
            return f"every layer has its smallest value there, {heaviest} with {least.max():.9g} the largest"
        heaviest = listed(self.space, self.groups[pinned[least[pinned].argmax()]])
        return (
            f"{len(pinned)} groups have one candidate (pinned, or the others are quarantined) and take {least[pinned].sum():.9g} "
            f"of it, {heaviest} the most"
        )

    def with_bounds(self, bounds: Mapping[str, float]) -> "Program":
        """The same program with other bounds, by the constraints' names; raises InfeasibleError as `build` does."""
        unknown = sorted(set(bounds) - {constraint.name for constraint in self.constraints})
        if unknown:
            raise ConfigurationError(
                f"the program has no constraint {unknown[0]!r}; it has {', '.join(c.name for c in self.constraints) or 'none'}"
            )
        program = replace(self, constraints=tuple(c.with_bound(bounds.get(c.name, c.bound)) for c in self.constraints))
        program._check_reach()
        return program

    def _check_reach(self) -> None:
        """Raises InfeasibleError if no assignment meets one of the constraints alone."""
        for index, constraint in enumerate(self.constraints):
            if self.reachable(index)[0] > constraint.limit:
                raise InfeasibleError(self.why_infeasible())

    def layerwise(self) -> "Program":
        """The same program without interactions, as a layerwise method minimises it.

        `Solution.objective` stays on the raw matrix.
        """
        return replace(self, quadratic=merged(self.matrix.diagonal_only().values, self.options), convexity="raw")

    def unlimited(self) -> "Program":
        """The same choices with the raw matrix, no constraint and no forbidden pair."""
        quadratic, costs = merged(self.matrix.values, self.options), np.zeros((0, self.num_choices))
        return replace(self, constraints=(), costs=costs, forbidden=(), quadratic=quadratic, convexity="raw")

    def minimising(self, constraint: int) -> "Program":
        """The program that minimises one constraint's value under all other constraints. This constraint has no bound."""
        constraints = tuple(c.with_bound(np.inf) if k == constraint else c for k, c in enumerate(self.constraints))
        return replace(self, constraints=constraints, quadratic=np.diag(2 * self.costs[constraint]), convexity="raw")

    def solution(
        self,
        choices: Choices,
        status: Status,
        bound: float,
        *,
        solver: str,
        seconds: float = 0.0,
        nodes: int = 0,
        better_than_widest: Assignment | None = None,
        message: str = "",
    ) -> Solution:
        """The solution for these choices. Everything is recomputed from the raw matrix and the costs.

        Raises:
            ValueError: The choices are not feasible.
        """
        if not self.is_feasible(choices):
            raise ValueError(f"{solver} returned choices that break a constraint")
        assignment = self.assignment(choices)
        minimised = self.minimised(choices)
        values = {c.name: float(v) for c, v in zip(self.constraints, self.costs[:, choices].sum(axis=1), strict=True)}
        bound = min(bound, minimised)
        gap = 0.0 if bound == minimised else (minimised - bound) / max(abs(minimised), np.finfo(float).tiny)
        return Solution(
            assignment,
            status,
            self.matrix.predicted_increase(assignment),
            minimised,
            bound,
            float(gap),
            seconds,
            nodes,
            values,
            {c.name: c.bound - values[c.name] for c in self.constraints},
            solver,
            self.matrix.estimator,
            self.convexity,
            self.space,
            better_than_widest,
            message,
        )


class Solve(Protocol):
    """A solver with its settings, in the form that `pareto` and `proposals` call."""

    def __call__(self, program: Program, starts: Sequence[Assignment] = ()) -> Solution:
        """The best assignment of the program. `starts` are any number of assignments to start from."""
        ...
