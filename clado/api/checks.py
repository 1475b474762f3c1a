"""Checks of the arguments of the Python interface. Messages say what was given, what is expected and what to do."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from clado import criteria
from clado.choosing.solution import Solution
from clado.criteria import PackedCriterion
from clado.data.images import ImageSlice, as_slice, check_slice
from clado.errors import ConfigurationError
from clado.interaction.estimators import check_criterion
from clado.interaction.matrix import InteractionMatrix
from clado.network.network import Network
from clado.quantization.preparation import Prepared
from clado.quantization.quantizers import WeightQuantizer
from clado.space import Assignment, SearchSpace

RAW_PIXEL = 20.0
"""Normalised images have no pixel above this. Images of 0 to 255 that are not normalised do."""


def check_network(network: object) -> None:
    """Raises ConfigurationError for anything but a `Network`."""
    if isinstance(network, nn.Module):
        raise ConfigurationError(f"network is the module {type(network).__name__}; expected clado.Network(module, example_input)")
    if not isinstance(network, Network):
        raise ConfigurationError(f"network is a {type(network).__name__}; expected clado.Network(module, example_input)")


def check_space(space: object) -> None:
    """Raises ConfigurationError for anything but a `SearchSpace`."""
    if not isinstance(space, SearchSpace):
        raise ConfigurationError(f"space is {_shown(space)}; expected network.search_space(bits=(2, 4, 8))")


def check_matrix(matrix: object) -> None:
    """Raises ConfigurationError for anything but an `InteractionMatrix`."""
    if not isinstance(matrix, InteractionMatrix):
        raise ConfigurationError(f"matrix is {_shown(matrix)}; expected clado.measure(...) or clado.InteractionMatrix.load(file)")


def check_assignment(network: Network, assignment: object) -> None:
    """Raises an error for anything but an assignment of the network."""
    if isinstance(assignment, Solution):
        raise ConfigurationError("the assignment is a solution; expected its assignment: solution.assignment")
    if isinstance(assignment, Mapping):
        raise ConfigurationError(
            f"the assignment is a {type(assignment).__name__}; expected a clado.Assignment with bits for each layer, such as "
            "clado.Assignment(tuple(bits[layer.name] for layer in network.layers)), or space.from_json(document)"
        )
    if not isinstance(assignment, Assignment):
        raise ConfigurationError(
            f"the assignment is {_shown(assignment)}; expected a clado.Assignment, such as solution.assignment or "
            "clado.Assignment((8, 4, 4))"
        )
    network.check_assignment(assignment)


def check_prepared(
    network: Network, space: SearchSpace | None, prepared: Prepared | None, quantizer: WeightQuantizer | None
) -> Prepared | None:
    """Returns `prepared` if it fits.

    Raises ConfigurationError if it belongs to another network or space, or if a quantizer is given too.
    """
    if prepared is None:
        return None
    if not isinstance(prepared, Prepared):
        raise ConfigurationError(f"prepared is {_shown(prepared)}; expected clado.prepare(network, space, ...)")
    if prepared.network.model is not network.model:
        raise ConfigurationError("prepared belongs to another network; expected clado.prepare(network, ...) with this network")
    if space is not None and prepared.space != space:
        raise ConfigurationError("prepared belongs to another space; expected clado.prepare(network, space, ...) with this space")
    if quantizer is not None:
        raise ConfigurationError(
            "prepared has a quantizer already; expected clado.prepare(..., quantizer=...) and no quantizer here"
        )
    return prepared


def image_slice(network: Network, data: Any, classes: bool = True) -> ImageSlice:
    """The data as a slice that fits the network. Unless targets are classes, they may be of any type and shape (N, ...).

    Raises DataError if shapes or labels do not fit. Warns if pixels look as if they were not normalised.
    """
    images = as_slice(data, image_shape=network.image_shape, classes=classes)
    num_classes = int(network.logits(network.example).shape[1]) if classes else None
    check_slice(images, network.image_shape, num_classes, classes=classes)
    warn_of_raw_pixels(images.load(0, min(len(images), 256))[0])
    return images


def checked_criterion(criterion: Any, estimators: Sequence[str], network: Network) -> PackedCriterion:
    """The criterion on the network's outputs. Raises ConfigurationError if an estimator needs more than it offers."""
    packed = criteria.packed(criterion, network.outputs)
    check_criterion(estimators, packed.name, packed.offers)
    return packed


def warn_of_raw_pixels(images: Tensor) -> None:
    """Warns if no pixel is negative and some are above `RAW_PIXEL`."""
    low, high = float(images.min()), float(images.max())
    if low >= 0 and high > RAW_PIXEL and images.ndim == 4:
        warnings.warn(
            f"pixels reach from {low:g} to {high:g}, as those of images that are not normalised; expected what the network was "
            "trained on, such as (images / 255 - mean) / std. A network that normalises images itself can ignore this.",
            stacklevel=4,
        )


def _shown(value: object) -> str:
    text = repr(value)
    return f"a {type(value).__name__}" if len(text) > 60 else f"{text} of type {type(value).__name__}"
