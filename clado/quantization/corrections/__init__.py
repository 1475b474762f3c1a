"""Corrections that recover accuracy without an extra operation in the deployed network. Each file is one, at one stage.

    stage      when                                  class of the object in the file
    network    once, on the float network            NetworkCorrection
    rounding   for every layer and bit-width         Rounding: one of them at most
    layer      after rounding, for the same          LayerCorrection
    final      once an assignment is known           FinalCorrection

All stages except the last are static: they are done before measuring, and cost a probe nothing.

To add a correction, add a file to this folder with an object `correction = ...` of one of these classes. The file's name is the
correction's name. Subclass a contract for it (tests/contracts/correction.py, tests/contracts/rounding.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from clado.grids import Grid, QuantizedLayer
from clado.network.network import Network
from clado.plugins import load
from clado.quantization.matrix_form import MatrixForm
from clado.quantization.moments import Moments
from clado.space import Layer

STAGES = ("network", "rounding", "layer", "final")
"""The order in which corrections act."""


@dataclass(frozen=True, eq=False)
class LayerSample:
    """A layer of the float network, and its input on the calibration images."""

    layer: Layer
    """The layer."""
    weight: Tensor
    """Its float weight."""
    bias: Tensor | None
    """Its float bias (channels,), or None."""
    form: MatrixForm
    """The layer as a product of matrices: input rows @ `form.columns(weight)`."""
    num_images: int
    """Number of calibration images."""
    moments: Moments
    """Mean and second moments of a sample of its input's rows, shrunk by their sampling noise."""
    on_grid: Mapping[int, Moments] = field(default_factory=dict)
    """Activation width -> moments of the rows of its input on the grid of this width."""
    rows: Tensor = field(default_factory=lambda: torch.zeros(0))
    """A few rows of its input, float32 (groups, rows, columns)."""
    takes_bias: bool = True
    """Whether the layer's bias may be changed, or added."""


class Correction:
    """What the rest of the code must know about a correction. It is an object of the subclass for its stage."""

    stage: ClassVar[str]
    """One of `STAGES`."""


class ChangedNetwork(Protocol):
    """The result of a correction of the float network."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """New values of parameters and buffers, by the module's names."""

    @property
    def report(self) -> Sequence[object]:
        """Notes for the user, one line each."""


@dataclass(frozen=True)
class NetworkCorrection(Correction):
    """Acts once, on the float network."""

    stage = "network"
    observe: Callable[[Network, Sequence[Tensor]], Mapping[str, Tensor]]
    """(float network, batches (n, C, H, W) of a block of calibration images) -> what `equalize` must know about them."""
    equalize: Callable[[Network, Sequence[Mapping[str, Tensor]]], ChangedNetwork]
    """(float network, observations of disjoint blocks) -> its changes. They do not depend on how the images are cut."""
    reads_images: Callable[[Network], bool] = lambda network: True
    """Whether the changes of a network depend on images. If not, `equalize` gets no observations."""


@dataclass(frozen=True)
class Rounding(Correction):
    """Chooses the code of each weight, for every layer and bit-width."""

    stage = "rounding"
    round: Callable[[LayerSample, Sequence[Grid], int], list[Tensor]]
    """(sample, grids of the weight, steps) -> codes for each grid, int32 of the weight's shape."""
    skipped: Callable[[Layer], str | None] = lambda layer: None
    """The reason why a layer is rounded to nearest instead, or None."""


@dataclass(frozen=True)
class LayerCorrection(Correction):
    """Acts on a layer at each of its candidates, after rounding."""

    stage = "layer"
    correct: Callable[[LayerSample, Sequence[QuantizedLayer]], list[QuantizedLayer]]
    """(sample, the layer at each candidate) -> the corrected layers."""
    skipped: Callable[[LayerSample], str | None] = lambda sample: None
    """The reason why a layer is not changed, or None."""


@dataclass(frozen=True)
class FinalCorrection(Correction):
    """Acts once an assignment is known."""

    stage = "final"
    reference: Callable[[Network, Sequence[Tensor]], Mapping[str, Tensor]]
    """(float network, calibration batches) -> the reference: measurements of the float network, made once."""
    reestimate: Callable[[Network, Mapping[int, QuantizedLayer], Sequence[Tensor], Mapping[str, Tensor]], dict[str, Tensor]]
    """(network, layer -> its replacement, calibration batches, reference) -> new parameters and buffers by name."""
    forward_images: Callable[[nn.Module, int, bool], int]
    """(float module, number of calibration images, whether there is a graph) -> forward images of one assignment."""


Stage = TypeVar("Stage", bound=Correction)


def correction_of(name: str) -> Correction:
    """The correction of a name, or of `package.module:name`."""
    correction: Correction = load("corrections", name)
    return correction


def at_stage(names: Sequence[str], stage: type[Stage]) -> dict[str, Stage]:
    """The named corrections that act at a stage, in the order given."""
    corrections = {name: correction_of(name) for name in names}
    return {name: correction for name, correction in corrections.items() if isinstance(correction, stage)}
