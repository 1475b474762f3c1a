"""Convex forms of one function, from cheap to costly. No known rule says which form has the smallest tree. NumPy.

The form with the tightest root bound (QCR) has many flat directions, in which branching gains nothing. The nearest convex form is
loose at the root but curved. The mean of both is best most often. On nearly convex functions the nearest form is best, and on
hard ones the tightest.
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
    """The forms of a program's function, each computed at its first use. They are valid for every bound of the program.

    `deadline` (clock of `time.perf_counter`) stops a relaxation early. The forms are then looser, and still valid.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.source = reduced(program)
        self.deadline = np.inf

    @cached_property
    def nearest(self) -> Form:
        """The nearest convex form: curved."""
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
        """QCR after as many steps as help. It continues from `quick`."""
        quick = self.quick
        return self._tightest(quick, min(LONG, int(LONG_WORK / max(len(self.source.free), 1) ** 3)) - QUICK)

    @property
    def half_quick(self) -> Form:
        """The mean of `nearest` and `quick`."""
        return self.nearest.mixed(self.quick, 0.5)

    @property
    def half_long(self) -> Form:
        """The mean of `nearest` and `long`."""
        return self.nearest.mixed(self.long, 0.5)

    def _tightest(self, initial: Form, steps: int) -> Form:
        """The form with the highest root bound among the initial form and the forms of the relaxation's steps."""
        everything = np.ones(self.program.num_choices, dtype=bool)
        best, highest = initial, NodeBound(self.program, initial).solve(everything).value
        for _ in range(max(0, steps) // CHECKED_EVERY):
            if time.perf_counter() > self.deadline:
                break
            self._relaxation.run(CHECKED_EVERY)
            form = shifted(self._relaxation.form())
            value = NodeBound(self.program, form).solve(everything).value
            if value > highest:
                best, highest = form, value
        return best
