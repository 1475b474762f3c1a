"""Quantizes each layer at each of its candidate bit-widths, once, before measuring.

A layer's weight is rounded and corrected, and its input gets a grid. A measurement puts the layer's `QuantizedLayer` in
its place. The interaction matrix therefore describes the layers that are deployed, with their corrections.
A final correction (statistics of batch norm) needs the whole assignment. It comes last, in `Prepared.deployed`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clado.errors import ConfigurationError, DataError, NetworkError
from clado.grids import ActivationGrid, QuantizedLayer
from clado.network.network import Network, State
from clado.network.tensors import laid_out_like
from clado.quantization.corrections import (
    STAGES,
    FinalCorrection,
    LayerCorrection,
    LayerSample,
    NetworkCorrection,
    Rounding,
    at_stage,
    correction_of,
)
from clado.quantization.quantizers import WeightQuantizer, quantizer_of, range_of
from clado.space import Assignment, Layer, SearchSpace

SAMPLED_VALUES = 2**20  # values of a layer's input that an activation range is fitted on, with the exact extremes
BATCH_IMAGES = 128
RUNS_BYTES = 2 * 10**9  # most bytes that float runs of all calibration images keep between two layers
Run = Tensor | State  # a batch of images (n, C, H, W), or a float run of it that has stopped at or before the layer


@dataclass(frozen=True)
class Recipe:
    """How layers are quantized."""

    quantizer: WeightQuantizer = field(default_factory=WeightQuantizer)
    """The quantizer of weights."""
    activation_range: str = "mse"
    """How the range of activations is fitted: a name of `clado.quantization.quantizers`."""
    corrections: tuple[str, ...] = ()
    """Names of corrections, each at most once."""
    seed: int = 0
    """The seed of learned rounding."""
    adaround_steps: int = 1000
    """Steps of learned rounding for each grid."""

    def __post_init__(self) -> None:
        if len(set(self.corrections)) < len(self.corrections):
            raise ConfigurationError(f"corrections {list(self.corrections)} name one twice; expected each once")
        check_rounding(self.corrections)
        quantizer_of(self.activation_range)  # refuses an unknown name

    @property
    def plain(self) -> "Recipe":
        """The same quantizers without corrections."""
        return replace(self, corrections=())


@dataclass(frozen=True)
class Prepared:
    """A network ready to be quantized."""

    network: Network
    """The float network, equalized where a correction does that."""
    space: SearchSpace
    """The options of its layers."""
    recipe: Recipe
    """How its layers were quantized."""
    layers: tuple[QuantizedLayer, ...]
    """The quantized layer of each option, in the order of the space's options."""
    images: Sequence[Tensor] = ()
    """Calibration batches (n, C, H, W), which final corrections read."""
    notes: tuple[str, ...] = ()
    """What each correction did or skipped, for the user."""
    _references: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def chosen(self, assignment: Assignment) -> dict[int, QuantizedLayer]:
        """Layer -> its quantized layer, for the layers that an assignment quantizes."""
        return {self.space.options[k].layer: self.layers[k] for k in self.space.chosen_options(assignment)}

    @property
    def has_final(self) -> bool:
        """Whether corrections are left that need the whole assignment."""
        return bool(at_stage(self.recipe.corrections, FinalCorrection))

    def final(self, assignment: Assignment) -> dict[str, Tensor]:
        """Parameters and buffers that final corrections change for an assignment, by name. Empty for the float network."""
        layers = self.chosen(assignment)
        tensors: dict[str, Tensor] = {}
        if layers:
            for name, correction in at_stage(self.recipe.corrections, FinalCorrection).items():
                if name not in self._references:
                    self._references[name] = correction.reference(self.network, self.images)
                network = self.network.updated(tensors)
                tensors |= correction.reestimate(network, layers, self.images, self._references[name])
        return tensors

    def deployed(self, assignment: Assignment) -> tuple[Network, dict[int, QuantizedLayer]]:
        """The deployed network and its quantized layers.

        Final corrections are applied, unless the assignment is deployed without corrections.

        Raises:
            ConfigurationError: The assignment is deployed without corrections, and these layers have some.
        """
        if assignment.corrected == "none" and self.recipe.corrections:
            raise ConfigurationError(
                f"the assignment is deployed without corrections, and these layers have {names_of(self.recipe.corrections)}; "
                "expected layers from clado.prepare(..., corrections=())"
            )
        tensors = self.final(assignment) if self.has_final and assignment.corrected == "all" else {}
        return self.network.updated(tensors) if tensors else self.network, self.chosen(assignment)


