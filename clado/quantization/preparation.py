"""What each layer becomes at each of its candidate bits: rounded, corrected, its input on a grid. Done once, before measuring.

A probe quantizes a layer by putting its `QuantizedLayer` in place, so the matrix describes the layers that ship, corrections
included. What can only be known of a whole assignment (statistics of batch norm) comes last, in `Prepared.deployed`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clado.errors import ConfigurationError, DataError, NetworkError
from clado.grids import ActivationGrid, QuantizedLayer
from clado.network.graph import laid_out_like
from clado.network.network import Network, State
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

SAMPLED_VALUES = 2**20  # of a layer's input: what a range of activations is fitted on, beside the exact extremes
BATCH_IMAGES = 128
RUNS_BYTES = 2 * 10**9  # of what float runs of all calibration images keep between two layers; beyond that they start anew
Run = Tensor | State  # a batch of images (n, C, H, W), or a float run of one at or before the layer in question


@dataclass(frozen=True)
class Recipe:
    """How layers are quantized: the weights' quantizer, the range of activations (a name of `clado.quantization.quantizers`),
    corrections by name; `seed` and `adaround_steps` are of learned rounding."""

    quantizer: WeightQuantizer = field(default_factory=WeightQuantizer)
    activation_range: str = "mse"
    corrections: tuple[str, ...] = ()
    seed: int = 0
    adaround_steps: int = 1000

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
    """A network ready to be quantized: `layers[k]` stands in for option k; `images` are calibration batches (n, C, H, W)."""

    network: Network
    space: SearchSpace
    recipe: Recipe
    layers: tuple[QuantizedLayer, ...]
    images: Sequence[Tensor] = ()
    notes: tuple[str, ...] = ()
    _references: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def chosen(self, assignment: Assignment) -> dict[int, QuantizedLayer]:
        """Layer -> what stands in its place, for the layers that an assignment quantizes."""
        return {self.space.options[k].layer: self.layers[k] for k in self.space.chosen_options(assignment)}

    @property
    def has_final(self) -> bool:
        """Whether corrections are left that need the whole assignment."""
        return bool(at_stage(self.recipe.corrections, FinalCorrection))

    def final(self, assignment: Assignment) -> dict[str, Tensor]:
        """Parameters and buffers that the final corrections change for an assignment, by name; nothing for the float network."""
        chosen = self.chosen(assignment)
        changed: dict[str, Tensor] = {}
        if chosen:
            for name, correction in at_stage(self.recipe.corrections, FinalCorrection).items():
                if name not in self._references:
                    self._references[name] = correction.reference(self.network, self.images)
                updated = self.network.updated(changed)
                changed |= correction.reestimate(updated, chosen, self.images, self._references[name])
        return changed

    def deployed(self, assignment: Assignment) -> tuple[Network, dict[int, QuantizedLayer]]:
        """The network and its layers as they ship, final corrections applied unless the assignment is deployed without them.

        Raises:
            ConfigurationError: The assignment is deployed without corrections, and these layers have some.
        """
        if assignment.corrected == "none" and self.recipe.corrections:
            raise ConfigurationError(
                f"the assignment is deployed without corrections, and these layers have {names_of(self.recipe.corrections)}; "
                "expected layers from clado.prepare(..., corrections=())"
            )
        changed = self.final(assignment) if self.has_final and assignment.corrected == "all" else {}
        return self.network.updated(changed) if changed else self.network, self.chosen(assignment)


def prepare(network: Network, space: SearchSpace, recipe: Recipe | None = None, images: Sequence[Tensor] = ()) -> Prepared:
    """Every layer at every candidate, in this process. `images` are calibration batches (n, C, H, W).

    Raises DataError where corrections or activations need images and there are none, or too few; ConfigurationError for a space
    of another network.
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
        quantized, further = prepare_layer(network, space, recipe, layer, runs)
        layers += quantized
        notes += further
    return Prepared(network, space, recipe, tuple(layers), images, tuple(notes))


def check_space(network: Network, space: SearchSpace) -> None:
    """Refuses a space of other layers, and candidates that the network cannot run."""

    def shapes(layers: Sequence[Layer]) -> list[tuple[object, ...]]:
        return [(layer.name, layer.shape, layer.channel_axis) for layer in layers]

    if shapes(network.layers) != shapes(space.layers):
        odd = sorted({layer.name for layer in space.layers} ^ {layer.name for layer in network.layers})
        raise ConfigurationError(
            f"the space is of another network: they differ in {', '.join(odd[:3]) or 'the shapes or the order of layers'}; "
            "expected network.search_space(...) of this network"
        )
    if len(space.activation_widths) > 1 and any(rows is not None for _, rows in network.graph.parameters):
        raise ConfigurationError(
            f"activations of {list(space.activation_widths)} bits where a weight is split: queries, keys and values read one "
            "input, which has one width; expected a single width, or no split"
        )


