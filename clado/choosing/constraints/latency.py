"""Latency from a measured table: a CSV file with the columns layer,bits,seconds (of one image, on the device that matters).

If several activation widths are candidates, the columns are layer,bits,activation_bits,seconds.
"""

from pathlib import Path

from clado.choosing.constraints import Constraint, ConstraintKind, table
from clado.errors import ConfigurationError
from clado.space import SearchSpace


def _build(space: SearchSpace, budget_seconds: float, path: str | Path) -> Constraint:
    """At most `budget_seconds` as the sum of the layers' measured times. A table in another unit is refused."""
    if not Path(path).is_file():
        raise ConfigurationError(
            f"constraint latency: {path} is no file; expected seconds of every layer, as `clado profile CONFIG` writes them"
        )
    measured = table.read(space, budget_seconds, path, name="latency")
    if measured.unit != "seconds":
        raise ConfigurationError(f"constraint latency: the last column of {path} is {measured.unit!r}; expected seconds")
    return measured


constraint = ConstraintKind(_build, needs_path=True, text=lambda bound: f"{bound * 1000:g} ms")
