"""The prepared network of a run: every layer at every candidate, made once and kept on disk, and the deployed networks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from clado.grids import QuantizedLayer
from clado.network.network import Network
from clado.quantization.corrections import FinalCorrection, NetworkCorrection, at_stage
from clado.quantization.matrix_form import MatrixForm
from clado.quantization.preparation import (
    Prepared,
    Recipe,
    activation_grids,
    calibration_batches,
    check_calibration,
    equalized,
    observed,
    prepare_layer,
    sweeps,
)
from clado.quantization.reconstruction import EFFORTS, reconstruct
from clado.quantization.sweep import (
    SAMPLED_VALUES,
    LayerInput,
    Sweep,
    calibration_blocks,
    gathering_macs,
    groups_within_memory,
    layer_forms,
    moments_bytes,
)
from clado.run.identity import RunIdentity
from clado.run.inputs import RunInputs
from clado.settings.identity import fingerprint
from clado.space import Assignment
from clado.storage.prepared_layers import PreparedLayers

KEPT_BYTES = 2 * 10**9  # of a block's inputs and outputs, if no limit is configured
# Cost of a unit of work, in multiply-accumulates of large products, on CPUs. They are used only for progress and ETA.
RUN_COST = 2.0  # a multiply-accumulate of the float run
GATHER_COST = 3.0  # one of the second moments
RANGE_COST = 4000.0  # the search for the range of a weight at a width
COLUMN_COST = 6e6  # rounding a column
SWEEPS_COST = 12.0  # a weight at a width, for each column of its layer


@dataclass(frozen=True)
class ObserveTask:
    """What corrections of the float network must know about one block of calibration images."""

    block: int
    """Number of the block."""
    cost: float
    """Multiply-accumulates."""


@dataclass(frozen=True)
class SweepTask:
    """A sweep over one block of calibration images for some layers."""

    plain: bool
    """Whether it is of the network without corrections."""
    on_grids: bool
    """Whether it sweeps inputs on their grids."""
    block: int
    """Number of the block."""
    layers: tuple[int, ...]
    """The layers."""
    cost: float
    """Multiply-accumulates."""


@dataclass(frozen=True)
class RangesTask:
    """The grids of one layer's input."""

    plain: bool
    """Whether it is of the network without corrections."""
    layer: int
    """The layer."""
    cost: float = 0.0
    """It costs almost nothing."""


@dataclass(frozen=True)
class LayerTask:
    """One layer at each of its candidates."""

    plain: bool
    """Whether it is of the network without corrections."""
    layer: int
    """The layer."""
    cost: float
    """Multiply-accumulates, roughly."""


@dataclass(frozen=True)
class ReferenceTask:
    """What final corrections must know about the float network."""

    cost: float
    """Multiply-accumulates."""
    plain: bool = False
    """They are of the network with corrections."""


LayersTask = SweepTask | RangesTask | LayerTask | ReferenceTask
PreparationTask = ObserveTask | LayersTask


