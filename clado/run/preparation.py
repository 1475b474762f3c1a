"""The prepared network of a run: every layer at every candidate, made once and kept on disk; what an assignment deploys."""

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from clado.grids import QuantizedLayer
from clado.network.network import Network
from clado.quantization.corrections import FinalCorrection, NetworkCorrection, at_stage
from clado.quantization.preparation import (
    Prepared,
    Recipe,
    Run,
    advanced,
    calibration_batches,
    check_calibration,
    equalized,
    prepare_layer,
)
from clado.run.identity import RunIdentity
from clado.run.inputs import RunInputs
from clado.settings.identity import fingerprint
from clado.space import Assignment
from clado.storage.prepared_layers import PreparedLayers


class RunPreparation:
    """Prepares the layers of a run, with corrections and plain (rounded to nearest), and reads what is kept of them."""

    def __init__(self, inputs: RunInputs, identity: RunIdentity) -> None:
        self.inputs = inputs
        self.identity = identity
        self._runs: tuple[bool, int, Sequence[Run]] | None = None  # float runs at the layer prepared last: (plain, layer, runs)

    @cached_property
    def calibration(self) -> list[Tensor]:
        """Calibration images in batches, where anything reads them."""
        if not self.inputs.config.corrections and not self.inputs.config.activations.bits:
            return []
        images, network = self.inputs.slices.calibration, self.inputs.float_network
        return calibration_batches(images.load(0, len(images))[0].to(network.device), network.images_at_once)

    def files(self, plain: bool = False) -> PreparedLayers:
        """Where quantized layers are kept: those with corrections, or the plain ones."""
        document = self.identity.without_corrections if plain else self.identity.document
        return PreparedLayers(self.inputs.folder / "prepared" / fingerprint(document)[:16])

    def equalize(self) -> None:
        """Corrects the float network and keeps what changed, unless that is done."""
        files, inputs = self.files(), self.inputs
        if not files.network_file.exists():
            check_calibration(inputs.space, inputs.recipe, self.calibration)
            files.write_network(*equalized(inputs.float_network, inputs.recipe, self.calibration))

    def unprepared(self) -> list[tuple[bool, int]]:
        """(plain, layer) of the layers that are not prepared yet. Without corrections the plain layers are deployed."""
        variants = [False, True] if self.inputs.config.corrections else [False]
        return [(plain, layer) for plain in variants for layer in self.files(plain).missing(self.inputs.space.num_layers)]

    def prepare_layer(self, plain: bool, layer: int) -> None:
        """Quantizes and corrects a layer at each of its candidates, and keeps it."""
        network, recipe = self._variant(plain)
        last = self._runs
        runs = last[2] if last is not None and last[0] == plain and last[1] <= layer else self.calibration
        self._runs = plain, layer, advanced(network, runs, layer)
        self.files(plain).write_layer(layer, *prepare_layer(network, self.inputs.space, recipe, layer, self._runs[2]))

    @cached_property
    def network(self) -> Network:
        """The network that is quantized: the float one, as corrections of it left it."""
        network = self.inputs.float_network
        if not at_stage(self.inputs.config.corrections, NetworkCorrection):
            return network
        tensors, _ = self.files().read_network(network.device)
        return network.updated(tensors) if tensors else network

    @cached_property
    def corrected(self) -> Prepared:
        """Every layer at every candidate with corrections; made here where a command asks for it before a run has."""
        return self._prepared(plain=False)

    @cached_property
    def plain(self) -> Prepared:
        """Every layer at every candidate without corrections."""
        return self._prepared(plain=True) if self.inputs.config.corrections else self.corrected

    def _variant(self, plain: bool) -> tuple[Network, Recipe]:
        recipe = self.inputs.recipe
        return (self.inputs.float_network, recipe.plain) if plain else (self.network, recipe)

    def _prepared(self, plain: bool) -> Prepared:
        self.equalize()
        for variant, layer in self.unprepared():
            if variant == plain:
                self.prepare_layer(plain, layer)
        self._runs = None  # what is kept of them is large
        files, device = self.files(plain), self.inputs.float_network.device
        layers: list[QuantizedLayer] = []
        notes: list[str] = [] if plain else files.read_network(device)[1]
        for layer in range(self.inputs.space.num_layers):
            quantized, layer_notes = files.read_layer(layer, device)
            layers += quantized
            notes += layer_notes
        network, recipe = self._variant(plain)
        return Prepared(network, self.inputs.space, recipe, tuple(layers), self.calibration, tuple(notes))

    def deployed(self, assignment: Assignment) -> tuple[Network, dict[int, QuantizedLayer]]:
        """The network and its layers as deployed, with the corrections that the assignment names.

        Final corrections are made once for an assignment, and kept.
        """
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

    @property
    def images_per_reestimation(self) -> int:
        """Forward images that final corrections take for each assignment, at most."""
        inputs = self.inputs
        arguments = inputs.loaded.model, len(inputs.slices.calibration), inputs.config.network.graph
        final = at_stage(inputs.config.corrections, FinalCorrection).values()
        return sum(correction.forward_images(*arguments) for correction in final)
