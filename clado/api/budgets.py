"""Budgets by keyword, as constraints."""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

from clado.choosing.constraints import Constraint
from clado.choosing.proposals import Budget, merge_limits
from clado.errors import ConfigurationError
from clado.space import SearchSpace

TableBound = tuple[float, str | Path]
"""A bound, and the CSV file with the costs that it bounds."""
CONSTRAINTS = {
    "average_bits": "average_bits",
    "size_bytes": "size",
    "percent_of_8_bit": "relative_size",
    "bops": "bops",
    "latency": "latency",
    "table": "table",
}
"""Keyword -> name in `clado.choosing.constraints`."""
EXAMPLES = {
    "average_bits": "average_bits=3.0",
    "size_bytes": "size_bytes=100_000",
    "percent_of_8_bit": "percent_of_8_bit=40",
    "bops": "bops=4e9",
    "latency": 'latency=(0.002, "times.csv")',
    "table": 'table=(1.5, "costs.csv")',
}
WITH_TABLE = ("latency", "table")


def budgets(keywords: Mapping[str, Any]) -> list[Budget]:
    """The budgets of all keywords that are not None, in the order of the keywords.

    Raises:
        ConfigurationError: A bound is not a positive number, or a table is missing.
    """
    return [_budget(keyword, value) for keyword, value in keywords.items() if value is not None]


def limits(space: SearchSpace, keywords: Mapping[str, Any], more: Sequence[Constraint] = ()) -> list[Constraint]:
    """All limits of a call as constraints on a space. Raises ConfigurationError if there are none."""
    constraints = [budget.limit(space) for budget in budgets(keywords)]
    if not constraints and not more:
        raise ConfigurationError(
            "there is no limit, so the widest bits everywhere would be the answer; expected one or more of "
            + ", ".join(EXAMPLES[keyword] for keyword in keywords)
        )
    first, *rest = [*constraints, *more]
    return merge_limits(first, rest)


def series(keywords: Mapping[str, Any]) -> tuple[str, list[float]]:
    """The one keyword that has a sequence of bounds, and these bounds.

    Raises:
        ConfigurationError: No keyword or several have a sequence, or a bound is not a positive number.
    """
    names = [keyword for keyword, value in keywords.items() if value is not None]
    if len(names) != 1:
        raise ConfigurationError(
            f"a front has one series of budgets, and {', '.join(names) or 'none'} is given; "
            "expected such as average_bits=[2.5, 3, 4]"
        )
    bounds = keywords[names[0]]
    if isinstance(bounds, str) or not isinstance(bounds, Iterable):
        raise ConfigurationError(f"{names[0]} is {bounds!r}; expected several bounds, such as {names[0]}=[...]")
    numbers = [_number(names[0], bound, "") for bound in bounds]
    if not numbers:
        raise ConfigurationError(f"{names[0]} is empty; expected one bound or more")
    return names[0], numbers


def _budget(keyword: str, value: Any) -> Budget:
    example = EXAMPLES[keyword]
    if keyword not in WITH_TABLE:
        return Budget(CONSTRAINTS[keyword], _number(keyword, value, example))
    if not (isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[1], str | Path)):
        raise ConfigurationError(
            f"{keyword} is {value!r}; expected a bound and a CSV file with the columns layer,bits,..., such as {example}"
        )
    return Budget(CONSTRAINTS[keyword], _number(keyword, value[0], example), str(value[1]))


def _number(keyword: str, value: Any, example: str) -> float:
    such = f", such as {example}" if example else ""
    if isinstance(value, bool) or not isinstance(value, Real):
        several = "; clado.front takes several bounds" if isinstance(value, list | tuple) else ""
        raise ConfigurationError(f"{keyword} is {value!r} of type {type(value).__name__}; expected a number{such}{several}")
    if not isfinite(value) or value <= 0:
        raise ConfigurationError(f"{keyword} is {value}; expected a finite number above 0{such}")
    return value if isinstance(value, int) else float(value)
