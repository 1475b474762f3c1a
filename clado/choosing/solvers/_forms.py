"""Convex forms of one function, from cheap to costly, for a search to race: no rule known in advance says which has the
smallest tree. NumPy.

The tightest root bound (QCR) has many flat directions, in which branching gains nothing; the nearest convex form is loose at
the root but curved. Half-way between them is most often best; on nearly convex functions the nearest form alone, on hard ones
the tightest.
"""

import time
from functools import cached_property

import numpy as np

from clado.choosing.program import Program
from clado.choosing.solvers._bound import NodeBound
from clado.choosing.solvers._convexify import Form, Relaxation, nearest, reduced, shifted

QUICK, LONG = 150, 600
CHECKED_EVERY = 25
LONG_WORK = 2e10
"""Most steps · n³ of the long relaxation: some ten seconds."""


class Forms:
    """The forms of a program's function, each computed when first asked for. They hold for every bound of the program.

    `deadline` (clock of `time.perf_counter`) stops a relaxation early, which loosens forms and changes nothing else.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.source = reduced(program)
        self.deadline = np.inf

    @cached_property
    def nearest(self) -> Form:
        """Curved."""
        return nearest(self.program, self.source)

    @cached_property
    def _relaxation(self) -> Relaxation:
        return Relaxation(self.program, self.source)

    @cached_property
    def quick(self) -> Form:
        """QCR after a few steps."""
        return self._tightest(self.nearest, QUICK)

    @cached_property
    def long(self) -> Form:
        """QCR after as many steps as help, goes on from `quick`."""
        quick = self.quick
        return self._tightest(quick, min(LONG, int(LONG_WORK / max(len(self.source.free), 1) ** 3)) - QUICK)

    @property
    def half_quick(self) -> Form:
        """Half-way from curved to tight, after a few steps."""
        return self.nearest.mixed(self.quick, 0.5)

    @property
    def half_long(self) -> Form:
        """Half-way from curved to tight, after many."""
        return self.nearest.mixed(self.long, 0.5)

    def _tightest(self, first: Form, steps: int) -> Form:
        """The form with the highest root bound among those that the relaxation passes through."""
        everything = np.ones(self.program.num_choices, dtype=bool)
        best, highest = first, NodeBound(self.program, first).solve(everything).value
        for _ in range(max(0, steps) // CHECKED_EVERY):
            if time.perf_counter() > self.deadline:
                break
            self._relaxation.run(CHECKED_EVERY)
            form = shifted(self._relaxation.form())
            value = NodeBound(self.program, form).solve(everything).value
            if value > highest:
                best, highest = form, value
        return best
