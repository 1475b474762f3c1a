"""Lower bounds of a node: a convex quadratic program over simplices and knapsacks, by a warm-started active set. NumPy.

min constant + linear·x + ½ xᵀ H x  over  Σ x = 1 per group, x ≥ 0, x = 0 where a choice is ruled out, A x ≤ limits.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clado.choosing.program import Program
from clado.choosing.solvers._convexify import Form
from clado.interaction.matrix import Array

STEPS = 12
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Bound:
    """`value` is a valid lower bound; `x` (n,) the point it comes from; `reduced_cost` (n,) ≥ 0: what taking a choice adds to the
    bound at least; `support` and `active` (constraints) are where the next solve starts.
    """

    value: float
    x: Array
    reduced_cost: Array
    support: Mask
    active: Mask
    steps: int


class NodeBound:
    """Bounds for the nodes of one program under one convex form of its function."""

    def __init__(self, program: Program, form: Form) -> None:
        self.form, self.h, self.linear = form, form.hessian, form.linear
        self.starts, self.owner = program.starts[:-1], program.owner
        limited = np.isfinite(program.limits)
        costs, limits = program.costs[limited], program.limits[limited]
        scale = np.maximum(np.abs(costs).max(axis=1, initial=0.0), 1e-300)
        self.costs, self.limits = costs / scale[:, None], limits / scale
        self.num_groups, self.n = program.num_groups, program.num_choices
        diagonal = np.diag(self.h)
        self.tolerance = 1e-9 * max(float(np.abs(self.linear).max(initial=0.0)), float(diagonal.max(initial=0.0)), 1e-300)

    def solve(self, allowed: Mask, support: Mask | None = None, active: Mask | None = None, cutoff: float = np.inf) -> Bound:
        """A bound over the allowed choices; stops early once the bound reaches `cutoff`. Every group must have an allowed
        choice.

        Whatever the steps do, the value is valid: f(x') ≥ f(x) + ∇f(x)·(x' − x) for every x, and the right side is minimised
        exactly over the groups with multipliers ≥ 0 on the knapsacks.
        """
        support = self._covered(allowed, support)
        active = np.zeros(len(self.limits), dtype=bool) if active is None else active.copy()
        best: Bound | None = None
        counted = np.add.reduceat(support.astype(float), self.starts)[self.owner]
        x = support / counted
        for step in range(1, STEPS + 1):
            x, gradient, multipliers = self._stationary(x, support, active)
            room = self.limits - self.costs @ x
            beyond = room < -1e-10 * (1 + np.abs(self.limits))
            stuck = active & beyond  # no choice of the support can meet it, so that its multiplier says nothing
            for constraint in np.flatnonzero(stuck).tolist():
                multipliers = self._tightened(gradient, multipliers, allowed, constraint)
            priced = gradient + np.maximum(multipliers, 0) @ self.costs
            priced_allowed = np.where(allowed, priced, np.inf)
            least = np.minimum.reduceat(priced_allowed, self.starts)
            value = (
                self.form.constant
                - 0.5 * float(x @ (gradient - self.linear))
                + float(least.sum())
                - float(np.maximum(multipliers, 0) @ self.limits)
            )
            reduced_cost = priced_allowed - least[self.owner]
            negative = support & (x < -1e-10)
            attractive = self._most_attractive(priced_allowed, least, support)
            if stuck.any():
                attractive |= ~support & (reduced_cost <= self.tolerance)
            more = ~active & beyond
            less = active & (multipliers < -self.tolerance)
            if not np.isfinite(value):
                break
            if best is None or value > best.value:
                best = Bound(value, x, reduced_cost, support, active, step)
            if best.value >= cutoff or not (negative.any() or attractive.any() or more.any() or less.any()):
                break
            support = self._covered(allowed, (support & ~negative) | attractive, x)
            active = (active | more) & ~less
        if best is None:  # numbers overflowed: a bound that rules nothing out is valid as well
            return Bound(-np.inf, support / counted, np.zeros(self.n), support, active, STEPS)
        return best

    def _tightened(self, gradient: Array, multipliers: Array, allowed: Mask, constraint: int) -> Array:
        """Multipliers with that of one constraint where the bound from `gradient` is highest, the others as they are.

        As a function of one multiplier the bound is concave and made of lines: two of them, one rising and one falling, meet at
        the next try, until none lies below their meeting.
        """
        costs, limit = self.costs[constraint], self.limits[constraint]
        others = multipliers.copy()
        others[constraint] = 0.0
        priced = np.where(allowed, gradient + np.maximum(others, 0) @ self.costs, np.inf)

        def line(multiplier: float) -> tuple[float, float]:
            """Value and slope; of equally cheap choices the first of each group counts."""
            at = priced + multiplier * costs
            least = np.minimum.reduceat(at, self.starts)
            cheapest = np.flatnonzero(at == least[self.owner])
            first = cheapest[np.unique(self.owner[cheapest], return_index=True)[1]]
            return float(least.sum()) - multiplier * limit, float(costs[first].sum()) - limit

        low, (value, slope) = 0.0, line(0.0)
        if slope <= 0:
            return others
        high = max(float(np.ptp(priced[allowed])), self.tolerance)
        for _ in range(60):
            high_value, high_slope = line(high)
            if high_slope <= 0:
                break
            low, value, slope, high = high, high_value, high_slope, 8 * high
        else:  # nothing allowed meets the constraint; SCIP finds that by itself
            others[constraint] = low
            return others
        for _ in range(60):
            if high_slope == 0:
                break
            middle = (value - high_value + high_slope * high - slope * low) / (high_slope - slope)
            if not low < middle < high:
                break
            middle_value, middle_slope = line(middle)
            on_lines = value + slope * (middle - low)
            if middle_value >= on_lines - self.tolerance * self.num_groups * 1e-3:
                high = middle
                break
            if middle_slope > 0:
                low, value, slope = middle, middle_value, middle_slope
            else:
                high, high_value, high_slope = middle, middle_value, middle_slope
        others[constraint] = high
        return others

    def _covered(self, allowed: Mask, support: Mask | None, x: Array | None = None) -> Mask:
        """The support within the allowed choices, with at least one choice per group."""
        support = allowed.copy() if support is None else support & allowed
        empty = np.add.reduceat(support.astype(np.intp), self.starts) == 0
        for group in np.flatnonzero(empty):
            first = self.starts[group]
            last = self.starts[group + 1] if group + 1 < self.num_groups else self.n
            choices = first + np.flatnonzero(allowed[first:last])
            support[choices[-1] if x is None else choices[x[choices].argmax()]] = True
        return support

    def _most_attractive(self, priced: Array, least: Array, support: Mask) -> Mask:
        """In each group the cheapest choice, where it is outside of the support and cheaper than what is inside."""
        inside = np.minimum.reduceat(np.where(support, priced, np.inf), self.starts)
        return np.asarray(~support & (priced <= least[self.owner]) & (priced < inside[self.owner] - self.tolerance))

    def _stationary(self, x: Array, support: Mask, active: Mask) -> tuple[Array, Array, Array]:
        """The point where the gradient is even over the support of each group and the active knapsacks are tight: x, ∇f(x),
        multipliers.
        """
        inside = np.where(support, x, -np.inf)
        # In each group the largest x of the support is eliminated by Σ = 1.
        order = np.lexsort((-inside, self.owner))
        basis = order[self.starts]
        is_free = support.copy()
        is_free[basis] = False
        free = np.flatnonzero(is_free)
        eliminated = basis[self.owner[free]]
        gradient = self.h[:, basis].sum(axis=1) + self.linear
        point = np.zeros(self.n)
        point[basis] = 1.0
        multipliers = np.zeros(len(self.limits))
        if len(free):
            rows = self.h[free] - self.h[eliminated]
            matrix = rows[:, free] - rows[:, eliminated]
            slope = gradient[free] - gradient[eliminated]
            tight = np.flatnonzero(active)
            costs = self.costs[tight][:, free] - self.costs[tight][:, eliminated]
            solved = _solved(matrix, np.concatenate([-slope[:, None], costs.T], axis=1), self.tolerance)
            z = solved[:, 0]
            if len(tight):
                room = self.limits[tight] - self.costs[tight][:, basis].sum(axis=1)
                through = costs @ solved[:, 1:]
                ridge = 1e-12 * max(float(np.trace(through)), 1e-12 / self.tolerance)
                through[np.diag_indices(len(tight))] += ridge
                tight_multipliers = _solved(through, (costs @ z - room)[:, None], ridge)[:, 0]
                z = z - solved[:, 1:] @ tight_multipliers
                multipliers[tight] = tight_multipliers
            point[free] = z
            point[basis] -= np.bincount(self.owner[free], weights=z, minlength=self.num_groups)
            gradient = gradient + z @ rows
        return point, gradient, multipliers


def _solved(matrix: Array, right: Array, ridge: float) -> Array:
    """matrix⁻¹ right; with `ridge` on the diagonal where the matrix is singular."""
    try:
        solved = np.linalg.solve(matrix, right)
    except np.linalg.LinAlgError:
        solved = np.full_like(right, np.nan)
    if np.isfinite(solved).all():
        return np.asarray(solved, dtype=np.float64)
    return np.asarray(np.linalg.solve(matrix + ridge * np.eye(len(matrix)), right), dtype=np.float64)
