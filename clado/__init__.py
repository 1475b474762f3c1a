"""clado chooses a bit-width for every layer of a vision network by measuring how the quantization errors of layers interact.

    network = clado.Network(model, example_input)
    space = network.search_space(bits=(2, 4, 8))
    matrix = clado.measure(network, space, data, estimator="gauss_newton", criterion="kl_to_float")
    solution = clado.solve(matrix, average_bits=3.0)
    report = clado.evaluate(network, solution.assignment, validation_data)

Names are loaded when first used, so that `import clado` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clado.api import evaluate, measure, prepare, solve
    from clado.choosing.program import Solution
    from clado.errors import CladoError
    from clado.exporting.packed import load_packed
    from clado.interaction.matrix import InteractionMatrix
    from clado.network.network import Network
    from clado.quantization.quantizers import WeightQuantizer
    from clado.records.results import Accuracy
    from clado.space import Assignment, Layer, SearchSpace

__version__ = "0.1.0"

_HOMES = {
    "evaluate": "api",
    "measure": "api",
    "prepare": "api",
    "solve": "api",
    "load_packed": "exporting.packed",
    "CladoError": "errors",
    "InteractionMatrix": "interaction.matrix",
    "Network": "network.network",
    "Solution": "choosing.program",
    "WeightQuantizer": "quantization.quantizers",
    "Accuracy": "records.results",
    "Assignment": "space",
    "Layer": "space",
    "SearchSpace": "space",
}
__all__ = [
    "Accuracy",
    "Assignment",
    "CladoError",
    "InteractionMatrix",
    "Layer",
    "Network",
    "SearchSpace",
    "Solution",
    "WeightQuantizer",
    "evaluate",
    "load_packed",
    "measure",
    "prepare",
    "solve",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"clado.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'clado' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
