"""Local search on the true loss: around the best measured candidate, measure the moves that a surrogate likes best. NumPy only.

A *move* gives one group of layers another candidate, or two groups at once: one narrower and another wider, say, within every
limit. Moves are ranked by the change of the surrogate, ½ xᵀ Q x of a program, and measured in batches. The search is best-first:
it goes on from the assignment of least measured loss that has moves left, so it climbs down as long as it can, then looks around;
with enough evaluations it sees everything that moves can reach.

What is measured next depends on what was measured before and on nothing else: any number of workers finds the same answer.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from clado.choosing.program import Choices, Program
from clado.errors import ConfigurationError
from clado.interaction.matrix import Array
from clado.space import Assignment

Key = TypeVar("Key")
Search = Generator[list[Assignment], Mapping[Assignment, float], "Searched"]
"""Yields assignments to measure, is sent their losses, and returns what it found."""


@dataclass(frozen=True)
class Searched:
    """What a search found: `tried` maps each assignment that it asked for to its measured loss, in the order asked."""

    start: Assignment
    start_loss: float
    best: Assignment
    best_loss: float
    tried: Mapping[Assignment, float]

    @property
    def gain(self) -> float:
        """How far the measured loss of the best is below that of the start; never negative."""
        return self.start_loss - self.best_loss


def moves(program: Program, choices: Choices) -> Iterator[Choices]:
    """Every feasible assignment one or two groups away, the one of least surrogate first, ties by the numbers of the choices."""
    change, single = _changes(program, choices)
    room = program.limits - program.costs[:, choices].sum(axis=1)
    step = program.costs - program.costs[:, choices[program.owner]]
    fits = (step <= room[:, None]).all(axis=0)
    fits_both = np.ones(change.shape, dtype=bool)
    for k, left in enumerate(room):
        fits_both &= step[k][:, None] + step[k][None, :] <= left
    owner, n = program.owner, program.num_choices
    moved = np.ones(n, dtype=bool)
    moved[choices] = False
    fits &= moved
    fits_both &= moved[:, None] & moved[None, :] & (owner[:, None] < owner[None, :])
    alone, both = np.flatnonzero(fits), np.argwhere(fits_both)
    targets = [(int(k),) for k in alone] + [(int(k), int(m)) for k, m in both]
    cost = np.concatenate([single[alone], change[fits_both]])
    for place in np.argsort(cost, kind="stable"):
        after = choices.copy()
        for k in targets[place]:
            after[owner[k]] = k
        if program.is_feasible(after):  # sums of fractions, and forbidden pairs
            yield after


def _changes(program: Program, choices: Choices) -> tuple[Array, Array]:
    """Change of ½ xᵀ Q x for moving to choices k and m (n, n), of two groups, and to k alone (n,)."""
    q, taken = program.quadratic, choices[program.owner]
    row, half = q[:, choices].sum(axis=1), 0.5 * np.diag(q)
    single: Array = row - row[taken] + half + half[taken] - q[np.arange(len(taken)), taken]
    crossed = q - q[:, taken] - q[taken, :] + q[np.ix_(taken, taken)]
    return crossed + single[:, None] + single[None, :], single


def settle(program: Program, choices: Choices) -> Choices:
    """The best move on the surrogate, again and again, until none lowers it: a local optimum near the given choices."""
    scale = 1e-12 * max(1e-300, float(np.abs(program.quadratic).max()))
    value = program.minimised(choices)
    while (after := next(moves(program, choices), None)) is not None and (lower := program.minimised(after)) < value - scale:
        choices, value = after, lower
    return choices


def search(program: Program, losses: Mapping[Assignment, float], evaluations: int, batch: int) -> Search:
    """A search from the best of `losses`, which are measured already; asks for `evaluations` more at most, `batch` at a time.

    The surrogate is the function that `program` minimises. Moves keep the corrections of what the search starts from. Raises
    ConfigurationError where none of the measured assignments is one that the program offers and allows.
    """
    feasible: dict[Assignment, Choices] = {}
    for assignment in losses:
        try:
            choices = program.choices(assignment)
        except ConfigurationError:
            continue  # it takes a candidate that is excluded
        if program.is_feasible(choices):
            feasible[assignment] = choices
    if not feasible:
        raise ConfigurationError("a local search needs a measured assignment that meets every limit to start from; there is none")
    start = min(feasible, key=lambda a: ordered(losses[a]))
    tried: dict[Assignment, float] = {}
    # assignments that moves are taken from: loss and the moves left
    open_: dict[Assignment, tuple[float, Iterator[Choices]]] = {start: (ordered(losses[start]), moves(program, feasible[start]))}
    while len(tried) < evaluations and open_:
        asked: dict[Assignment, Choices] = {}
        source = min(open_, key=lambda a: open_[a][0])  # of equal ones the first measured
        for choices in open_[source][1]:
            assignment = program.assignment(choices).with_corrections(start.corrected)
            if assignment not in tried and assignment not in losses:
                asked[assignment] = choices
                if len(asked) == min(batch, evaluations - len(tried)):
                    break
        else:
            del open_[source]
        if asked:
            found = yield list(asked)
            for assignment, choices in asked.items():
                tried[assignment] = found[assignment]
                open_[assignment] = ordered(found[assignment]), moves(program, choices)
    every = {start: losses[start], **tried}
    best = min(every, key=lambda a: ordered(every[a]))
    return Searched(start, losses[start], best, every[best], tried)


def local_search(
    searches: Mapping[Key, Search], measure_losses: Callable[[Sequence[Assignment]], Mapping[Assignment, float]]
) -> dict[Key, Searched]:
    """Runs searches side by side: what all of them ask for in a round is measured in one call, each assignment once."""
    found: dict[Key, Searched] = {}
    sent: dict[Assignment, float] = {}
    asked: dict[Key, list[Assignment]] = {}
    while len(found) < len(searches):
        for key, running in searches.items():
            if key in found:
                continue
            try:
                answer = {a: sent[a] for a in asked[key]} if key in asked else None
                asked[key] = next(running) if answer is None else running.send(answer)
            except StopIteration as stop:
                found[key] = stop.value
                asked.pop(key, None)
        wanted = list(dict.fromkeys(a for batch in asked.values() for a in batch if a not in sent))
        if wanted:
            sent |= measure_losses(wanted)
    return found


def ordered(loss: float) -> float:
    """A loss to sort by: NaN is as bad as infinity."""
    return math.inf if math.isnan(loss) else loss
