"""Lower bounds of a node: a convex quadratic program over simplices and knapsacks, by a warm-started active set. NumPy.

min constant + linear·x + ½ xᵀ H x  over  Σ x = 1 per group, x ≥ 0, x = 0 where a choice is excluded, A x ≤ limits.
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
    """A lower bound of a node."""

    value: float
    """A valid lower bound."""
    x: Array
    """The point that the bound comes from, (n,)."""
    reduced_cost: Array
    """The least amount by which taking a choice raises the bound, (n,), ≥ 0."""
    support: Mask
    """The choices that the next solve starts with, (n,)."""
    active: Mask
    """The constraints that the next solve starts with."""
    steps: int
    """Steps of the active set until this bound."""


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
        """A bound over the allowed choices. Stops early where the bound reaches `cutoff`.

        Every group must have an allowed choice. The value is valid after any step, because f(x') ≥ f(x) + ∇f(x)·(x' − x) for
        every x. The right side is minimised exactly over the groups, with multipliers ≥ 0 on the knapsacks.
        """
        support = self._covered(allowed, support)
        active = np.zeros(len(self.limits), dtype=bool) if active is None else active.copy()
        best: Bound | None = None
        num_supported = np.add.reduceat(support.astype(float), self.starts)[self.owner]
        x = support / num_supported
        for step in range(1, STEPS + 1):
            x, gradient, multipliers = self._stationary(x, support, active)
            room = self.limits - self.costs @ x
            broken = room < -1e-10 * (1 + np.abs(self.limits))
            stuck = active & broken  # no choice of the support can meet it, so its multiplier has no meaning
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
            added = ~active & broken
            removed = active & (multipliers < -self.tolerance)
            if not np.isfinite(value):
                break
            if best is None or value > best.value:
                best = Bound(value, x, reduced_cost, support, active, step)
            if best.value >= cutoff or not (negative.any() or attractive.any() or added.any() or removed.any()):
                break
            support = self._covered(allowed, (support & ~negative) | attractive, x)
            active = (active | added) & ~removed
        if best is None:  # numbers overflowed: a bound that excludes nothing is valid too
            return Bound(-np.inf, support / num_supported, np.zeros(self.n), support, active, STEPS)
        return best

    def _tightened(self, gradient: Array, multipliers: Array, allowed: Mask, constraint: int) -> Array:
        """The same multipliers, except that one constraint has the multiplier with the highest bound from `gradient`.

        As a function of one multiplier the bound is concave and piecewise linear. The next multiplier is where a rising and a
        falling line meet, until no line lies below this point.
        """
        costs, limit = self.costs[constraint], self.limits[constraint]
        others = multipliers.copy()
        others[constraint] = 0.0
        priced = np.where(allowed, gradient + np.maximum(others, 0) @ self.costs, np.inf)

        def line(multiplier: float) -> tuple[float, float]:
            """Value and slope. Of equally cheap choices the first of each group counts."""
            prices = priced + multiplier * costs
            least = np.minimum.reduceat(prices, self.starts)
            cheapest = np.flatnonzero(prices == least[self.owner])
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
        else:  # no allowed choices meet the constraint; SCIP finds this out
            others[constraint] = low
            return others
        for _ in range(60):
            if high_slope == 0:
                break
            middle = (value - high_value + high_slope * high - slope * low) / (high_slope - slope)
            if not low < middle < high:
                break
            middle_value, middle_slope = line(middle)
            line_value = value + slope * (middle - low)
            if middle_value >= line_value - self.tolerance * self.num_groups * 1e-3:
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
        """In each group the cheapest choice, where it is not in the support and is cheaper than the support's cheapest."""
        cheapest = np.minimum.reduceat(np.where(support, priced, np.inf), self.starts)
        return np.asarray(~support & (priced <= least[self.owner]) & (priced < cheapest[self.owner] - self.tolerance))

    def _stationary(self, x: Array, support: Mask, active: Mask) -> tuple[Array, Array, Array]:
        """The point with an even gradient over the support of each group and tight active knapsacks: x, ∇f(x), multipliers."""
        # In each group the largest x of the support is eliminated by Σ = 1.
        order = np.lexsort((-np.where(support, x, -np.inf), self.owner))
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
            solved = _solution(matrix, np.concatenate([-slope[:, None], costs.T], axis=1), self.tolerance)
            z = solved[:, 0]
            if len(tight):
                room = self.limits[tight] - self.costs[tight][:, basis].sum(axis=1)
                schur = costs @ solved[:, 1:]
                ridge = 1e-12 * max(float(np.trace(schur)), 1e-12 / self.tolerance)
                schur[np.diag_indices(len(tight))] += ridge
                tight_multipliers = _solution(schur, (costs @ z - room)[:, None], ridge)[:, 0]
                z = z - solved[:, 1:] @ tight_multipliers
                multipliers[tight] = tight_multipliers
            point[free] = z
            point[basis] -= np.bincount(self.owner[free], weights=z, minlength=self.num_groups)
            gradient = gradient + z @ rows
        return point, gradient, multipliers


def _solution(matrix: Array, right: Array, ridge: float) -> Array:
    """matrix⁻¹ right, with `ridge` on the diagonal where the matrix is singular."""
    try:
        solution = np.linalg.solve(matrix, right)
    except np.linalg.LinAlgError:
        solution = np.full_like(right, np.nan)
    if np.isfinite(solution).all():
        return np.asarray(solution, dtype=np.float64)
    return np.asarray(np.linalg.solve(matrix + ridge * np.eye(len(matrix)), right), dtype=np.float64)
