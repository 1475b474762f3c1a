"""Good assignments by descent: moves of one or two groups, repair, multipliers and kicks. NumPy.

Rounds limit the work. A deadline only skips kicks.
"""

import time

import numpy as np
from numpy.typing import NDArray

from clado.choosing.program import Choices, Program
from clado.interaction.matrix import Array

BISECTIONS = 24  # multipliers
POLISHED = 4  # best starts of multipliers that are descended from
KICKS = 24
KICKED_GROUPS = 4
SEED = 0


class Descent:
    """Local search over the choices of a program. All single moves (n,) and pair moves (n, n) are priced at once.

    A forbidden pair costs a penalty that no gain outweighs.
    """

    def __init__(self, program: Program, quadratic: Array | None = None) -> None:
        self.program = program
        self.q = np.array(program.quadratic if quadratic is None else quadratic)
        self.scale = max(float(np.abs(self.q).max(initial=0.0)), np.finfo(float).tiny)
        if program.forbidden:
            penalty = 4.0 * float(np.abs(self.q).sum()) + self.scale
            for a, b in program.forbidden:
                self.q[a, b] += penalty
                self.q[b, a] += penalty
        self.owner = program.owner
        self.same_group = self.owner[:, None] == self.owner[None, :]
        self.half_diagonal = 0.5 * np.diag(self.q)
        self.costs, self.limits = program.costs, program.limits
        spread = np.array([np.subtract(*program.reachable(c)[::-1]) for c in range(len(self.limits))])
        self.unit = np.where(spread > 0, spread, 1.0)

    def value(self, choices: Choices) -> float:
        """½ xᵀ Q x, penalties included."""
        return 0.5 * float(self.q[np.ix_(choices, choices)].sum())

    def violation(self, choices: Choices) -> float:
        """Total excess over the limits, each in units of its range."""
        excess = self.costs[:, choices].sum(axis=1) - self.limits
        return float((np.maximum(excess, 0.0) / self.unit).sum())

    def single(self, choices: Choices, linear: Array | None = None) -> Array:
        """Change of the value where one group moves to choice k: (n,), zero where it already has k."""
        present = choices[self.owner]
        row = self.q[:, choices].sum(axis=1)
        half, pairs = self.half_diagonal, self.q[np.arange(len(present)), present]
        change: Array = row - row[present] + half + half[present] - pairs
        return change if linear is None else change + linear - linear[present]

    def settle(self, choices: Choices, linear: Array) -> Choices:
        """Best single moves on value + linear·x without constraints, until none lowers it."""
        choices = choices.copy()
        for _ in range(20 * len(choices)):
            change = self.single(choices, linear)
            k = int(change.argmin())
            if change[k] >= -1e-12 * self.scale:
                break
            choices[self.owner[k]] = k
        return choices

    def repair(self, choices: Choices) -> Choices | None:
        """Moves groups at the least cost per removed excess until every limit holds. None if no single move helps."""
        choices = choices.copy()
        for _ in range(20 * len(choices) + 100):
            excess = self.costs[:, choices].sum(axis=1) - self.limits
            if np.all(excess <= 0):
                return choices
            new_excess = excess[:, None] + self.costs - self.costs[:, choices[self.owner]]
            removed = ((np.maximum(excess, 0)[:, None] - np.maximum(new_excess, 0)) / self.unit[:, None]).sum(axis=0)
            useful = removed > 1e-15
            if not useful.any():
                return None
            change = self.single(choices)
            # Gains first, in proportion; then losses per excess removed.
            rate = np.where(change > 0, change / np.where(useful, removed, 1.0), change * removed)
            k = int(np.where(useful, rate, np.inf).argmin())
            choices[self.owner[k]] = k
        return None

    def descend(self, choices: Choices) -> Choices:
        """Best single or pair move within the limits until none lowers the value. `choices` must be within the limits."""
        choices = choices.copy()
        present = choices[self.owner]
        cross = self.q - self.q[:, present] - self.q[present, :] + self.q[np.ix_(present, present)]
        cross[self.same_group] = np.inf
        for _ in range(50 * len(choices)):
            single = self.single(choices)
            room = self.limits - self.costs[:, choices].sum(axis=1)
            step = self.costs - self.costs[:, choices[self.owner]]
            allowed: NDArray[np.bool_] = (step <= room[:, None]).all(axis=0)
            allowed_single = np.where(allowed, single, np.inf)
            targets = [int(allowed_single.argmin())]
            change = allowed_single[targets[0]]
            if change >= -1e-12 * self.scale:
                pair = cross + single[:, None] + single[None, :]
                for c in range(len(room)):
                    pair[step[c][:, None] + step[c][None, :] > room[c]] = np.inf
                best = int(pair.argmin())
                change = pair.flat[best]
                if change >= -1e-12 * self.scale:
                    break
                targets = list(divmod(best, len(single)))
            for k in targets:
                group = int(self.owner[k])
                choices[group] = k
                self._refresh(cross, choices, group)
        return choices

    def _refresh(self, cross: Array, choices: Choices, group: int) -> None:
        """Prices pair moves of one group again after it has moved."""
        rows, choice = slice(int(self.program.starts[group]), int(self.program.starts[group + 1])), choices[group]
        present = choices[self.owner]
        prices = self.q[rows] - self.q[rows][:, present] - self.q[choice][None, :] + self.q[choice, present][None, :]
        prices[:, rows] = np.inf
        cross[rows] = prices
        cross[:, rows] = prices.T

    def improved(self, choices: Choices) -> Choices | None:
        """Repair, then descent. None if the choices cannot be repaired."""
        repaired = self.repair(choices)
        return None if repaired is None else self.descend(repaired)


