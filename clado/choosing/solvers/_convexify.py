"""The minimised function in other words: convex, and equal to the program's own at its 0/1 points. NumPy.

At 0/1 points x_k² = x_k, and two choices of one group are never taken together, so the diagonal (paid for in the linear term)
and the entries between choices of one group are free. Quadratic convex reformulation (QCR: Billionnet, Elloumi, Plateau 2009)
picks them so that the continuous minimum is highest; the best ones are the multipliers of a semidefinite relaxation, which the
boundary-point method (Povh, Rendl, Wiegele 2006; Wen, Goldfarb, Yin 2010) finds with eigendecompositions alone. Any multipliers
are valid, for any bounds: stopping early costs tightness, never correctness.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from clado.choosing.program import Choices, Program
from clado.interaction.matrix import Array

SAFETY = 1e-9
"""Least eigenvalue left, relative to the largest, so that rounding cannot make a bound too high."""


@dataclass(frozen=True, eq=False)
class Form:
    """constant + linear·x + ½ xᵀ hessian x over all n choices; the rows of each group's widest choice are zero (eliminated by Σ
    = 1).
    """

    constant: float
    linear: Array
    hessian: Array
    free: Choices

    def mixed(self, other: "Form", share: float) -> "Form":
        """(1 − share) of this and `share` of the other: equal at 0/1 points when both are, and convex when both are."""
        return Form(
            self.constant,
            (1 - share) * self.linear + share * other.linear,
            (1 - share) * self.hessian + share * other.hessian,
            self.free,
        )


def reduced(program: Program) -> Form:
    """The program's function with the widest choice of each group eliminated; as convex as Q is."""
    q, wide = program.quadratic, program.widest
    eliminated = wide[program.owner]
    difference = q - q[eliminated]
    hessian = difference - difference[:, eliminated]
    free = np.setdiff1d(np.arange(program.num_choices), wide)
    return Form(program.minimised(wide), difference[:, wide].sum(axis=1), (hessian + hessian.T) / 2, free)


def least_eigenvalue(form: Form) -> tuple[float, float]:
    """Least and largest absolute eigenvalue over the free choices; (0, 0) when none is free."""
    if not len(form.free):
        return 0.0, 0.0
    eigenvalues = np.linalg.eigvalsh(form.hessian[np.ix_(form.free, form.free)])
    return float(eigenvalues[0]), float(np.abs(eigenvalues).max())


def shifted(form: Form) -> Form:
    """Convex by the least uniform shift of the diagonal, with the safety margin."""
    least, largest = least_eigenvalue(form)
    shift = max(0.0, SAFETY * largest - least)
    hessian, linear = form.hessian.copy(), form.linear.copy()
    hessian[form.free, form.free] += shift
    linear[form.free] -= shift / 2
    return Form(form.constant, linear, hessian, form.free)


def nearest(program: Program, form: Form, steps: int = 40) -> Form:
    """Convex with the least change of the free entries: Dykstra's alternating projections between the positive semidefinite
    matrices and those that keep every entry between groups.

    Measured in units of the diagonal, so that a wide bit-width, whose entries are small, is not charged the noise of a narrow
    one. A convex form comes back as it is. Not tight at the root, but curved, which is what branching feeds on.
    """
    free = form.free
    hessian = form.hessian[np.ix_(free, free)]
    if not len(free) or float(np.linalg.eigvalsh(hessian)[0]) >= 0:
        return shifted(form)
    same = program.owner[free][:, None] == program.owner[free][None, :]
    diagonal = np.diag(hessian)
    scale = np.sqrt(np.maximum(diagonal, 1e-6 * max(float(np.abs(hessian).max()), 1e-300)))
    kept = hessian / scale / scale[:, None]
    matrix, correction = kept.copy(), np.zeros_like(kept)
    largest = float(np.abs(np.linalg.eigvalsh(kept)).max())
    for _ in range(steps):
        eigenvalues, vectors = np.linalg.eigh(matrix + correction)
        if eigenvalues[0] >= -1e-6 * largest:
            break
        below = eigenvalues < 0
        excess = (vectors[:, below] * eigenvalues[below]) @ vectors[:, below].T
        projected = matrix + correction - excess
        correction = excess
        matrix = np.where(same, projected, kept)
    eigenvalues = np.linalg.eigvalsh(matrix)
    matrix[np.diag_indices(len(free))] += max(0.0, SAFETY * float(eigenvalues[-1]) - float(eigenvalues[0]))
    changed = form.hessian.copy()
    changed[np.ix_(free, free)] = np.where(same, matrix * scale * scale[:, None], hessian)
    linear = form.linear.copy()
    linear[free] -= (np.diag(changed)[free] - diagonal) / 2
    return shifted(Form(form.constant, linear, changed, free))