class RunPreparation:
    """Prepares the layers of a run, with corrections and plain (rounded to nearest), and reads prepared ones."""

    def __init__(self, inputs: RunInputs, identity: RunIdentity) -> None:
        self.inputs = inputs
        self.identity = identity

    @cached_property
    def calibration(self) -> list[Tensor]:
        """Calibration images in batches, if anything reads them."""
        config = self.inputs.config
        if not config.corrections and not config.activations.bits and config.effort == "fast":
            return []
        images, network = self.inputs.slices.calibration, self.inputs.float_network
        return calibration_batches(images.load(0, len(images))[0].to(network.device), network.images_at_once)

    def files(self, plain: bool = False) -> PreparedLayers:
        """The folder of quantized layers: those with corrections, or the plain ones."""
        document = self.identity.without_corrections if plain else self.identity.document
        return PreparedLayers(self.inputs.folder / "prepared" / fingerprint(document)[:16])

    def observations(self) -> list[ObserveTask]:
        """The tasks that `equalize` needs and whose results are missing. They can be done in any order."""
        files = self.files()
        if files.network_file.exists() or not self.observes:
            return []
        tasks = [ObserveTask(k, self.observation_cost(stop - start)) for k, (start, stop) in enumerate(self.blocks)]
        return [task for task in tasks if not files.inputs.observed_file(task.block).exists()]

    def observation_cost(self, num_images: int) -> float:
        """Multiply-accumulates of observing some images."""
        return RUN_COST * self.inputs.float_network.macs * num_images

    @cached_property
    def observes(self) -> bool:
        """Whether corrections of the float network depend on images."""
        corrections = at_stage(self.inputs.config.corrections, NetworkCorrection).values()
        return any(correction.reads_images(self.inputs.float_network) for correction in corrections)

    def equalize(self) -> None:
        """Corrects the float network and keeps the changes, unless this is already done."""
        files, inputs = self.files(), self.inputs
        if not files.network_file.exists():
            check_calibration(inputs.space, inputs.recipe, len(inputs.slices.calibration))
            for task in self.observations():
                self.do(task)
            numbers = range(len(self.blocks) if self.observes else 0)
            blocks = [files.inputs.read_observed(k, inputs.float_network.device) for k in numbers]
            files.write_network(*equalized(inputs.float_network, inputs.recipe, blocks))

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """Blocks of calibration images with separate sweeps."""
        return calibration_blocks(len(self.inputs.slices.calibration))

    def sweeps(self, plain: bool) -> list[Sweep]:
        """The sweeps that a variant needs."""
        return sweeps(self.inputs.space, self._recipe(plain), len(self.inputs.slices.calibration))

    def unprepared(self) -> list[tuple[bool, int]]:
        """(plain, layer) of the layers that are not prepared yet. Without corrections the plain layers are deployed."""
        variants = [False, True] if self.inputs.config.corrections else [False]
        return [(plain, layer) for plain in variants for layer in self.files(plain).missing(self.inputs.space.num_layers)]

    def stages(self) -> list[list[LayersTask]]:
        """The missing tasks by stage. A stage can begin when the one before it is done.

        The tasks of a stage can be done in any order, by any number of workers, and repeatedly.
        """
        unprepared = self.unprepared()
        floats, on_grids = ([t for p in (False, True) for t in self._sweep_tasks(p, g, unprepared)] for g in (False, True))
        swept = sorted({(task.plain, layer) for task in on_grids for layer in task.layers})
        ranges = [RangesTask(*item) for item in swept if not self.files(item[0]).inputs.ranges_file(item[1]).exists()]
        layers: list[LayersTask] = [LayerTask(plain, layer, self.layer_cost(plain, layer)) for plain, layer in unprepared]
        if self.images_per_reestimation and not self.files().reference_file.exists():
            layers.append(ReferenceTask(2 * self.observation_cost(self.images_per_reestimation)))
        layers.sort(key=lambda task: -task.cost)  # the largest first, so that workers end at about the same time
        return [[*floats], [*ranges], [*on_grids], [*layers]]

    def _sweep_tasks(self, plain: bool, on_grids: bool, unprepared: Sequence[tuple[bool, int]]) -> list[SweepTask]:
        layers = [layer for variant, layer in unprepared if variant == plain]
        same_form = next((sweep for sweep in self.sweeps(plain) if sweep.on_grids == on_grids), None)
        if same_form is None or not layers:
            return []
        widths = len(self.inputs.space.activation_widths) if on_grids else 1
        # the float run itself needs the other half of the limit
        groups = groups_within_memory({i: widths * self.moments_bytes(i) for i in layers}, self.inputs.memory_limit // 2)
        files, tasks = self.files(plain).inputs, []
        for block, (start, stop) in enumerate(self.blocks):
            for group in groups:
                absent = tuple(layer for layer in group if not files.file(layer, block, on_grids).exists())
                if absent:
                    tasks.append(SweepTask(plain, on_grids, block, absent, self.sweep_cost(same_form, absent, stop - start)))
        return tasks

    def _macs_behind(self, layer: int) -> int:
        places = self.inputs.float_network.places
        return places[layer + 1].cut.suffix_macs if layer + 1 < len(places) else 0

    def sweep_cost(self, sweep: Sweep, layers: Sequence[int], num_images: int) -> float:
        """Multiply-accumulates of sweeping over some images: those of the float run, and of the second moments."""
        network, all_images = self.inputs.float_network, len(self.inputs.slices.calibration)
        forward = num_images * (network.macs - self._macs_behind(max(layers)))
        if not (sweep.moments or sweep.on_grids):
            return RUN_COST * forward
        widths = len(self.inputs.space.activation_widths) if sweep.on_grids else 1
        gathered = (gathering_macs(self.forms[i], network.layers[i], all_images) for i in layers if i in self.forms)
        return RUN_COST * forward + GATHER_COST * widths * sum(gathered) * num_images / all_images

    def layer_cost(self, plain: bool, layer: int) -> float:
        """Multiply-accumulates of rounding one layer, roughly: of searching its ranges, and of sweeps over its columns."""
        spec = self.inputs.space.layers[layer]
        columns, rounded = spec.num_weights // spec.num_channels, spec.num_weights * len(self.inputs.space.candidates(layer))
        return float(RANGE_COST * rounded + (0 if plain else COLUMN_COST * columns + SWEEPS_COST * rounded * columns))

    def disk_bytes(self, tasks: Sequence[SweepTask]) -> int:
        """Bytes that these sweeps write: moments, and values for fitting ranges."""
        total = 0
        for task in tasks:
            sweep = self._sweep(task)
            kinds = len(self.inputs.space.activation_widths) if sweep.on_grids else int(sweep.moments)
            values = 4 * SAMPLED_VALUES // len(self.blocks) if sweep.values else 0
            total += sum(kinds * self.moments_bytes(layer) + values for layer in task.layers)
        return total

    def _sweep(self, task: SweepTask) -> Sweep:
        return next(sweep for sweep in self.sweeps(task.plain) if sweep.on_grids == task.on_grids)

    def moments_bytes(self, layer: int) -> int:
        """Bytes of the moments that a block gives of a layer's input."""
        return moments_bytes(self.forms[layer]) if layer in self.forms else 0

    @cached_property
    def forms(self) -> dict[int, MatrixForm]:
        """The matrix form of every layer whose input can be observed."""
        return layer_forms(self.inputs.float_network)

    def do(self, task: PreparationTask) -> None:
        """Does one task, and keeps its result."""
        if isinstance(task, ObserveTask):
            network = self.inputs.float_network
            batches = calibration_batches(self._block(task.block), network.images_at_once)
            self.files().inputs.write_observed(task.block, observed(network, self.inputs.recipe, batches))
            return
        network, recipe, files = self._network(task.plain), self._recipe(task.plain), self.files(task.plain)
        if isinstance(task, SweepTask):
            start, _ = self.blocks[task.block]
            sweep = self._sweep(task)
            if task.on_grids:
                sweep = replace(sweep, grids={layer: files.inputs.read_ranges(layer) for layer in task.layers})
            for layer, layer_inputs in sweep.gather(network, self._block(task.block), start, task.layers).items():
                files.inputs.write(layer, task.block, task.on_grids, layer_inputs)
        elif isinstance(task, RangesTask):
            layer_inputs = self._read_inputs(task.plain, task.layer, on_grids=False)
            files.inputs.write_ranges(task.layer, activation_grids(network, self.inputs.space, recipe, task.layer, layer_inputs))
        elif isinstance(task, ReferenceTask):
            final = at_stage(recipe.corrections, FinalCorrection)
            files.write_references({name: each.reference(network, self.calibration) for name, each in final.items()})
        else:
            layer_input = None
            for sweep in self.sweeps(task.plain):
                layer_inputs = self._read_inputs(task.plain, task.layer, sweep.on_grids)
                layer_input = layer_inputs if layer_input is None else replace(layer_input, on_grid=layer_inputs.on_grid)
            files.write_layer(task.layer, *prepare_layer(network, self.inputs.space, recipe, task.layer, layer_input))

    def _block(self, number: int) -> Tensor:
        """The calibration images of a block."""
        return self.inputs.slices.calibration.load(*self.blocks[number])[0].to(self.inputs.float_network.device)

    def clear(self) -> None:
        """Deletes the results of sweeps when every layer is prepared."""
        for plain in (False, True):
            if not self.files(plain).missing(self.inputs.space.num_layers):
                self.files(plain).inputs.clear()

    def _read_inputs(self, plain: bool, layer: int, on_grids: bool) -> LayerInput:
        device = self.inputs.float_network.device
        return self.files(plain).inputs.read(layer, len(self.blocks), on_grids, device)

    @cached_property
    def network(self) -> Network:
        """The network that is quantized: the float network after its corrections."""
        network = self.inputs.float_network
        if not at_stage(self.inputs.config.corrections, NetworkCorrection):
            return network
        tensors, _ = self.files().read_network(network.device)
        return network.updated(tensors) if tensors else network

    @cached_property
    def corrected(self) -> Prepared:
        """Every layer at every candidate with corrections. They are made now if no run has made them."""
        return self._prepared(plain=False)

    @cached_property
    def plain(self) -> Prepared:
        """Every layer at every candidate without corrections."""
        return self._prepared(plain=True) if self.inputs.config.corrections else self.corrected

    def _network(self, plain: bool) -> Network:
        return self.inputs.float_network if plain else self.network

    def _recipe(self, plain: bool) -> Recipe:
        return self.inputs.recipe.plain if plain else self.inputs.recipe

    def _prepared(self, plain: bool) -> Prepared:
        self.equalize()
        for stage in self.stages():
            for task in stage:
                if task.plain == plain:
                    self.do(task)
        self.clear()
        files, device = self.files(plain), self.inputs.float_network.device
        layers: list[QuantizedLayer] = []
        notes: list[str] = [] if plain else files.read_network(device)[1]
        for layer in range(self.inputs.space.num_layers):
            quantized, layer_notes = files.read_layer(layer, device)
            layers += quantized
            notes += layer_notes
        recipe = self._recipe(plain)
        references = files.read_references(at_stage(recipe.corrections, FinalCorrection), device)
        return Prepared(
            self._network(plain), self.inputs.space, recipe, tuple(layers), self.calibration, tuple(notes), references
        )

    def deployed(self, assignment: Assignment) -> tuple[Network, dict[int, QuantizedLayer]]:
        """The deployed network and its layers, with the corrections that the assignment names.

        Final corrections and reconstructions are made once for an assignment, and kept.
        """
        if assignment.is_reconstructed and not assignment.is_float:
            return self.reconstructed(assignment)
        prepared = self.plain if assignment.corrected == "none" else self.corrected
        layers = prepared.chosen(assignment)
        if assignment.corrected != "all" or not prepared.has_final or not layers:
            return prepared.network, layers
        files = self.files()
        tensors = files.read_final(assignment, self.inputs.float_network.device)
        if tensors is None:
            tensors = prepared.final(assignment)
            files.write_final(assignment, tensors)
        return prepared.network.updated(tensors), layers

    def reconstruction_notes(self, assignment: Assignment) -> list[str]:
        """Notes on the result of a reconstruction. Empty if it was not made."""
        file = self.files().reconstructed_file(assignment, self.inputs.slices.calibration.sha256)
        kept = self.files().read_reconstructed(file, self.inputs.float_network.device)
        return [] if kept is None else kept[2]

    def reconstructed(
        self, assignment: Assignment, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> tuple[Network, dict[int, QuantizedLayer]]:
        """The reconstructed network of an assignment, and its layers.

        It is made once for an assignment, and kept. After each block the trained tensors are kept too, to resume it.
        """
        files, device = self.files(), self.inputs.float_network.device
        file = files.reconstructed_file(assignment, self.inputs.slices.calibration.sha256)
        if (kept := files.read_reconstructed(file, device)) is None:
            made = reconstruct(
                [self.deployed(assignment.with_corrections(level)) for level in ("all", "static")],
                self.network,
                torch.cat(self.calibration),
                self.inputs.space.blocks,
                EFFORTS[assignment.corrected],
                self.inputs.config.data.seed,
                # not the free memory: kept values may differ from recomputed ones in their last digits
                memory_limit=self.inputs.configured_limit or KEPT_BYTES,
                kept=files.read_part(file, device),
                keep=lambda tensors: files.write_part(file, tensors),
                progress=progress,
            )
            files.write_reconstructed(file, made.layers, made.network.changed, made.notes)
            return made.network, made.layers
        layers, tensors, _ = kept
        return self.network.updated(tensors), layers

    @property
    def images_per_reestimation(self) -> int:
        """Forward images that final corrections take for each assignment, at most."""
        inputs = self.inputs
        arguments = inputs.loaded.model, len(inputs.slices.calibration), inputs.config.network.graph
        final = at_stage(inputs.config.corrections, FinalCorrection).values()
        return sum(correction.forward_images(*arguments) for correction in final)