def check_calibration(space: SearchSpace, recipe: Recipe, images: Sequence[Tensor]) -> None:
    """Refuses what needs calibration images where there are none."""
    needs = [*recipe.corrections, *(["activations"] if space.activation_widths != (None,) else [])]
    if needs and not any(len(batch) for batch in images):
        raise DataError(f"{', '.join(needs)} need calibration images and there are none; expected 256 or more")


def equalized(network: Network, recipe: Recipe, images: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(values of parameters and buffers that corrections of the float network change, a note for each of them)."""
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    for name, correction in at_stage(recipe.corrections, NetworkCorrection).items():
        changed = correction.equalize(network.updated(tensors) if tensors else network, images)
        tensors |= changed.tensors
        notes += [f"{name}: {line}" for line in changed.report]
    return tensors, notes


def advanced(network: Network, runs: Sequence[Run], layer: int) -> Sequence[Run]:
    """The same float runs at the cut before a layer, so that a sweep over ascending layers costs one forward in all.

    As they are where what all of them keep would take more than `RUNS_BYTES`.
    """
    alive = max(cut.bytes_per_image for cut in network.graph.cuts)
    if alive * sum(map(num_images, runs)) > RUNS_BYTES:
        return runs
    return [network.advance(network.begin(run) if isinstance(run, Tensor) else run, layer) for run in runs]


def num_images(run: Run) -> int:
    """Images of a batch or of a float run."""
    return len(run) if isinstance(run, Tensor) else int(run.num_images)


@torch.inference_mode()
def prepare_layer(
    network: Network, space: SearchSpace, recipe: Recipe, layer: int, runs: Sequence[Run]
) -> tuple[list[QuantizedLayer], list[str]]:
    """(one layer at each of its candidates, notes on corrections that skip it). `network` is the equalized one, `runs` are its
    float runs of the calibration batches, or the batches themselves."""
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
        known = next((made for (b, _), made in quantized.items() if b == bits), None)
        if known is None:
            grid = recipe.quantizer.grid(weight, bits, axis)
            codes = rounders[0](grid) if rounders else grid.quantize(weight.float())
            known = QuantizedLayer(grid.dequantize(codes).to(weight.dtype), None, None, grid)
        quantized[bits, width] = replace(known, activation=None if width is None else activations[width])
    layers = list(quantized.values())
    for name, correction in at_stage(recipe.corrections, LayerCorrection).items():
        reason = correction.skipped(sample) if sample else "no run of it can be observed"
        if reason or sample is None:
            notes.append(f"{name} leaves {network.layers[layer].name} as it is: {reason}")
        else:
            layers = correction.correct(sample, layers)
    return [replace(made, weight=laid_out_like(made.weight, weight)) for made in layers], notes


def layer_sample(network: Network, layer: int, runs: Sequence[Run]) -> LayerSample | None:
    """A layer and its inputs on calibration batches, as of `prepare_layer`; of a weight that is used twice the first use.

    None where none is seen, or where its operator reads the weight in another shape.
    """
    if not runs or not (calls := network.observe(runs[0], layer)):
        return None
    if calls[0].weight_shape[1:] != tuple(network.weights[layer].shape[1:]):  # rows may be those of a weight that is split
        return None

    def inputs() -> Iterator[Tensor]:
        for run in runs:
            yield network.observe(run, layer)[0].input.to(network.weights[layer].dtype)  # autocast may have made it coarser

    graph, call = network.graph, calls[0]
    return LayerSample(
        layer=network.layers[layer],
        weight=network.weights[layer],
        bias=graph.biases[layer],
        num_images=sum(map(num_images, runs)),
        inputs=inputs,
        apply=partial(_apply, call.apply),
        arguments=call.arguments,
        takes_bias=graph.takes_bias[layer] and len(calls) == 1,
    )


def _apply(operator: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return operator(x, weight, bias)


def activation_grid(network: Network, layer: int, runs: Sequence[Run], bits: int, range_name: str) -> ActivationGrid:
    """The grid of a layer's input, of every use of its weight: range fitted on a sample of values and on the exact extremes."""
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
    """Corrections as tables call them, in the order in which they act."""
    ordered = sorted(corrections, key=lambda name: STAGES.index(correction_of(name).stage))
    return " + ".join(ordered) or "none"
