"""A user's own costs: a CSV file with columns `layer`, `bits` and a third, whose header is the unit."""

import csv
from math import isfinite
from pathlib import Path

from clado.constraints import Constraint
from clado.errors import ConfigurationError
from clado.space import SearchSpace


def constraint(space: SearchSpace, bound: float, path: str | Path, name: str = "table") -> Constraint:
    """At most `bound`, by the numbers in the file: one row for every layer and bit-width of the space, other rows ignored."""
    where = f"constraint {name}: {path}"
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
    except OSError as error:
        raise ConfigurationError(f"{where} cannot be read: {error.strerror}") from error
    if not rows or len(rows[0]) != 3 or rows[0][:2] != ["layer", "bits"]:
        raise ConfigurationError(f"{where} starts with {rows[0] if rows else 'nothing'}; expected the header layer,bits,<unit>")
    costs: dict[tuple[str, int], float] = {}
    for number, row in enumerate(rows[1:], start=2):
        try:
            layer, bits, cost = row[0], int(row[1]), float(row[2])
        except (ValueError, IndexError):
            raise ConfigurationError(
                f"{where}, row {number} is {row}; expected a layer's name, an integer and a number"
            ) from None
        if not isfinite(cost) or cost < 0 or (layer, bits) in costs:
            problem = "is given twice" if (layer, bits) in costs else f"costs {cost}; expected a finite number, not negative"
            raise ConfigurationError(f"{where}, row {number}: {layer} at {bits} bits {problem}")
        costs[layer, bits] = cost
    wanted = [(space.layers[i].name, b) for i, b in space.options]
    missing = [f"{layer} at {bits} bits" for layer, bits in wanted if (layer, bits) not in costs]
    if missing:
        raise ConfigurationError(
            f"{where} lacks {', '.join(missing[:5])}{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}"
        )
    return Constraint(name, rows[0][2], tuple(costs[key] for key in wanted), float(bound))
