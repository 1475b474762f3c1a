"""The parts of a branch-and-bound tree that do not use SCIP: the incumbent, node bounds, rounding and branching."""

import numpy as np

from clado.choosing.program import Choices, Program
from clado.choosing.solvers import TOLERANCE
from clado.choosing.solvers._bound import Bound, Mask, NodeBound
from clado.choosing.solvers._convexify import Form
from clado.choosing.solvers._start import Descent


class Tree:
    """The state of one search. `best` and `value` are the incumbent, which the program itself has checked and evaluated."""

    def __init__(self, program: Program, form: Form, initial: Choices | None) -> None:
        self.program = program
        self.bounds = NodeBound(program, form)
        self.descent = Descent(program)
        self.best: Choices | None = None
        self.value = np.inf
        self.smallest = TOLERANCE * 1e-6 * self.descent.scale  # smaller values count as zero
        self.warm: dict[int, tuple[bytes, Mask, list[int]]] = {}  # node -> packed support, active constraints, [open children]
        self.node: tuple[Mask, Bound] | None = None  # allowed choices and bound of the last node
        if initial is not None:
            self.offer(initial)

    @property
    def cutoff(self) -> float:
        """A node with this bound or a higher one has no better answer, within the tolerance."""
        return self.value - self.margin if self.best is not None else np.inf

    @property
    def margin(self) -> float:
        """The tolerance in the unit of the minimised function."""
        return max(TOLERANCE * abs(self.value), self.smallest)

    def offer(self, choices: Choices) -> bool:
        """Makes choices the incumbent where they are feasible and better. Returns whether they are."""
        value = self.program.minimised(choices)
        if value >= self.value or not self.program.is_feasible(choices):
            return False
        self.best, self.value = choices.copy(), value
        return True

    def warm_start(self, parent: int | None, count: int) -> tuple[Mask | None, Mask | None]:
        """Support and active constraints at the end of the parent's bound. They are dropped once both children have read them."""
        if parent is None or parent not in self.warm:
            return None, None
        packed, active, children = self.warm[parent]
        children[0] -= 1
        if not children[0]:
            del self.warm[parent]
        return np.unpackbits(np.frombuffer(packed, np.uint8), count=count).astype(bool), active

    def rounded(self, bound: Bound) -> Choices | None:
        """The largest share of each group, repaired and improved. None if it cannot be repaired."""
        order = np.lexsort((-bound.x, self.program.owner))
        return self.descent.improved(order[self.program.starts[:-1]])

    def split(self) -> tuple[list[int], list[int]]:
        """Narrow and wide choices of the group whose split bends the function most.

        The score is L (1 − L) uᵀ H u. L is the share of the narrow choices, and u the move from the centre of one side to the
        centre of the other.
        """
        assert self.node is not None  # a node is branched only after it is bounded
        allowed, bound = self.node
        best: tuple[float, list[int], int] | None = None
        starts, h = self.program.starts, self.bounds.h
        for group in np.flatnonzero(np.add.reduceat(allowed.astype(np.intp), starts[:-1]) > 1):
            choices = starts[group] + np.flatnonzero(allowed[starts[group] : starts[group + 1]])
            x = np.maximum(bound.x[choices], 0.0)
            for cut, share in enumerate(np.cumsum(x)[:-1], start=1):
                score = 0.0
                if 1e-9 < share < x.sum() - 1e-9:
                    u = np.concatenate([x[:cut] / share, -x[cut:] / x[cut:].sum()])
                    score = float(share * (1 - share) * (u @ h[np.ix_(choices, choices)] @ u)) + 1e-12 * share * (1 - share)
                if best is None or score > best[0]:
                    best = (score, choices.tolist(), cut)
        assert best is not None  # a node with one choice per group is cut off before branching
        _, listed, cut = best
        return listed[:cut], listed[cut:]