class Relaxation:
    """min ⟨C, X⟩ over X = [1 xᵀ; x X] ⪰ 0 with X_kk = x_k, X_kl = 0 within a group, and A x + s = limits, s ≥ 0; by boundary
    points.
    """

    OVER_RELAXATION, ADAPTATION = 1.6, 1.2

    def __init__(self, program: Program, form: Form) -> None:
        self.source = form
        free = form.free
        n = len(free)
        owner = program.owner[free]
        self.pairs: tuple[NDArray[np.intp], NDArray[np.intp]] = _pairs_within(owner)
        limited = np.isfinite(program.limits)
        wide = program.costs[limited][:, program.widest]
        costs = program.costs[limited][:, free] - wide[:, owner]
        room = program.limits[limited] - wide.sum(axis=1)
        length = np.maximum(np.linalg.norm(costs, axis=1), 1e-300)
        self.costs, self.room = costs / length[:, None], room / length
        c = np.zeros((n + 1, n + 1))
        c[0, 1:] = c[1:, 0] = form.linear[free] / 2
        c[1:, 1:] = form.hessian[np.ix_(free, free)] / 2
        self.scale = max(float(np.linalg.norm(c)), 1e-300)
        self.c = c / self.scale
        self.x = np.zeros_like(c)
        self.z = np.zeros_like(c)
        self.slack, self.slack_dual = np.zeros(len(room)), np.zeros(len(room))
        self.diagonal = np.zeros(n)
        self.within = np.zeros(len(self.pairs[0]))
        self.penalty = 2.5 / program.num_groups  # about |Z| / |X| of the answer
        self.inverse = np.linalg.inv(self.costs @ self.costs.T / 3 + np.eye(len(room)))

    def _apply(self, x: Array, slack: Array) -> tuple[float, Array, Array, Array]:
        """Left sides of the equations: corner, diagonal, within groups (scaled to unit norm), knapsacks."""
        return (
            float(x[0, 0]),
            np.diag(x)[1:] - x[0, 1:],
            np.sqrt(2) * x[self.pairs[0] + 1, self.pairs[1] + 1],
            self.costs @ x[0, 1:] + slack,
        )

    def _adjoint(self, corner: float, diagonal: Array, within: Array, knapsack: Array) -> Array:
        """Σ multiplier · equation as a matrix."""
        n = len(diagonal)
        a = np.zeros((n + 1, n + 1))
        a[0, 0] = corner
        a[np.arange(1, n + 1), np.arange(1, n + 1)] = diagonal
        a[0, 1:] = a[1:, 0] = (knapsack @ self.costs - diagonal) / 2
        rows, columns = self.pairs
        a[rows + 1, columns + 1] = a[columns + 1, rows + 1] = within / np.sqrt(2)
        return a

    def run(self, steps: int) -> None:
        """Boundary-point steps; the penalty follows the ratio of the residuals."""
        for step in range(1, steps + 1):
            x, z, penalty = self.x, self.z, self.penalty
            corner, diagonal, within, knapsack = self._apply(penalty * x + z - self.c, penalty * self.slack + self.slack_dual)
            corner, diagonal, within, knapsack = penalty - corner, -diagonal, -within, penalty * self.room - knapsack
            knapsack = self.inverse @ (knapsack + self.costs @ diagonal / 3)
            diagonal = (diagonal + knapsack @ self.costs / 2) / 1.5
            self.diagonal, self.within = diagonal, within
            v = self.c - self._adjoint(corner, diagonal, within, knapsack) - penalty * x
            eigenvalues, vectors = np.linalg.eigh(v)
            positive = eigenvalues > 0
            if positive.sum() * 2 > len(eigenvalues):
                kept = vectors[:, ~positive]
                negative = (kept * -eigenvalues[~positive]) @ kept.T
                new_z = v + negative
            else:
                kept = vectors[:, positive]
                new_z = (kept * eigenvalues[positive]) @ kept.T
                negative = new_z - v
            v_slack = -knapsack - penalty * self.slack
            new_x, new_slack = negative / penalty, np.maximum(-v_slack, 0) / penalty
            dual_residual = float(np.linalg.norm(penalty * (new_x - x)))
            rho = self.OVER_RELAXATION
            self.x, self.slack = (1 - rho) * x + rho * new_x, (1 - rho) * self.slack + rho * new_slack
            self.z, self.slack_dual = new_z, np.maximum(v_slack, 0)
            if step % 10 == 0:
                one, d, w, k = self._apply(self.x, self.slack)
                primal = np.sqrt((one - 1) ** 2 + d @ d + w @ w + ((k - self.room) ** 2).sum()) / max(
                    float(np.linalg.norm(self.x)), 1e-300
                )
                dual = dual_residual / max(float(np.linalg.norm(self.z)), 1e-300)
                if primal > 2 * dual:
                    self.penalty *= self.ADAPTATION
                elif dual > 2 * primal:
                    self.penalty /= self.ADAPTATION

    def form(self) -> Form:
        """The function with the multipliers so far; not yet convex to the last digit."""
        hessian, linear = self.source.hessian.copy(), self.source.linear.copy()
        free = self.source.free
        hessian[free, free] -= 2 * self.scale * self.diagonal
        linear[free] += self.scale * self.diagonal
        rows, columns = free[self.pairs[0]], free[self.pairs[1]]
        hessian[rows, columns] -= np.sqrt(2) * self.scale * self.within
        hessian[columns, rows] -= np.sqrt(2) * self.scale * self.within
        return Form(self.source.constant, linear, hessian, free)


def _pairs_within(owner: Choices) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Row and column of each pair of free choices of one group."""
    pairs = [pair for group in np.unique(owner) for pair in combinations(np.flatnonzero(owner == group).tolist(), 2)]
    both = np.array(pairs, dtype=np.intp).reshape(-1, 2)
    return both[:, 0], both[:, 1]
