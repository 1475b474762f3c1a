"""A race of convex forms. Only after some nodes is it known which form has the smallest tree. Does not use SCIP."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from clado.choosing.program import Choices, Program
from clado.choosing.solution import Status
from clado.choosing.solvers import Outcome, Task
from clado.choosing.solvers._convexify import Form
from clado.choosing.solvers._forms import Forms

HEAT_NODES, SEMIFINAL_NODES = 300, 2000
SearchForm = Callable[[Program, Form, Task, Choices | None], Outcome]
"""Searches one tree with a form, from initial choices."""


class Race:
    """Searches with one form after another. The incumbent, the bound and the nodes are those of all searches so far."""

    def __init__(self, program: Program, task: Task, search_form: SearchForm, initial: Choices | None) -> None:
        self.program, self.task, self.search_form = program, task, search_form
        self.best, self.bound, self.nodes = initial, -np.inf, 0
        self.scores: list[tuple[float, Form]] = []

    def run(self, forms: Forms) -> Outcome:
        """Gives each cheap form a few nodes, and the form with the highest bound some more.

        If that does not settle the program, the costly forms run as well. The best form then gets all remaining nodes. The
        first search that ends the solve ends the race.
        """
        forms.deadline = self.task.deadline
        heats: list[tuple[Callable[[], Form], int | None]] = [
            (lambda: forms.nearest, HEAT_NODES),
            (lambda: forms.half_quick, HEAT_NODES),
            (lambda: forms.quick, HEAT_NODES),
            (self._leader, SEMIFINAL_NODES),
            (lambda: forms.half_long, HEAT_NODES),
            (lambda: forms.long, HEAT_NODES),
            (self._leader, None),
        ]
        outcome = Outcome(Status.LIMIT, self.best, self.bound)
        try:
            for form, limit in heats:
                outcome = self._heat(form(), limit)
                if self._is_over(outcome):
                    break
        except KeyboardInterrupt:
            return Outcome(Status.INTERRUPTED, self.best, self.bound, self.nodes)
        return replace(outcome, bound=self.bound, nodes=self.nodes)

    def _heat(self, form: Form, limit: int | None) -> Outcome:
        """One search of at most `limit` nodes."""
        task = self.task
        node_limit = limit if task.node_limit is None else min(limit or task.node_limit, max(1, task.node_limit - self.nodes))
        outcome = self.search_form(self.program, form, replace(task, node_limit=node_limit), self.best)
        if limit == HEAT_NODES:  # only bounds after equally many nodes can be compared
            self.scores.append((outcome.bound, form))
        self.best, self.bound, self.nodes = outcome.choices, max(self.bound, outcome.bound), self.nodes + outcome.nodes
        return outcome

    def _is_over(self, outcome: Outcome) -> bool:
        """Whether a search has settled the program, or a limit of the task is reached."""
        task = self.task
        return (
            outcome.status is not Status.LIMIT
            or not task.seconds_left
            or (task.node_limit is not None and self.nodes >= task.node_limit)
            or self._gap() <= task.gap_limit
        )

    def _gap(self) -> float:
        """Relative gap, as `Solution.gap`."""
        if self.best is None:
            return np.inf
        value = self.program.minimised(self.best)
        return (value - self.bound) / max(abs(value), float(np.finfo(float).tiny))

    def _leader(self) -> Form:
        """The form with the highest bound."""
        return max(self.scores, key=lambda score: score[0])[1]
