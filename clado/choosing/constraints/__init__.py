"""Constraints: a cost for each option of the space, whose sum over the layers has a unit and a bound.

To add a constraint, add a file to this folder with an object `constraint = ConstraintKind(...)`, and subclass
`ConstraintContract` (tests/contracts/constraint.py) for it. The file's name is the constraint's name.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import floor, fsum, isfinite
from typing import Any

from clado.errors import ConfigurationError
from clado.plugins import load
from clado.space import Assignment, SearchSpace

RELATIVE_TOLERANCE = 1e-9  # relative tolerance for sums of fractions (seconds); sums of integers are compared exactly


@dataclass(frozen=True)
class Constraint:
    """Σ costs of the chosen options ≤ bound.

    Whole numbers are added and compared exactly, fractions within a relative 1e-9.
    """

    name: str
    """Its name in messages."""
    unit: str
    """Unit of the costs and of the bound."""
    costs: tuple[float, ...]
    """The cost of each option."""
    bound: float
    """Largest allowed cost of an assignment."""
    typed_unit: str = ""
    """Unit in which users give the bound, such as bits a weight. Empty: `unit`."""
    per_typed: float = 1.0
    """Number of `unit` in one `typed_unit`."""

    def __post_init__(self) -> None:
        for option, cost in enumerate(self.costs):
            if not isfinite(cost):
                raise ConfigurationError(
                    f"constraint {self.name}: the cost of option {option} is {cost}; expected a finite number"
                )
        if self.bound != self.bound:
            raise ConfigurationError(f"constraint {self.name}: the bound is NaN; expected a number of {self.unit}")

    @cached_property
    def is_integral(self) -> bool:
        """Whether every cost is a whole number, so that sums are exact."""
        return all(float(cost).is_integer() for cost in self.costs)

    @property
    def limit(self) -> float:
        """The largest value that still keeps the bound."""
        if self.is_integral or not isfinite(self.bound):
            return self.bound
        return self.bound + RELATIVE_TOLERANCE * abs(self.bound)

    def value(self, space: SearchSpace, assignment: Assignment) -> float:
        """The cost of the assignment, in `unit`."""
        return fsum(self.costs[option] for option in space.chosen_options(assignment))

    def holds(self, space: SearchSpace, assignment: Assignment) -> bool:
        """Whether the assignment keeps within the bound."""
        return self.value(space, assignment) <= self.limit

    def with_bound(self, bound: float) -> "Constraint":
        """The same costs under another bound."""
        return replace(self, bound=bound)

    def typed(self, value: float) -> str:
        """A value as a number in the unit in which users give the bound."""
        return f"{value / self.per_typed:.{12 if self.per_typed == 1 else 6}g}"


def whole(bound: float, times: Fraction | int = 1) -> float:
    """The largest whole number within a bound, times a factor.

    2.3 means the decimal 2.3, not the nearest binary number. An infinite bound or NaN stays as it is.
    """
    return float(floor(Fraction(repr(float(bound))) * times)) if isfinite(bound) else float(bound)


@dataclass(frozen=True)
class ConstraintKind:
    """Everything that the rest of the code must know about a kind of constraint."""

    build: Callable[..., Constraint]
    """(space, bound, path=FILE where `needs_path`, overhead_bytes=... where `counts_bytes`) -> the constraint."""
    needs_path: bool = False
    """Whether it reads a table of costs."""
    counts_bytes: bool = False
    """Whether it counts bytes of weights. It then also accepts bytes of scales and zero points: layer name -> bytes."""
    text: Callable[[float], str] | None = None
    """Name of a budget with this bound, for tables. None: NAME BOUND."""


def kind_of(name: str) -> ConstraintKind:
    """The constraint kind of a name, or of `package.module:name`."""
    kind: ConstraintKind = load("constraints", name)
    return kind


def constraint(name: str, space: SearchSpace, bound: float, /, **settings: Any) -> Constraint:
    """The constraint called `name`, with its bound and settings. The error for a wrong name lists the valid ones."""
    return kind_of(name).build(space, bound, **settings)
