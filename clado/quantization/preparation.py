"""Quantizes each layer at each of its candidate bit-widths, once, before measuring.

One sweep over the calibration images gathers statistics of every layer's input. The rest is linear algebra of one layer: its
weight is rounded and corrected, and its input gets a grid. A measurement puts the layer's `QuantizedLayer` in its place. The
interaction matrix therefore describes the layers that are deployed, with their corrections. A final correction (statistics of
batch norm) needs the whole assignment. It comes last, in `Prepared.deployed`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from clado.errors import ConfigurationError, DataError, NetworkError
from clado.grids import ActivationGrid, QuantizedLayer
from clado.network.network import Network
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
from clado.quantization.matrix_form import MatrixForm
from clado.quantization.quantizers import WeightQuantizer, quantizer_of, range_of
from clado.quantization.sweep import LayerInput, Sweep, calibration_blocks, joined
from clado.space import Assignment, Layer, SearchSpace

BATCH_IMAGES = 128


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
    """The seed of the positions of calibration images that are sampled."""
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
    """A network whose layers are quantized at every option."""

    network: Network
    """The float network, equalized where a correction does that."""
    space: SearchSpace
    """The options of its layers."""
    recipe: Recipe
    """How its layers were quantized."""
    layers: tuple[QuantizedLayer, ...]
    """The quantized layer of each option, in the order of the space's options. Float options have the float weight."""
    images: Sequence[Tensor] = ()
    """Calibration batches (n, C, H, W), which final corrections read."""
    notes: tuple[str, ...] = ()
    """Notes for the user: what each correction did or skipped."""
    _references: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The results that final corrections compute once on the float network, by correction."""

    def chosen(self, assignment: Assignment) -> dict[int, QuantizedLayer]:
        """Layer -> its quantized layer, for the layers that an assignment quantizes."""
        options = self.space.options
        return {options[k].layer: self.layers[k] for k in self.space.chosen_options(assignment) if options[k].bits is not None}

    @property
    def has_final(self) -> bool:
        """Whether there are corrections that need the whole assignment."""
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
        progress: It is called with (prepared layers, all layers) after every layer.

    Raises:
        DataError: Corrections or activations need images, and there are none, or too few.
        ConfigurationError: The space belongs to another network.
    """
    recipe = recipe or Recipe()
    check_space(network, space)
    check_calibration(space, recipe, sum(map(len, images)))
    images = [batch.to(network.device) for batch in images if len(batch)]
    tensors, notes = equalized(network, recipe, [observed(network, recipe, images)])
    network = network.updated(tensors) if tensors else network
    layers: list[QuantizedLayer] = []
    inputs = layer_inputs(network, space, recipe, images)
    for layer in range(space.num_layers):
        options, layer_notes = prepare_layer(network, space, recipe, layer, inputs.get(layer))
        layers += options
        notes += layer_notes
        progress(layer + 1, space.num_layers)
    return Prepared(network, space, recipe, tuple(layers), images, tuple(notes))


def layer_inputs(network: Network, space: SearchSpace, recipe: Recipe, images: Sequence[Tensor]) -> dict[int, LayerInput]:
    """Statistics of every layer's input on calibration batches (n, C, H, W). Empty if nothing needs them."""
    whole = torch.cat(list(images)) if images else torch.zeros(0)
    inputs: dict[int, LayerInput] = {}
    for sweep in sweeps(space, recipe, len(whole)):
        if sweep.on_grids:
            sweep = replace(sweep, grids={i: activation_grids(network, space, recipe, i, inputs[i]) for i in inputs})
        parts = [sweep.gather(network, whole[a:b], a, range(space.num_layers)) for a, b in calibration_blocks(len(whole))]
        for layer in range(space.num_layers):
            joined_parts = joined([part[layer] for part in parts])
            inputs[layer] = replace(inputs[layer], on_grid=joined_parts.on_grid) if sweep.on_grids else joined_parts
    return inputs