def prepare(
    network: Network,
    space: SearchSpace,
    recipe: Recipe | None = None,
    images: Sequence[Tensor] = (),
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Prepared:
    """Quantizes every layer at every candidate, in this process.

    Args:
        network: The float network.
        space: The options of its layers.
        recipe: How layers are quantized; by default `Recipe()`.
        images: Calibration batches (n, C, H, W).
        progress: It is called with (layers that are prepared, all layers) after every layer.

    Raises:
        DataError: Corrections or activations need images, and there are none, or too few.
        ConfigurationError: The space belongs to another network.
    """
    recipe = recipe or Recipe()
    check_space(network, space)
    check_calibration(space, recipe, images)
    images = [batch.to(network.device) for batch in images if len(batch)]
    tensors, notes = equalized(network, recipe, images)
    network = network.updated(tensors) if tensors else network
    layers: list[QuantizedLayer] = []
    runs: Sequence[Run] = images
    for layer in range(space.num_layers):
        runs = advanced(network, runs, layer)
        options, layer_notes = prepare_layer(network, space, recipe, layer, runs)
        layers += options
        notes += layer_notes
        progress(layer + 1, space.num_layers)
    return Prepared(network, space, recipe, tuple(layers), images, tuple(notes))


def check_space(network: Network, space: SearchSpace) -> None:
    """Refuses a space of other layers, and candidates that the network cannot run."""

    def shapes(layers: Sequence[Layer]) -> list[tuple[object, ...]]:
        return [(layer.name, layer.shape, layer.channel_axis) for layer in layers]

    if shapes(network.layers) != shapes(space.layers):
        names = sorted({layer.name for layer in space.layers} ^ {layer.name for layer in network.layers})
        raise ConfigurationError(
            f"the space is of another network: they differ in {', '.join(names[:3]) or 'the shapes or the order of layers'}; "
            "expected network.search_space(...) of this network"
        )
    if len(space.activation_widths) > 1 and any(place.rows is not None for place in network.places):
        raise ConfigurationError(
            f"activations of {list(space.activation_widths)} bits where a weight is split: queries, keys and values read one "
            "input, which has one width; expected a single width, or no split"
        )


def check_calibration(space: SearchSpace, recipe: Recipe, images: Sequence[Tensor]) -> None:
    """Raises DataError where something needs calibration images and there are none."""
    readers = [*recipe.corrections, *(["activations"] if space.activation_widths != (None,) else [])]
    if readers and not any(len(batch) for batch in images):
        raise DataError(f"{', '.join(readers)} need calibration images and there are none; expected 256 or more")


def equalized(network: Network, recipe: Recipe, images: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Applies the corrections of the float network.

    Returns:
        The new values of parameters and buffers by name, and a note for each pair of neighbours.
    """
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    for name, correction in at_stage(recipe.corrections, NetworkCorrection).items():
        equalization = correction.equalize(network.updated(tensors) if tensors else network, images)
        tensors |= equalization.tensors
        notes += [f"{name}: {pair}" for pair in equalization.report]
    return tensors, notes


def advanced(network: Network, runs: Sequence[Run], layer: int) -> Sequence[Run]:
    """The same float runs at the cut before a layer: layers in ascending order cost one forward in all.

    Returns the runs unchanged where they would keep more than `RUNS_BYTES`.
    """
    bytes_per_image = max(place.cut.bytes_per_image for place in network.places)
    if bytes_per_image * sum(map(num_images, runs)) > RUNS_BYTES:
        return runs
    return [network.advance(network.begin(run) if isinstance(run, Tensor) else run, layer) for run in runs]


def num_images(run: Run) -> int:
    """Images of a batch or of a float run."""
    return len(run) if isinstance(run, Tensor) else int(run.num_images)


@torch.inference_mode()
def prepare_layer(
    network: Network, space: SearchSpace, recipe: Recipe, layer: int, runs: Sequence[Run]
) -> tuple[list[QuantizedLayer], list[str]]:
    """Quantizes one layer at each of its candidates.

    Args:
        network: The float network, equalized where a correction does that.
        space: The options of its layers.
        recipe: How layers are quantized.
        layer: The layer's number.
        runs: Float runs of the calibration batches, or the batches themselves.

    Returns:
        The quantized layers in the order of the candidates, and notes on corrections that skip the layer.
    """
    weight, axis = network.weights[layer], network.layers[layer].channel_axis
    sample = layer_sample(network, layer, runs)
    notes = []
    rounders = []
    for name, rounding in at_stage(recipe.corrections, Rounding).items():
        reason = rounding.skipped(network.layers[layer]) if sample else "no run of it can be observed"
        if reason or sample is None:
            notes.append(f"{name} leaves {network.layers[layer].name} to rounding to nearest: {reason}")
        else:
            rounders.append(rounding.rounder(sample, recipe.seed, recipe.adaround_steps))
    quantized: dict[tuple[int, int | None], QuantizedLayer] = {}
    activations: dict[int, ActivationGrid] = {}
    for bits, width in space.candidates(layer):
        if width is not None and width not in activations:
            activations[width] = activation_grid(network, layer, runs, width, recipe.activation_range)
        weight_only = next((option for (b, _), option in quantized.items() if b == bits), None)
        if weight_only is None:
            grid = recipe.quantizer.grid(weight, bits, axis)
            codes = rounders[0](grid) if rounders else grid.quantize(weight.float())
            weight_only = QuantizedLayer(grid.dequantize(codes).to(weight.dtype), None, None, grid)
        quantized[bits, width] = replace(weight_only, activation=None if width is None else activations[width])
    layers = list(quantized.values())
    for name, correction in at_stage(recipe.corrections, LayerCorrection).items():
        reason = correction.skipped(sample) if sample else "no run of it can be observed"
        if reason or sample is None:
            notes.append(f"{name} leaves {network.layers[layer].name} as it is: {reason}")
        else:
            layers = correction.correct(sample, layers)
    return [replace(option, weight=laid_out_like(option.weight, weight)) for option in layers], notes


def layer_sample(network: Network, layer: int, runs: Sequence[Run]) -> LayerSample | None:
    """A layer and its inputs on calibration batches. Of a weight that is used twice, the first use counts.

    Returns None where no input is seen, or where the operator reads the weight in another shape.
    """
    if not runs or not (calls := network.observe(runs[0], layer)):
        return None
    if calls[0].weight_shape[1:] != tuple(network.weights[layer].shape[1:]):  # rows may be those of a weight that is split
        return None

    def inputs() -> Iterator[Tensor]:
        for run in runs:
            yield network.observe(run, layer)[0].input.to(network.weights[layer].dtype)  # autocast may have made it coarser

    call = calls[0]
    return LayerSample(
        layer=network.layers[layer],
        weight=network.weights[layer],
        bias=network.biases[layer],
        num_images=sum(map(num_images, runs)),
        inputs=inputs,
        apply=partial(_apply, call.apply),
        arguments=call.arguments,
        takes_bias=network.places[layer].takes_bias and len(calls) == 1,
    )


def _apply(operator: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return operator(x, weight, bias)


def activation_grid(network: Network, layer: int, runs: Sequence[Run], bits: int, range_name: str) -> ActivationGrid:
    """The grid of a layer's input, over every use of its weight.

    The range is fitted on a sample of values and on the exact extremes.
    """
    per_batch = max(1, SAMPLED_VALUES // max(1, len(runs)))
    values: list[Tensor] = []
    for run in runs:
        for call in network.observe(run, layer):
            x = call.input.float().flatten()
            # a stride prime to the usual sizes does not meet the same channel again and again
            stride = max(1, x.numel() // per_batch) | 1
            values += [x[::stride].cpu(), torch.stack(x.aminmax()).cpu()]
    if not values:
        raise NetworkError(f"the input of {network.layers[layer].name} cannot be observed; leave activations in float")
    low, high = range_of(range_name, torch.cat(values), bits)
    return ActivationGrid.of_range(low, high, bits)


def calibration_batches(images: Tensor, batch_images: int = BATCH_IMAGES) -> list[Tensor]:
    """Images (N, C, H, W) in batches."""
    return list(torch.split(images, batch_images)) if len(images) else []


def check_rounding(corrections: Sequence[str]) -> None:
    """Refuses two ways of rounding."""
    names = list(at_stage(corrections, Rounding))
    if len(names) > 1:
        raise ConfigurationError(f"corrections names both {' and '.join(names)}; expected one way of rounding")


def names_of(corrections: Sequence[str]) -> str:
    """Names of corrections for a table, in the order in which they act."""
    ordered = sorted(corrections, key=lambda name: STAGES.index(correction_of(name).stage))
    return " + ".join(ordered) or "none"
