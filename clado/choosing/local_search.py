"""Local search on the measured loss, around the best measured assignment. NumPy only.

A *move* gives one group of layers another candidate, or two groups at once, such as one narrower and one wider. It keeps every
limit. Moves are ranked by the change of the surrogate, ½ xᵀ Q x of a program, and the best ones are measured in batches. The
search is best-first: it continues from the assignment with the smallest measured loss that has moves left. So it first descends
to a local optimum, and then tries its surroundings. With enough evaluations it measures everything that moves can reach.

The next measurements depend only on earlier ones. Any number of workers gives the same answer.
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
"""Yields assignments to measure, receives their losses, and returns a result."""


@dataclass(frozen=True)
class Searched:
    """The result of a search."""

    start: Assignment
    """The assignment with the smallest loss before the search."""
    start_loss: float
    """Its measured loss."""
    best: Assignment
    """The assignment with the smallest loss after the search."""
    best_loss: float
    """Its measured loss."""
    tried: Mapping[Assignment, float]
    """The measured loss of each assignment that the search asked for, in this order."""

    @property
    def gain(self) -> float:
        """The measured loss of the start minus that of the best; never negative."""
        return self.start_loss - self.best_loss


def moves(program: Program, choices: Choices) -> Iterator[Choices]:
    """Every feasible assignment one or two groups away, in ascending order of the surrogate.

    Assignments with equal surrogates are in the order of their choice numbers.
    """
    change, single = _changes(program, choices)
    room = program.limits - program.costs[:, choices].sum(axis=1)
    step = program.costs - program.costs[:, choices[program.owner]]
    fits = (step <= room[:, None]).all(axis=0)
    fits_both = np.ones(change.shape, dtype=bool)
    for k, slack in enumerate(room):
        fits_both &= step[k][:, None] + step[k][None, :] <= slack
    owner, n = program.owner, program.num_choices
    is_move = np.ones(n, dtype=bool)
    is_move[choices] = False
    fits &= is_move
    fits_both &= is_move[:, None] & is_move[None, :] & (owner[:, None] < owner[None, :])
    singles, pairs = np.flatnonzero(fits), np.argwhere(fits_both)
    cost = np.concatenate([single[singles], change[fits_both]])
    for place in np.argsort(cost, kind="stable"):
        moved = singles[place : place + 1] if place < len(singles) else pairs[place - len(singles)]
        neighbour = choices.copy()
        neighbour[owner[moved]] = moved
        if program.is_feasible(neighbour):  # checks sums of fractions exactly, and forbidden pairs
            yield neighbour


def _changes(program: Program, choices: Choices) -> tuple[Array, Array]:
    """Change of ½ xᵀ Q x for two moves, to choices k and m of two groups (n, n), and for one move to k (n,)."""
    q, present = program.quadratic, choices[program.owner]
    row, half = q[:, choices].sum(axis=1), 0.5 * np.diag(q)
    single: Array = row - row[present] + half + half[present] - q[np.arange(len(present)), present]
    cross = q - q[:, present] - q[present, :] + q[np.ix_(present, present)]
    return cross + single[:, None] + single[None, :], single


def settle(program: Program, choices: Choices) -> Choices:
    """Takes the best move on the surrogate until none lowers it: a local optimum near the choices."""
    scale = 1e-12 * max(1e-300, float(np.abs(program.quadratic).max()))
    value = program.minimised(choices)
    while (move := next(moves(program, choices), None)) is not None and (lower := program.minimised(move)) < value - scale:
        choices, value = move, lower
    return choices


def search(program: Program, losses: Mapping[Assignment, float], evaluations: int, batch: int) -> Search:
    """A search from the best measured assignment. Its moves keep the corrections of this assignment.

    Args:
        program: Its minimised function is the surrogate, and its limits hold for every move.
        losses: Measured losses before the search.
        evaluations: Most assignments that the search asks for.
        batch: Most assignments that it asks for at a time.

    Raises:
        ConfigurationError: The program offers and allows none of the measured assignments.
    """
    feasible: dict[Assignment, Choices] = {}
    for assignment in losses:
        try:
            choices = program.choices(assignment)
        except ConfigurationError:
            continue  # it has an excluded candidate
        if program.is_feasible(choices):
            feasible[assignment] = choices
    if not feasible:
        raise ConfigurationError("a local search must start from a measured assignment that meets every limit; there is none")
    start = min(feasible, key=lambda a: ordered(losses[a]))
    tried: dict[Assignment, float] = {}
    # assignments with moves left: their loss and these moves
    sources: dict[Assignment, tuple[float, Iterator[Choices]]] = {
        start: (ordered(losses[start]), moves(program, feasible[start]))
    }
    while len(tried) < evaluations and sources:
        requests: dict[Assignment, Choices] = {}
        source = min(sources, key=lambda a: sources[a][0])  # of equal losses the first measured one
        for choices in sources[source][1]:
            assignment = program.assignment(choices).with_corrections(start.corrected)
            if assignment not in tried and assignment not in losses:
                requests[assignment] = choices
                if len(requests) == min(batch, evaluations - len(tried)):
                    break
        else:
            del sources[source]
        if requests:
            answers = yield list(requests)
            for assignment, choices in requests.items():
                tried[assignment] = answers[assignment]
                sources[assignment] = ordered(answers[assignment]), moves(program, choices)
    every = {start: losses[start], **tried}
    best = min(every, key=lambda a: ordered(every[a]))
    return Searched(start, losses[start], best, every[best], tried)


def local_search(
    searches: Mapping[Key, Search], measure_losses: Callable[[Sequence[Assignment]], Mapping[Assignment, float]]
) -> dict[Key, Searched]:
    """Runs several searches at once. One call measures the requests of a round, each assignment once."""
    results: dict[Key, Searched] = {}
    losses: dict[Assignment, float] = {}
    requests: dict[Key, list[Assignment]] = {}
    while len(results) < len(searches):
        for key, running in searches.items():
            if key in results:
                continue
            try:
                answer = {a: losses[a] for a in requests[key]} if key in requests else None
                requests[key] = next(running) if answer is None else running.send(answer)
            except StopIteration as stop:
                results[key] = stop.value
                requests.pop(key, None)
        unmeasured = list(dict.fromkeys(a for batch in requests.values() for a in batch if a not in losses))
        if unmeasured:
            losses |= measure_losses(unmeasured)
    return results


def ordered(loss: float) -> float:
    """A loss as a key to sort by: NaN counts as infinity."""
    return math.inf if math.isnan(loss) else loss
