"""One picture of any result."""

from typing import Any

from clado.api.compression import Compressed
from clado.api.finished_run import Run
from clado.choosing.pareto import Front
from clado.choosing.solution import Solution
from clado.errors import ConfigurationError
from clado.interaction.matrix import InteractionMatrix
from clado.records.run_record import RunRecord
from clado.reporting import plots


def plot(result: InteractionMatrix | Solution | Front | Compressed | RunRecord | Run) -> Any:
    """Draws a picture of a result. Notebooks show it; `figure.savefig("name.png")` writes it.

    Args:
        result: A matrix gives a heat map. A solution, or a result of `compress`, gives the bits of
            each layer. A front gives predicted loss against size. A run or its record gives
            accuracy against size, or the user-defined metric. Without labels it gives loss against size.

    Returns:
        A figure of matplotlib.

    Raises:
        ConfigurationError: There is no picture of such an object.
    """
    match result:
        case InteractionMatrix():
            return plots.heat_map(result)
        case Solution() | Compressed():
            return plots.bits_of_assignments(result.space, {f"{result.average_bits:.3g} bits": result.assignment})
        case Front():
            return plots.predicted_front(result)
        case Run():
            return plot(result.record)
        case RunRecord():
            if result.metric_name is not None:
                return plots.metric_against_size(result)
            has_top1 = result.float_accuracy.top1 is not None
            return plots.accuracy_against_size(result) if has_top1 else plots.loss_against_size(result)
    raise ConfigurationError(
        f"cannot draw a {type(result).__name__}; expected a matrix, a solution, a front, a run, or a result of clado.compress"
    )