def sweeps(space: SearchSpace, recipe: Recipe, num_images: int) -> list[Sweep]:
    """The sweeps that a recipe needs: of float inputs, and of inputs on grids if a correction matches those."""
    has_widths = space.activation_widths != (None,)
    matched = bool(at_stage(recipe.corrections, LayerCorrection))
    moments = matched or bool(at_stage(recipe.corrections, Rounding))
    first = [Sweep(num_images, moments=moments, values=has_widths, seed=recipe.seed)] if moments or has_widths else []
    return [*first, Sweep(num_images, on_grids=True, seed=recipe.seed)] if matched and has_widths else first


def check_space(network: Network, space: SearchSpace) -> None:
    """Raises an error for a space of other layers, and for candidates that the network cannot run."""

    def shapes(layers: Sequence[Layer]) -> list[tuple[object, ...]]:
        return [(layer.name, layer.shape, layer.channel_axis) for layer in layers]

    if shapes(network.layers) != shapes(space.layers):
        names = sorted({layer.name for layer in space.layers} ^ {layer.name for layer in network.layers})
        raise ConfigurationError(
            f"the space is of another network; they differ in {', '.join(names[:3]) or 'the shapes or the order of layers'}; "
            "expected network.search_space(...) of this network"
        )
    if len(space.activation_widths) > 1 and any(place.rows is not None for place in network.places):
        raise ConfigurationError(
            f"activations of {list(space.activation_widths)} bits where a weight is split: queries, keys and values read one "
            "input, which has one width; expected a single width, or no split"
        )


def check_calibration(space: SearchSpace, recipe: Recipe, num_images: int) -> None:
    """Raises DataError if something needs calibration images and there are none."""
    readers = [*recipe.corrections, *(["activations"] if space.activation_widths != (None,) else [])]
    if readers and not num_images:
        raise DataError(f"{', '.join(readers)} need calibration images and there are none; expected 256 or more")


def observed(network: Network, recipe: Recipe, images: Sequence[Tensor]) -> dict[str, Tensor]:
    """What corrections of the float network must know about a block of calibration batches, by correction and their own name."""
    corrections = at_stage(recipe.corrections, NetworkCorrection)
    return {f"{name}/{key}": tensor for name, c in corrections.items() for key, tensor in c.observe(network, images).items()}


def equalized(network: Network, recipe: Recipe, blocks: Sequence[Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], list[str]]:
    """Applies the corrections of the float network.

    Args:
        network: The float network.
        recipe: How layers are quantized.
        blocks: What `observed` returns for blocks of calibration images.

    Returns:
        The new values of parameters and buffers by name, and a note for each pair of neighbours.
    """
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    for name, correction in at_stage(recipe.corrections, NetworkCorrection).items():
        own = [{key.removeprefix(f"{name}/"): t for key, t in block.items() if key.startswith(f"{name}/")} for block in blocks]
        equalization = correction.equalize(network.updated(tensors) if tensors else network, own)
        tensors |= equalization.tensors
        notes += [f"{name}: {pair}" for pair in equalization.report]
    return tensors, notes


