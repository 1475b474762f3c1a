"""clado chooses a bit-width for every layer of a vision network by measuring how the quantization errors of layers interact.

    result = clado.compress(model, data, average_bits=3)  # the whole way; result.module is a torch module

    network = clado.Network(model, example_input)  # the same in steps
    space = network.search_space(bits=(2, 4, 8))
    matrix = clado.measure(network, space, data, estimator="gauss_newton", criterion="kl_to_float")
    solution = clado.solve(matrix, average_bits=3.0)
    report = clado.evaluate(network, solution.assignment, validation_data)
    module = clado.quantize(network, solution.assignment)

Names are loaded when first used, so that `import clado` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clado.api.compression import Compressed, compress
    from clado.api.finished_run import Run
    from clado.api.plotting import plot
    from clado.api.steps import evaluate, front, measure, prepare, quantize, solve
    from clado.choosing.pareto import Front
    from clado.choosing.solution import Solution
    from clado.errors import CladoError
    from clado.exporting.packed import load_packed
    from clado.interaction.matrix import InteractionMatrix
    from clado.network.network import Network
    from clado.quantization.quantizers import WeightQuantizer
    from clado.records.results import Accuracy
    from clado.space import Assignment, Layer, SearchSpace

__version__ = "0.1.0"

_HOMES = {
    "Compressed": "api.compression",
    "Run": "api.finished_run",
    "compress": "api.compression",
    "evaluate": "api.steps",
    "front": "api.steps",
    "measure": "api.steps",
    "plot": "api.plotting",
    "prepare": "api.steps",
    "quantize": "api.steps",
    "solve": "api.steps",
    "load_packed": "exporting.packed",
    "CladoError": "errors",
    "Front": "choosing.pareto",
    "InteractionMatrix": "interaction.matrix",
    "Network": "network.network",
    "Solution": "choosing.solution",
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
    "Compressed",
    "Front",
    "InteractionMatrix",
    "Layer",
    "Network",
    "Run",
    "SearchSpace",
    "Solution",
    "WeightQuantizer",
    "compress",
    "evaluate",
    "front",
    "load_packed",
    "measure",
    "plot",
    "prepare",
    "quantize",
    "solve",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"clado.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'clado' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
