"""Good assignments by descent: one-group and two-group moves, repair, multipliers and kicks. NumPy; limited by rounds; a
deadline only skips kicks.
"""

import time

import numpy as np
from numpy.typing import NDArray

from clado.choosing.program import Choices, Program
from clado.interaction.matrix import Array

BISECTIONS = 24
POLISHED = 4
KICKS = 24
KICKED_GROUPS = 4
SEED = 0


class Descent:
    """Local search over the choices of a program: single moves (n) and pair moves (n, n), all priced at once.

    Forbidden pairs cost a penalty that no gain can outweigh, so that every move set stays simple.
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
        """Change of the value for moving one group to choice k: (n,), zero where k is taken."""
        taken = choices[self.owner]
        row = self.q[:, choices].sum(axis=1)
        change: Array = row - row[taken] + self.half_diagonal + self.half_diagonal[taken] - self.q[np.arange(len(taken)), taken]
        return change if linear is None else change + linear - linear[taken]

    def settle(self, choices: Choices, linear: Array) -> Choices:
        """Best single moves on value + linear·x, constraints left aside, until none is left."""
        choices = choices.copy()
        for _ in range(20 * len(choices)):
            change = self.single(choices, linear)
            k = int(change.argmin())
            if change[k] >= -1e-12 * self.scale:
                break
            choices[self.owner[k]] = k
        return choices

    def repair(self, choices: Choices) -> Choices | None:
        """Moves groups at the least cost per excess removed until every limit holds; None when no single move helps."""
        choices = choices.copy()
        for _ in range(20 * len(choices) + 100):
            excess = self.costs[:, choices].sum(axis=1) - self.limits
            if np.all(excess <= 0):
                return choices
            after = excess[:, None] + self.costs - self.costs[:, choices[self.owner]]
            removed = ((np.maximum(excess, 0)[:, None] - np.maximum(after, 0)) / self.unit[:, None]).sum(axis=0)
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
        """Best single or pair move within the limits until none is left; `choices` must be within them."""
        choices = choices.copy()
        taken = choices[self.owner]
        crossed = self.q - self.q[:, taken] - self.q[taken, :] + self.q[np.ix_(taken, taken)]
        crossed[self.same_group] = np.inf
        for _ in range(50 * len(choices)):
            single = self.single(choices)
            room = self.limits - self.costs[:, choices].sum(axis=1)
            step = self.costs - self.costs[:, choices[self.owner]]
            allowed: NDArray[np.bool_] = (step <= room[:, None]).all(axis=0)
            alone = np.where(allowed, single, np.inf)
            k = int(alone.argmin())
            moved = [k]
            gain = alone[k]
            if gain >= -1e-12 * self.scale:
                pair = crossed + single[:, None] + single[None, :]
                for c in range(len(room)):
                    pair[step[c][:, None] + step[c][None, :] > room[c]] = np.inf
                best = int(pair.argmin())
                gain = pair.flat[best]
                if gain >= -1e-12 * self.scale:
                    break
                moved = list(divmod(best, len(single)))
            for k in moved:
                group = int(self.owner[k])
                choices[group] = k
                self._refresh(crossed, choices, group)
        return choices

    def _refresh(self, crossed: Array, choices: Choices, group: int) -> None:
        """Prices pair moves of one group anew after it moved."""
        rows = slice(int(self.program.starts[group]), int(self.program.starts[group + 1]))
        taken = choices[self.owner]
        block = self.q[rows] - self.q[rows][:, taken] - self.q[choices[group]][None, :] + self.q[choices[group], taken][None, :]
        block[:, rows] = np.inf
        crossed[rows] = block
        crossed[:, rows] = block.T

    def improved(self, choices: Choices) -> Choices | None:
        """Repair, then descent; None when the choices cannot be repaired."""
        repaired = self.repair(choices)
        return None if repaired is None else self.descend(repaired)


def start(program: Program, starts: tuple[Choices, ...] = (), deadline: float = np.inf, kicks: int = KICKS) -> Choices | None:
    """The best choices of multipliers, given starts and kicks, or None when none meets the constraints. Deterministic."""
    descent = Descent(program)
    seeds = [*starts, *_by_multipliers(descent), program.widest, program.narrowest]
    repaired = [fixed for fixed in (descent.repair(seed) for seed in seeds) if fixed is not None]
    distinct = list({tuple(choices.tolist()): choices for choices in repaired}.values())
    given = len(starts)
    ranked = distinct[:given] + sorted(distinct[given:], key=descent.value)[:POLISHED]
    found = [descent.descend(choices) for choices in ranked]
    found = [choices for choices in found if program.is_feasible(choices)]
    if not found:
        return _searched(descent, distinct)
    best = min(found, key=descent.value)
    rng = np.random.default_rng(SEED)
    free = np.flatnonzero(np.diff(program.starts) > 1)
    for _ in range(min(kicks, len(free) // 2)):  # a small program is proven sooner than it is kicked
        if time.perf_counter() > deadline:
            break
        kicked = best.copy()
        for group in rng.choice(free, size=min(KICKED_GROUPS, len(free)), replace=False):
            kicked[group] = rng.integers(program.starts[group], program.starts[group + 1])
        settled = descent.improved(kicked)
        if settled is not None and descent.value(settled) < descent.value(best) and program.is_feasible(settled):
            best = settled
    return best


def _by_multipliers(descent: Descent) -> list[Choices]:
    """Choices that minimise value + multiplier · cost, for multipliers that close in on the limits (one multiplier for all of
    them).
    """
    program = descent.program
    if not len(descent.limits):
        return [descent.settle(program.widest, np.zeros(program.num_choices))]
    weighted = (descent.costs / descent.unit[:, None]).sum(axis=0)
    low, high = 0.0, 1.0
    found: list[Choices] = []
    worth = program.num_groups * descent.scale
    for _ in range(BISECTIONS):
        multiplier = (low + high) / 2
        # The scale of multipliers is unknown: m / (1 - m) walks through all of them.
        choices = descent.settle(
            program.widest if len(found) % 2 else program.narrowest, worth * multiplier / (1 - multiplier) * weighted
        )
        found.append(choices)
        if descent.violation(choices) > 0:
            low = multiplier
        else:
            high = multiplier
    return found


def _searched(descent: Descent, seeds: list[Choices]) -> Choices | None:
    """A last try to meet several constraints and forbidden pairs: kicks from what came closest."""
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
    """Choices that the raw matrix prefers to the widest bits everywhere when nothing limits it; None when descent finds none."""
    free = program.unlimited()
    descent = Descent(free)
    settled = descent.descend(free.widest)
    gain = descent.value(free.widest) - descent.value(settled)
    return settled if gain > 1e-9 * descent.scale else None
