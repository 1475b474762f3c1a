"""The integer quadratic program as data: what is minimised, what limits it, and what an answer says. NumPy only.

A *group* is a set of layers that share a candidate (a tie, or one layer alone); a *choice* is a group at one candidate, its bits
of weights and activations, that may be taken. With x the 0/1 vector of choices the program is

    min ½ xᵀ Q x    s.t.  exactly one choice per group,  A x ≤ limits,  x_k + x_l ≤ 1 for forbidden pairs.

Q = Tᵀ Ĝ T, where T maps a choice to the options it takes: ties merge rows, columns and inner pairs in one product.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from clado.choosing.constraints import Constraint
from clado.errors import ConfigurationError, InfeasibleError
from clado.interaction.matrix import Array, Convexity, InteractionMatrix
from clado.space import Assignment, SearchSpace

Choices = NDArray[np.intp]


class Status(StrEnum):
    """How a solve ended; `advice` says what that means and what to try."""

    OPTIMAL = "optimal"
    LIMIT = "limit"
    INTERRUPTED = "interrupted"
    HEURISTIC = "heuristic"
    INFEASIBLE = "infeasible"
    DOUBTFUL = "doubtful"

    @property
    def advice(self) -> str:
        """One sentence: what happened, and what to try."""
        return _ADVICE[self]


_ADVICE = {
    Status.OPTIMAL: "Proven: no other assignment within the constraints has a lower objective (relative tolerance 1e-6).",
    Status.LIMIT: "A limit was reached: this is the best assignment found, and the gap bounds what is left; raise the limit, "
    "offer fewer bit-widths, or use convexity='clip_psd' or more sensitivity images, which make the program easier.",
    Status.INTERRUPTED: "Interrupted: this is the best assignment found until then, and the gap bounds what is left; run it "
    "again to prove it.",
    Status.HEURISTIC: "Found by a heuristic, which proves nothing; solve with 'scip' for a bound.",
    Status.INFEASIBLE: "No assignment meets the constraints; raise a budget, offer narrower bit-widths, or unpin layers.",
    Status.DOUBTFUL: "The solver's numbers and the recomputed ones disagree by more than the tolerance; the assignment is "
    "feasible, but its bound is not to be trusted: rescale the matrix or compare with solver='exhaustive' on a smaller space.",
}


@dataclass(frozen=True)
class Solution:
    """An assignment, what it is worth, and how far that is proven.

    `objective` is the predicted loss increase ½ αᵀ Ĝ α on the *raw* matrix. `minimised` is the value of the function that was
    minimised: another number only where the program clips (`convexity='clip_psd'`) or leaves terms out (`Program.layerwise`).
    `bound` and `gap` = (minimised − bound) / |minimised| belong to `minimised`; a heuristic has bound −∞ and gap ∞. `values`
    and `slack` (unused budget) are per constraint, in its unit. `better_than_widest` is an assignment that the raw matrix
    prefers to the widest bits everywhere, when a local search finds one: a sign of sampling noise (None: none was found).
    """

    assignment: Assignment
    status: Status
    objective: float
    minimised: float
    bound: float
    gap: float
    seconds: float
    nodes: int
    values: dict[str, float]
    slack: dict[str, float]
    solver: str
    estimator: str
    convexity: Convexity
    better_than_widest: Assignment | None = None
    message: str = ""

    @property
    def advice(self) -> str:
        """What happened and what to try, with the solver's own words where it has any."""
        return f"{self.status.advice} {self.message}".strip()


