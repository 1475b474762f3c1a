"""The inputs of a run: settings, network, data and search space, and the plan that follows from them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from clado.choosing.constraints import Constraint
from clado.choosing.proposals import Budget
from clado.criteria import PackedCriterion, packed
from clado.data.images import DataSlices, ImageSlice
from clado.data.sources import LoadedNetwork
from clado.evaluation import Judge
from clado.interaction import estimators
from clado.measuring.plan import Plan, Workload, grown_sample_blocks, sample_blocks
from clado.measuring.workbench import network_batching, rows_per_tile
from clado.network.network import Network
from clado.quantization.preparation import Recipe
from clado.quantization.quantizers import WeightQuantizer
from clado.records.results import IMAGENET_VALIDATION_IMAGES
from clado.run.limits import budgets_of_config, limits_of, store_of
from clado.run.searched import runtime_note
from clado.settings.schema import RunConfig
from clado.space import SearchSpace
from clado.storage.measurement_store import MeasurementStore, exists


@dataclass
class RunInputs:
    """The inputs of a run in this process. Nothing here is quantized or measured yet."""

    config: RunConfig
    """The settings."""
    loaded: LoadedNetwork
    """The network from its source."""
    float_network: Network
    """The same network as a graph whose layers can be replaced, on the device of this process."""
    slices: DataSlices
    """Calibration, sensitivity, selection and validation images."""
    space: SearchSpace
    """The searched layers and their candidate bit-widths."""

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.config.run_folder

    @property
    def store_path(self) -> Path | str:
        """The place of its measurements."""
        return store_of(self.config)

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The budgets asked for."""
        return budgets_of_config(self.config)

    @property
    def limits(self) -> list[Constraint]:
        """Limits that every answer must meet in addition to its budget."""
        return limits_of(self.config, self.space)

    @property
    def recipe(self) -> Recipe:
        """How layers are quantized and corrected."""
        config, settings = self.config, self.config.quantizer
        quantizer = WeightQuantizer(settings.weights, settings.granularity == "per_channel", settings.scheme == "symmetric")
        return Recipe(quantizer, config.activations.range, config.corrections, config.data.seed, config.adaround.steps)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes about the data and the runtime, for the reader of the record."""
        note = runtime_note(self.config, self.float_network, self.space)
        skip, notes = self.config.data.skip, [] if note is None else [note]
        if skip:
            shown = ", ".join(skip[:5]) + (f" and {len(skip) - 5} more" if len(skip) > 5 else "")
            notes.append(f"{len(skip)} images are left out because they cannot be read, or because data.skip names them: {shown}")
        validated = len(self.slices.validation)
        if self.slices.imagenet and validated < IMAGENET_VALIDATION_IMAGES:
            notes.append(
                f"accuracy is counted on {validated:,} of ImageNet's {IMAGENET_VALIDATION_IMAGES:,} validation images: it proves "
                "the path, not the accuracy, and is named top1_subset"
            )
        return tuple(notes)

    @property
    def decision(self) -> ImageSlice:
        """The images that decide between proposals. No proposal is fitted to them, except if there is only one sensitivity image.

        Corrections are not fitted to them either. Fitted rounding is far better on calibration images than on others
        (tests/benchmarks/OVERFITTING.md), so calibration images cannot decide.
        """
        return self.slices.decision or self.slices.sensitivity

    @cached_property
    def packed_criterion(self) -> PackedCriterion:
        """The criterion on the network's outputs."""
        return packed(self.config.criterion, self.float_network.outputs)

    @cached_property
    def judge(self) -> Judge:
        """The user-defined values of each validation image, in addition to a classifier's hits."""
        return Judge.of(self.float_network.outputs, self.config.criterion, self.config.metric)

    @property
    def has_classes(self) -> bool:
        """Whether labels are classes of the network's logits. If not, they are targets of the criterion and the metric."""
        return "classes" in self.packed_criterion.offers

    @cached_property
    def num_logits(self) -> int:
        """Number of logits of an image."""
        return int(self.float_network.logits(self.float_network.example).shape[1])

    @cached_property
    def sample_blocks(self) -> tuple[tuple[int, int], ...]:
        """Sample blocks of the sensitivity set: those of an existing store, and more if images were added."""
        num_images = len(self.slices.sensitivity)
        num_blocks = min(num_images, self.config.data.sample_blocks)  # half of the set may have fewer images than blocks
        if not exists(self.store_path):
            return sample_blocks(num_images, num_blocks)
        return grown_sample_blocks(MeasurementStore.open(self.store_path).coverage["blocks"], num_images, num_blocks)

    @cached_property
    def plan(self) -> Plan:
        """The tiles of this run. The rows of a tile follow from an existing store, else from the memory limit."""
        kinds = estimators.kinds_of(self.config.estimators, bool(self.config.corrections))
        if exists(self.store_path):
            rows = MeasurementStore.open(self.store_path).rows_per_tile
        else:
            widest = max(stop - start for start, stop in self.sample_blocks)
            measuring = self.config.measure
            batching = network_batching(
                self.float_network, widest, measuring.batch_images, self.configured_limit, measuring.batch_statistics
            )
            rows = rows_per_tile(self.float_network, self.space, batching, self.memory_limit)
        return Plan(self.space, self.sample_blocks, kinds, rows, self.config.gradients.vectors, self.config.gradients.seed)

    @property
    def workload(self) -> Workload:
        """Cost of the network and of the part after each cut."""
        network = self.float_network
        return Workload(network.macs, tuple(place.cut.suffix_macs for place in network.places))

    @property
    def configured_limit(self) -> int | None:
        """The configured limit in bytes. Without one, free memory decides the tiles once. Numbers do not depend on it later."""
        limit = self.config.measure.memory_limit_mb
        return None if limit is None else limit * 10**6

    @property
    def memory_limit(self) -> int:
        """Most bytes of measuring in one worker: the configured limit, or the worker's part of a quarter of the free memory."""
        if self.configured_limit is not None:
            return self.configured_limit
        import psutil

        return int(psutil.virtual_memory().available) // (4 * self.config.cluster.workers)
