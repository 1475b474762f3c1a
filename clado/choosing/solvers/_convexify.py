"""Convex forms of the minimised function, equal to it at the program's 0/1 points. NumPy.

At 0/1 points x_k² = x_k, and two choices of one group are never taken together. The diagonal (with a change of the linear term)
and the entries between choices of one group are therefore free. Quadratic convex reformulation (QCR: Billionnet, Elloumi, Plateau
2009) sets them so that the continuous minimum is highest. The best values are the multipliers of a semidefinite relaxation, which
the boundary-point method (Povh, Rendl, Wiegele 2006; Wen, Goldfarb, Yin 2010) finds with eigendecompositions only. Any
multipliers are valid, for any bounds. An early stop gives a looser form, and never a wrong one.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from clado.choosing.program import Choices, Program
from clado.interaction.matrix import Array

SAFETY = 1e-9
"""Least allowed eigenvalue of a form, relative to the largest. It keeps rounding from making a bound too high."""


@dataclass(frozen=True, eq=False)
class Form:
    """The function constant + linear·x + ½ xᵀ hessian x over all n choices."""

    constant: float
    """The value with the widest choice of each group."""
    linear: Array
    """The linear term, (n,)."""
    hessian: Array
    """The quadratic term, (n, n). Rows of each group's widest choice are zero: Σ = 1 eliminates it."""
    free: Choices
    """The choices that are not eliminated."""

    def mixed(self, other: "Form", share: float) -> "Form":
        """(1 − share) of this form plus `share` of the other. It is convex, and equal at 0/1 points, where both are."""
        return Form(
            self.constant,
            (1 - share) * self.linear + share * other.linear,
            (1 - share) * self.hessian + share * other.hessian,
            self.free,
        )


def reduced(program: Program) -> Form:
    """The program's function with the widest choice of each group eliminated. It is as convex as Q."""
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
    """The convex form with the least change of the free entries.

    Dykstra's method projects in turn onto the positive semidefinite matrices and onto the matrices with the original entries
    between groups. Changes are measured in units of the diagonal: entries of a wide bit-width are small, and the noise of a
    narrow one would cover them. A convex form is only shifted. The result is loose at the root but curved, so that branching
    raises its bounds.
    """
    free = form.free
    hessian = form.hessian[np.ix_(free, free)]
    if not len(free) or float(np.linalg.eigvalsh(hessian)[0]) >= 0:
        return shifted(form)
    same_group = program.owner[free][:, None] == program.owner[free][None, :]
    diagonal = np.diag(hessian)
    scale = np.sqrt(np.maximum(diagonal, 1e-6 * max(float(np.abs(hessian).max()), 1e-300)))
    scaled = hessian / scale / scale[:, None]
    matrix, correction = scaled.copy(), np.zeros_like(scaled)
    largest = float(np.abs(np.linalg.eigvalsh(scaled)).max())
    for _ in range(steps):
        eigenvalues, vectors = np.linalg.eigh(matrix + correction)
        if eigenvalues[0] >= -1e-6 * largest:
            break
        negative = eigenvalues < 0
        excess = (vectors[:, negative] * eigenvalues[negative]) @ vectors[:, negative].T
        projected = matrix + correction - excess
        correction = excess
        matrix = np.where(same_group, projected, scaled)
    eigenvalues = np.linalg.eigvalsh(matrix)
    matrix[np.diag_indices(len(free))] += max(0.0, SAFETY * float(eigenvalues[-1]) - float(eigenvalues[0]))
    convex = form.hessian.copy()
    convex[np.ix_(free, free)] = np.where(same_group, matrix * scale * scale[:, None], hessian)
    linear = form.linear.copy()
    linear[free] -= (np.diag(convex)[free] - diagonal) / 2
    return shifted(Form(form.constant, linear, convex, free))


class Relaxation:
    """The semidefinite relaxation of a program, solved by the boundary-point method.

    min ⟨C, X⟩ over X = [1 xᵀ; x X] ⪰ 0 with X_kk = x_k, X_kl = 0 within a group, and A x + s = limits, s ≥ 0.
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
        self.pair_multipliers = np.zeros(len(self.pairs[0]))
        self.penalty = 2.5 / program.num_groups  # about |Z| / |X| of the answer
        self.inverse = np.linalg.inv(self.costs @ self.costs.T / 3 + np.eye(len(room)))

    def _apply(self, x: Array, slack: Array) -> tuple[float, Array, Array, Array]:
        """Left sides of the equations: corner, diagonal, pairs within groups (scaled to unit norm), knapsacks."""
        return (
            float(x[0, 0]),
            np.diag(x)[1:] - x[0, 1:],
            np.sqrt(2) * x[self.pairs[0] + 1, self.pairs[1] + 1],
            self.costs @ x[0, 1:] + slack,
        )

    def _adjoint(self, corner: float, diagonal: Array, pairs: Array, knapsack: Array) -> Array:
        """Σ multiplier · equation as a matrix."""
        n = len(diagonal)
        a = np.zeros((n + 1, n + 1))
        a[0, 0] = corner
        a[np.arange(1, n + 1), np.arange(1, n + 1)] = diagonal
        a[0, 1:] = a[1:, 0] = (knapsack @ self.costs - diagonal) / 2
        rows, columns = self.pairs
        a[rows + 1, columns + 1] = a[columns + 1, rows + 1] = pairs / np.sqrt(2)
        return a

    def run(self, steps: int) -> None:
        """Boundary-point steps; the penalty follows the ratio of the residuals."""
        for step in range(1, steps + 1):
            x, z, penalty = self.x, self.z, self.penalty
            corner, diagonal, pairs, knapsack = self._apply(penalty * x + z - self.c, penalty * self.slack + self.slack_dual)
            corner, diagonal, pairs, knapsack = penalty - corner, -diagonal, -pairs, penalty * self.room - knapsack
            knapsack = self.inverse @ (knapsack + self.costs @ diagonal / 3)
            diagonal = (diagonal + knapsack @ self.costs / 2) / 1.5
            self.diagonal, self.pair_multipliers = diagonal, pairs
            v = self.c - self._adjoint(corner, diagonal, pairs, knapsack) - penalty * x
            eigenvalues, vectors = np.linalg.eigh(v)
            positive = eigenvalues > 0
            if positive.sum() * 2 > len(eigenvalues):
                basis = vectors[:, ~positive]
                negative = (basis * -eigenvalues[~positive]) @ basis.T
                new_z = v + negative
            else:
                basis = vectors[:, positive]
                new_z = (basis * eigenvalues[positive]) @ basis.T
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
        """The form of the present multipliers. It is convex up to the precision of the relaxation."""
        hessian, linear = self.source.hessian.copy(), self.source.linear.copy()
        free = self.source.free
        hessian[free, free] -= 2 * self.scale * self.diagonal
        linear[free] += self.scale * self.diagonal
        rows, columns = free[self.pairs[0]], free[self.pairs[1]]
        hessian[rows, columns] -= np.sqrt(2) * self.scale * self.pair_multipliers
        hessian[columns, rows] -= np.sqrt(2) * self.scale * self.pair_multipliers
        return Form(self.source.constant, linear, hessian, free)


def _pairs_within(owner: Choices) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Row and column of each pair of free choices of one group."""
    pairs = [pair for group in np.unique(owner) for pair in combinations(np.flatnonzero(owner == group).tolist(), 2)]
    array = np.array(pairs, dtype=np.intp).reshape(-1, 2)
    return array[:, 0], array[:, 1]