def start(program: Program, starts: tuple[Choices, ...] = (), deadline: float = np.inf, kicks: int = KICKS) -> Choices | None:
    """The best choices of `starts`, multipliers and kicks, or None if none meets the constraints. Deterministic."""
    descent = Descent(program)
    seeds = [*starts, *_by_multipliers(descent), program.widest, program.narrowest]
    repaired = [fixed for fixed in (descent.repair(seed) for seed in seeds) if fixed is not None]
    distinct = list({tuple(choices.tolist()): choices for choices in repaired}.values())
    ranked = distinct[: len(starts)] + sorted(distinct[len(starts) :], key=descent.value)[:POLISHED]
    optima = [descent.descend(choices) for choices in ranked]
    feasible = [choices for choices in optima if program.is_feasible(choices)]
    if not feasible:
        return _feasible(descent, distinct)
    best = min(feasible, key=descent.value)
    rng = np.random.default_rng(SEED)
    free_groups = np.flatnonzero(np.diff(program.starts) > 1)
    for _ in range(min(kicks, len(free_groups) // 2)):  # a proof of a small program takes less time than kicks
        if time.perf_counter() > deadline:
            break
        kicked = best.copy()
        for group in rng.choice(free_groups, size=min(KICKED_GROUPS, len(free_groups)), replace=False):
            kicked[group] = rng.integers(program.starts[group], program.starts[group + 1])
        settled = descent.improved(kicked)
        if settled is not None and descent.value(settled) < descent.value(best) and program.is_feasible(settled):
            best = settled
    return best


def _by_multipliers(descent: Descent) -> list[Choices]:
    """Choices that minimise value + multiplier · cost. One multiplier serves all limits, and is bisected towards them."""
    program = descent.program
    if not len(descent.limits):
        return [descent.settle(program.widest, np.zeros(program.num_choices))]
    weighted = (descent.costs / descent.unit[:, None]).sum(axis=0)
    low, high = 0.0, 1.0
    minimisers: list[Choices] = []
    worth = program.num_groups * descent.scale
    for _ in range(BISECTIONS):
        multiplier = (low + high) / 2
        # The scale of multipliers is unknown: m / (1 - m) reaches all of them.
        choices = descent.settle(
            program.widest if len(minimisers) % 2 else program.narrowest, worth * multiplier / (1 - multiplier) * weighted
        )
        minimisers.append(choices)
        if descent.violation(choices) > 0:
            low = multiplier
        else:
            high = multiplier
    return minimisers


def _feasible(descent: Descent, seeds: list[Choices]) -> Choices | None:
    """Choices that meet several constraints and forbidden pairs, by kicks from the closest choices; None if none is met."""
    rng = np.random.default_rng(SEED)
    program = descent.program
    current = min(seeds, key=descent.value) if seeds else program.narrowest
    for _ in range(200):
        kicked = current.copy()
        for group in rng.choice(program.num_groups, size=min(3, program.num_groups), replace=False):
            kicked[group] = rng.integers(program.starts[group], program.starts[group + 1])
        settled = descent.improved(kicked)
        if settled is not None:
            if program.is_feasible(settled):
                return settled
            if descent.value(settled) < descent.value(current) or descent.violation(current) > 0:
                current = settled
        elif descent.violation(kicked) < descent.violation(current):
            current = kicked
    return None


def better_than_widest(program: Program) -> Choices | None:
    """Choices that the raw matrix prefers to the widest bits everywhere, without limits. None if descent reaches none."""
    descent = Descent(program.unlimited())
    settled = descent.descend(program.widest)
    gain = descent.value(program.widest) - descent.value(settled)
    return settled if gain > 1e-9 * descent.scale else None