@dataclass(frozen=True, eq=False)
class Program:
    """The program; build it with `Program.build`.

    `groups`: the layers of each group. `starts`: first choice of each group, then n. `options`: the options that each of the n
    choices takes. `quadratic` (n, n) symmetric: the minimised function. `costs` (number of constraints, n),
    `limits`. `forbidden`: pairs of choices that may not be taken together.
    """

    matrix: InteractionMatrix
    constraints: tuple[Constraint, ...]
    convexity: Convexity
    groups: tuple[tuple[int, ...], ...]
    starts: Choices
    options: tuple[tuple[int, ...], ...]
    quadratic: Array
    costs: Array
    forbidden: tuple[tuple[int, int], ...] = field(default=())

    @classmethod
    def build(
        cls,
        matrix: InteractionMatrix,
        constraints: Sequence[Constraint] = (),
        *,
        candidates: Mapping[str, Sequence[int]] | None = None,
        quarantined: Collection[int] = (),
        forbidden: Iterable[tuple[int, int]] = (),
        convexity: Convexity = "raw",
    ) -> "Program":
        """The program of a matrix under constraints.

        `candidates` narrows the weights' bit-widths of the layers whose name matches a pattern (one bit-width pins them), and
        leaves every activation width.
        `quarantined` are options that may not be taken, `forbidden` pairs of options that may not be taken together.
        `convexity` says what is minimised: `raw` the matrix as measured (solvers convexify it exactly where they need to);
        `clip_psd` the nearest positive semidefinite matrix (CLADO, section 4.2), which changes the function and acts as a
        regulariser on noisy matrices. Raises InfeasibleError when a single constraint, or what is left to choose from, rules
        everything out.
        """
        if convexity not in get_args(Convexity):
            raise ConfigurationError(f"unknown convexity {convexity!r}; expected one of {', '.join(get_args(Convexity))}")
        space = matrix.space
        names = [constraint.name for constraint in constraints]
        for constraint in constraints:
            if len(constraint.costs) != space.num_options:
                raise ConfigurationError(
                    f"constraint {constraint.name} has {len(constraint.costs)} costs; the space has {space.num_options} options"
                )
            if names.count(constraint.name) > 1:
                raise ConfigurationError(f"two constraints are called {constraint.name}; keep one of them, or rename one")
        groups, pairs = _groups(space), set(_checked_pairs(space, forbidden))
        excluded = _excluded(space, candidates or {}, quarantined)
        options: list[tuple[int, ...]] = []
        starts = [0]
        for group in groups:
            for candidate in space.candidates(group[0]):
                taken = tuple(space.option(layer, *candidate) for layer in group)
                if not excluded & set(taken) and not any((a, b) in pairs for a in taken for b in taken):
                    options.append(taken)
            if len(options) == starts[-1]:
                raise InfeasibleError(
                    f"no bit-width is left for {_listed(space, group)}; release a quarantined or pinned candidate"
                )
            starts.append(len(options))
        minimised = matrix.clip_psd().values if convexity == "clip_psd" else matrix.values
        costs = np.array([[sum(c.costs[o] for o in taken) for taken in options] for c in constraints]).reshape(
            len(constraints), len(options)
        )
        clashes = (
            {
                (k, m)
                for k in range(len(options))
                for m in range(k)
                if any((a, b) in pairs for a in options[k] for b in options[m])
            }
            if pairs
            else set()
        )
        owner = np.repeat(np.arange(len(groups)), np.diff(starts))
        program = cls(
            matrix,
            tuple(constraints),
            convexity,
            groups,
            np.array(starts, dtype=np.intp),
            tuple(options),
            _merged(minimised, options),
            costs,
            tuple(sorted((m, k) for k, m in clashes if owner[k] != owner[m])),
        )
        for index in range(len(constraints)):
            if program.reachable(index)[0] > constraints[index].limit:
                raise InfeasibleError(program.why_infeasible())
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
        """n, the number of binaries."""
        return len(self.options)

    @cached_property
    def owner(self) -> Choices:
        """Group of each choice."""
        return np.repeat(np.arange(self.num_groups), np.diff(self.starts))

    @cached_property
    def limits(self) -> Array:
        """Largest allowed value per constraint."""
        return np.array([constraint.limit for constraint in self.constraints], dtype=np.float64)

    @cached_property
    def is_linear(self) -> bool:
        """Whether no two groups interact, so that the program is an integer linear one."""
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
        """The assignment that one choice per group means."""
        return self.space.assignment([option for k in choices for option in self.options[k]])

    def choices(self, assignment: Assignment) -> Choices:
        """One choice per group; refuses an assignment that is partial, unties a tie or takes an excluded candidate."""
        taken = set(self.space.chosen_options(assignment))
        found = [k for k, options in enumerate(self.options) if taken.issuperset(options)]
        if len(found) != self.num_groups:
            reached = {self.owner[k] for k in found}
            lacking = [self.groups[g] for g in range(self.num_groups) if g not in reached]
            raise ConfigurationError(
                f"the assignment gives {_listed(self.space, lacking[0])} a bit-width that the program does not offer"
            )
        return np.array(found, dtype=np.intp)

    def offers(self, assignment: Assignment) -> bool:
        """Whether an assignment is one of choices: it keeps the ties and takes no excluded candidate."""
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
        taken = set(choices.tolist())
        return not any(a in taken and b in taken for a, b in self.forbidden)

    def reachable(self, constraint: int) -> tuple[float, float]:
        """Smallest and largest value of one constraint, the others and forbidden pairs left aside."""
        smallest = np.minimum.reduceat(self.costs[constraint], self.starts[:-1])
        largest = np.maximum.reduceat(self.costs[constraint], self.starts[:-1])
        return float(smallest.sum()), float(largest.sum())

    def why_infeasible(self) -> str:
        """What each constraint could reach alone, and what pins it."""
        lines = []
        for index, constraint in enumerate(self.constraints):
            smallest, largest = self.reachable(index)
            verdict = "below the smallest reachable" if smallest > constraint.limit else "reachable alone"
            lines.append(
                f"{constraint.name}: the bound {constraint.bound:.12g} {constraint.unit} is {verdict}; reachable are "
                f"{smallest:.12g} to {largest:.12g}; {self._pinned_by(index)}"
            )
        if self.forbidden:
            lines.append(f"{len(self.forbidden)} forbidden pairs")
        return "no assignment meets the constraints. " + ". ".join(lines)

    def _pinned_by(self, constraint: int) -> str:
        """What holds a constraint's smallest value up."""
        least = np.minimum.reduceat(self.costs[constraint], self.starts[:-1])
        pinned = np.flatnonzero(np.diff(self.starts) == 1)
        if not len(pinned):
            heaviest = _listed(self.space, self.groups[int(least.argmax())])
            return f"every layer is at its least there, {heaviest} with {least.max():.9g} the largest"
        heaviest = _listed(self.space, self.groups[pinned[least[pinned].argmax()]])
        return (
            f"{len(pinned)} groups have one candidate (pinned, or the others are quarantined) and hold {least[pinned].sum():.9g} "
            f"of it, {heaviest} the most"
        )

    def with_bounds(self, bounds: Mapping[str, float]) -> "Program":
        """The same program with other bounds, by the constraints' names; raises InfeasibleError as `build` does."""
        unknown = sorted(set(bounds) - {constraint.name for constraint in self.constraints})
        if unknown:
            raise ConfigurationError(
                f"the program has no constraint {unknown[0]!r}; it has {', '.join(c.name for c in self.constraints) or 'none'}"
            )
        changed = replace(self, constraints=tuple(c.with_bound(bounds.get(c.name, c.bound)) for c in self.constraints))
        for index, constraint in enumerate(changed.constraints):
            if changed.reachable(index)[0] > constraint.limit:
                raise InfeasibleError(changed.why_infeasible())
        return changed

    def layerwise(self) -> "Program":
        """The same program without interactions: what a layerwise method would minimise; `Solution.objective` stays on the raw
        matrix.
        """
        return replace(self, quadratic=_merged(self.matrix.diagonal_only().values, self.options), convexity="raw")

    def unlimited(self) -> "Program":
        """The same choices with the raw matrix, no constraint and no forbidden pair."""
        quadratic = _merged(self.matrix.values, self.options)
        none = np.zeros((0, self.num_choices))
        return replace(self, constraints=(), costs=none, forbidden=(), quadratic=quadratic, convexity="raw")

    def minimising(self, constraint: int) -> "Program":
        """The program that minimises one constraint's value under all the others (that one itself without a bound)."""
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
        """The answer that these choices mean, with everything recomputed from the raw matrix and the costs; refuses infeasible
        choices.
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
            better_than_widest,
            message,
        )


class Solve(Protocol):
    """A solver with its settings: what `pareto` and `candidates` are given."""

    def __call__(self, program: Program, starts: Sequence[Assignment] = ()) -> Solution:
        """The best assignment of the program, from any number of assignments to start from."""
        ...


def _groups(space: SearchSpace) -> tuple[tuple[int, ...], ...]:
    """Ties and single layers, in the order of their first layer."""
    tie = {layer: tuple(sorted(group)) for group in space.ties for layer in group}
    return tuple(sorted({tie.get(layer, (layer,)) for layer in range(space.num_layers)}))


def _excluded(space: SearchSpace, candidates: Mapping[str, Sequence[int]], quarantined: Collection[int]) -> set[int]:
    """Options that may not be taken."""
    for option in quarantined:
        if not 0 <= option < space.num_options:
            raise ConfigurationError(f"quarantined option {option} is not within 0..{space.num_options - 1}")
    excluded = set(quarantined)
    # Ties are left out here: a pin on one layer of a tie pins the tie, because a choice needs all of its options.
    narrowed = SearchSpace(space.layers, space.bit_widths).restricted(candidates)
    for layer, (measured, wanted) in enumerate(zip(space.bit_widths, narrowed.bit_widths, strict=True)):
        if not set(wanted) <= set(measured):
            raise ConfigurationError(
                f"{space.layers[layer].name} was measured at {list(measured)} bits; of the candidates {list(wanted)} not all are"
            )
        excluded |= {space.option(layer, *pair) for pair in space.candidates(layer) if pair[0] not in wanted}
    return excluded


def _checked_pairs(space: SearchSpace, forbidden: Iterable[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """Both orders of each pair of options."""
    for a, b in forbidden:
        if not (0 <= a < space.num_options and 0 <= b < space.num_options) or a == b:
            raise ConfigurationError(
                f"forbidden pair ({a}, {b}); expected two different options within 0..{space.num_options - 1}"
            )
        yield a, b
        yield b, a


def _merged(values: Array, options: Sequence[tuple[int, ...]]) -> Array:
    """Tᵀ G T: sums over the options that each choice takes."""
    if all(len(taken) == 1 for taken in options):
        kept = [taken[0] for taken in options]
        return np.ascontiguousarray(values[np.ix_(kept, kept)])
    indicator = np.zeros((len(values), len(options)))
    for k, taken in enumerate(options):
        indicator[list(taken), k] = 1.0
    merged = indicator.T @ values @ indicator
    return np.asarray((merged + merged.T) / 2)


def _listed(space: SearchSpace, layers: Sequence[int]) -> str:
    """Names of layers for a message, at most three."""
    shown = ", ".join(space.layers[i].name for i in layers[:3])
    return shown + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
