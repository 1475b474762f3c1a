"""A user's own costs: a CSV file with columns `layer`, `bits` and a last one, whose header is the unit.

If activations are quantized, a column `activation_bits` may come before the last one. With several widths it is required.
A row of a layer in float has `float` as its bits, and empty activation bits.
"""

import csv
from math import isfinite
from pathlib import Path

from clado.bits import FLOAT, label
from clado.choosing.constraints import Constraint, ConstraintKind
from clado.errors import ConfigurationError
from clado.space import SearchSpace


def read(space: SearchSpace, bound: float, path: str | Path, name: str = "table") -> Constraint:
    """At most `bound`, by the numbers in the file. It has one row for every candidate of every layer. Other rows are ignored."""
    where = f"constraint {name}: {path}"
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
    except OSError as error:
        raise ConfigurationError(f"{where} ({Path(path).absolute()}) cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(f"{where} is not a CSV file in UTF-8 ({error}); save it in this form") from error
    header = rows[0] if rows else []
    with_activations = header[:3] == ["layer", "bits", "activation_bits"]
    num_keys = 3 if with_activations else 2
    if len(header) != num_keys + 1 or header[:2] != ["layer", "bits"]:
        raise ConfigurationError(
            f"{where} starts with {header or 'nothing'}; expected the header layer,bits,<unit> or "
            "layer,bits,activation_bits,<unit>"
        )
    if with_activations and not space.has_activations:
        raise ConfigurationError(
            f"{where} has a column activation_bits, but activations stay in float; expected the header layer,bits,<unit>"
        )
    if not with_activations and len(space.activation_widths) > 1:
        raise ConfigurationError(
            f"{where} has no column activation_bits, but activations may be at {list(space.activation_widths)} bits; "
            "expected the header layer,bits,activation_bits,<unit>"
        )
    costs: dict[tuple[str, int | None, int | None], float] = {}
    for number, row in enumerate(rows[1:], start=2):
        try:
            bits = None if row[1] == FLOAT else int(row[1])
            key = (row[0], bits, int(row[2]) if with_activations and bits is not None else None)
            cost = float(row[num_keys])
        except (ValueError, IndexError):
            numbers = "two integers" if with_activations else "an integer"
            raise ConfigurationError(f"{where}, row {number} is {row}; expected a layer's name, {numbers} and a number") from None
        if not isfinite(cost) or cost < 0 or key in costs:
            problem = "is given twice" if key in costs else f"costs {cost}; expected a finite number, not negative"
            raise ConfigurationError(f"{where}, row {number}: {label(*key)} {problem}")
        costs[key] = cost
    keys = [(space.layers[i].name, b, a if with_activations else None) for i, b, a in space.options]
    missing = [label(*key) for key in keys if key not in costs]
    if missing:
        raise ConfigurationError(
            f"{where} lacks {', '.join(missing[:5])}{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}"
        )
    return Constraint(name, header[num_keys], tuple(costs[key] for key in keys), float(bound))


constraint = ConstraintKind(read, needs_path=True)