@torch.inference_mode()
def prepare_layer(
    network: Network, space: SearchSpace, recipe: Recipe, layer: int, layer_input: LayerInput | None
) -> tuple[list[QuantizedLayer], list[str]]:
    """Quantizes one layer at each of its candidates.

    Args:
        network: The float network, equalized if a correction does this.
        space: The options of its layers.
        recipe: How layers are quantized.
        layer: The layer's number.
        layer_input: Statistics of its input on calibration images. None if nothing needs them.

    Returns:
        The quantized layers in the order of the candidates, and notes on corrections that skip the layer. Corrections leave
        a layer in float as it is.
    """
    weight, axis = network.weights[layer], network.layers[layer].channel_axis
    sample = layer_sample(network, layer, layer_input)
    notes: list[str] = []
    candidates = [(bits, width) for bits, width in space.candidates(layer) if bits is not None]
    in_float = [QuantizedLayer(weight)] * (len(space.candidates(layer)) - len(candidates))
    if not candidates:
        return in_float, notes
    grids = {bits: recipe.quantizer.grid(weight, bits, axis) for bits in dict.fromkeys(bits for bits, _ in candidates)}
    codes: Sequence[Tensor] | None = None
    for name, rounding in at_stage(recipe.corrections, Rounding).items():
        reason = rounding.skipped(network.layers[layer]) if sample else "no run of it can be observed"
        if reason or sample is None:
            notes.append(f"{name} leaves {network.layers[layer].name} to rounding to nearest: {reason}")
        else:
            codes = rounding.round(sample, list(grids.values()), recipe.adaround_steps)
    codes = codes or [grid.quantize(weight.float()) for grid in grids.values()]
    weights = {
        bits: QuantizedLayer(grid.dequantize(rounded).to(weight.dtype), None, None, grid)
        for (bits, grid), rounded in zip(grids.items(), codes, strict=True)
    }
    activations = {} if layer_input is None else activation_grids(network, space, recipe, layer, layer_input)
    layers = [replace(weights[bits], activation=None if width is None else activations[width]) for bits, width in candidates]
    for name, correction in at_stage(recipe.corrections, LayerCorrection).items():
        reason = correction.skipped(sample) if sample else "no run of it can be observed"
        if reason or sample is None:
            notes.append(f"{name} leaves {network.layers[layer].name} as it is: {reason}")
        else:
            layers = correction.correct(sample, layers)
    return [*(replace(option, weight=laid_out_like(option.weight, weight)) for option in layers), *in_float], notes


def layer_sample(network: Network, layer: int, layer_input: LayerInput | None) -> LayerSample | None:
    """A layer and its input on calibration images. If a weight is used twice, the first use counts.

    Returns None if the input cannot be observed, or if the operator reads the weight in another shape.
    """
    if layer_input is None or layer_input.moments is None or layer_input.arguments is None:
        return None
    return LayerSample(
        layer=network.layers[layer],
        weight=network.weights[layer],
        bias=network.biases[layer],
        form=MatrixForm.of(network.layers[layer], layer_input.arguments),
        num_images=layer_input.num_images,
        moments=layer_input.moments.shrunk(),
        on_grid={width: moments.shrunk() for width, moments in layer_input.on_grid.items()},
        rows=layer_input.rows,
        takes_bias=network.places[layer].takes_bias and layer_input.uses == 1,
    )


def activation_grids(
    network: Network, space: SearchSpace, recipe: Recipe, layer: int, layer_input: LayerInput
) -> dict[int, ActivationGrid]:
    """The grids of a layer's input over every use of its weight, by width. Empty if inputs stay in float.

    Ranges are fitted on a sample of values and on the exact extremes.
    """
    widths = [width for width in dict.fromkeys(width for _, width in space.candidates(layer)) if width is not None]
    if widths and not len(layer_input.values):
        raise NetworkError(f"the input of {network.layers[layer].name} cannot be observed; leave activations in float")
    ranges = {width: range_of(recipe.activation_range, layer_input.values, width) for width in widths}
    return {width: ActivationGrid.of_range(low, high, width) for width, (low, high) in ranges.items()}


def calibration_batches(images: Tensor, batch_images: int = BATCH_IMAGES) -> list[Tensor]:
    """Images (N, C, H, W) in batches."""
    return list(torch.split(images, batch_images)) if len(images) else []


def check_rounding(corrections: Sequence[str]) -> None:
    """Raises ConfigurationError for two rounding corrections."""
    names = list(at_stage(corrections, Rounding))
    if len(names) > 1:
        raise ConfigurationError(f"corrections names both {' and '.join(names)}; expected one way of rounding")


def names_of(corrections: Sequence[str]) -> str:
    """Names of corrections for a table, in the order in which they act."""
    ordered = sorted(corrections, key=lambda name: STAGES.index(correction_of(name).stage))
    return " + ".join(ordered) or "none"
