"""A configuration opened: network, data, search space, plan and identity. The flow's process and every worker hold one each."""

import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import clado
from clado.choosing.constraints import Constraint, constraint
from clado.choosing.proposals import Budget, budgets_of, check_budgets
from clado.criteria import criterion_of
from clado.data.images import DataSlices, ImageSlice, MemorySlice, check_slice
from clado.data.sources import LoadedNetwork, absent_data, load_data, load_network
from clado.errors import ConfigurationError, DataError, IdentityMismatch, UnreadableImage
from clado.evaluation import Counts, count_each
from clado.grids import QuantizedLayer
from clado.interaction import estimators
from clado.measuring.kinds import tile_kind
from clado.measuring.plan import Plan, Tile, Workload, grown_sample_blocks, sample_blocks
from clado.measuring.scores import Scores, deployed_scores, scores
from clado.measuring.workbench import Workbench, network_batching, rows_per_tile
from clado.network.network import Network, prefers_channels_last
from clado.quantization.corrections import FinalCorrection, NetworkCorrection, at_stage
from clado.quantization.preparation import (
    Prepared,
    Recipe,
    Run,
    advanced,
    calibration_batches,
    check_calibration,
    check_space,
    equalized,
    prepare_layer,
)
from clado.quantization.quantizers import WeightQuantizer
from clado.records import IMAGENET_VALIDATION_IMAGES
from clado.run.plugin_checks import check_constraint, check_plugins
from clado.settings.identity import fingerprint
from clado.settings.schema import ConstraintSettings, RunConfig
from clado.space import Assignment, SearchSpace
from clado.storage.evaluation_cache import EvaluationCache
from clado.storage.measurement_store import MeasurementStore, exists
from clado.storage.prepared_layers import PreparedLayers

EVALUATION_BATCH = 2500  # validation images of one Dask task
ASSIGNMENTS_AT_ONCE = 8  # assignments: decoding is then an eighth as much, and their weights still fit into memory
Variant = Literal["deployed", "probe_model"]


def too_many_unreadable(where: object, names: Sequence[str], allowed: int) -> DataError:
    """What to say where more images cannot be read than the settings allow."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return DataError(
        f"more images below {where} cannot be read than data.max_corrupt_images: {allowed} allows: {shown}; repair or remove "
        "them, or allow more"
    )


@dataclass
class OpenedRun:
    """What a process needs to compute a tile or an evaluation of a run."""

    config: RunConfig
    loaded: LoadedNetwork
    float_network: Network
    slices: DataSlices
    space: SearchSpace
    _is_checked: bool = False
    _runs: tuple[bool, int, Sequence[Run]] | None = None

    @staticmethod
    @lru_cache(maxsize=1)
    def open(config: RunConfig, planning: bool = False) -> "OpenedRun":
        """Loads network and data and refuses what does not fit; touches no server, worker or store. One run at a time is kept.

        `planning`: images that are not there are counted as the settings ask for them, and cannot be read.
        """
        check_plugins(config)
        torch.set_num_threads(config.cluster.threads_per_worker)
        loaded = load_network(config.network)
        absent = planning and config.data.path is not None and not config.data.path.exists()
        slices = (
            absent_data(config.data, loaded.image_shape)
            if absent
            else load_data(config.data, loaded.image_shape, loaded.preprocessing)
        )
        if not absent and criterion_of(config.criterion).needs_labels and not _labelled(slices.sensitivity):
            raise DataError(
                f"criterion {config.criterion} needs labels and the sensitivity images have none; use criterion: kl_to_float"
            )
        device = _device(config.cluster.device)
        channels_last = config.network.channels_last
        if channels_last is None:
            channels_last = prefers_channels_last(loaded.model, device)
        layout = torch.channels_last if channels_last else torch.preserve_format
        network = Network(
            loaded.model.to(device).to(memory_format=layout),
            loaded.example_input.to(device),
            config.network.fixed,
            split=config.network.split,
            graph=config.network.graph,
            numeric=config.network.numeric,
            channels_last=channels_last,
        )
        space = network.search_space(config.bits).restricted(config.layers.bits).tied(config.layers.ties)
        space = space.blocked(config.layers.blocks)
        if config.activations.bits:
            space = space.with_activations(config.activations.bits)
        check_space(network, space)
        return OpenedRun(config, loaded, network, slices, space)

    def checked(self) -> "OpenedRun":
        """This session, or one of the same settings without the images that cannot be read: `data.skip` then names them."""
        session = self if self._is_checked else self._without_unreadable(OpenedRun.check)
        session._is_checked = True  # the command checks before it starts anything, and the flow asks again
        return session

    def with_readable_selection(self) -> "OpenedRun":
        """The same for the images that are left to choose on, which only some commands read; there may be none."""

        def find(session: "OpenedRun") -> list[str]:
            return session._unreadable(session.slices.selection) if len(session.slices.selection) else []

        return self._without_unreadable(find)

    def _without_unreadable(self, find: Callable[["OpenedRun"], list[str]]) -> "OpenedRun":
        session = self
        while unreadable := find(session):
            data, skip = session.config.data, (*session.config.data.skip, *unreadable)
            if len(skip) > data.max_corrupt_images:
                raise too_many_unreadable(data.path, skip, data.max_corrupt_images)
            config = session.config.model_copy(update={"data": data.model_copy(update={"skip": skip})})
            session = OpenedRun.open(config)
        return session

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the record has to know about the data."""
        skip, notes = self.config.data.skip, []
        if skip:
            shown = ", ".join(skip[:5]) + (f" and {len(skip) - 5} more" if len(skip) > 5 else "")
            notes.append(f"{len(skip)} images are left out because they cannot be read, or as data.skip says: {shown}")
        validated = len(self.slices.validation)
        if self.slices.imagenet and validated < IMAGENET_VALIDATION_IMAGES:
            notes.append(
                f"accuracy is counted on {validated:,} of ImageNet's {IMAGENET_VALIDATION_IMAGES:,} validation images: it proves "
                "the path, not the accuracy, and is named top1_subset"
            )
        return tuple(notes)

    def check(self) -> list[str]:
        """Decodes every image once, tries every budget and a store that is there: before anything is started or written.

        Returns the names of images that cannot be read, where some are allowed.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigurationError(f"{self.folder} is a file; expected a folder for the run, or a free name (folder: runs/…)")
        slices = self.slices
        calibration = [slices.calibration] if len(slices.calibration) else []
        if found := self._unreadable(slices.sensitivity, *calibration, slices.validation):
            return found
        check_budgets(self.space, self.budgets, self.limits)
        if exists(self.store_path):
            self.adds_images(MeasurementStore.open(self.store_path))
        return []

    def _unreadable(self, *slices: ImageSlice) -> list[str]:
        """Names of images that cannot be read, where some are allowed; refuses what else is wrong with an image."""
        classes = self.num_logits
        names: list[str] = []
        for images in slices:
            found: dict[int, str] = {}
            allowed = found if self.config.data.max_corrupt_images else None
            check_slice(images, self.loaded.image_shape, classes, unreadable=allowed)
            names += found.values()
        return names

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The budgets asked for."""
        return budgets_of(**self.config.budgets.model_dump())

    @property
    def limits(self) -> list[Constraint]:
        """Limits that every answer must meet beside its budget."""
        return limits_of(self.config, self.space)

    @cached_property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """Sample blocks of the sensitivity set: those of the store, where there is one, and more where the images grew."""
        num_images, num_blocks = len(self.slices.sensitivity), self.config.data.sample_blocks
        if not exists(self.store_path):
            return sample_blocks(num_images, num_blocks)
        return grown_sample_blocks(MeasurementStore.open(self.store_path).coverage["blocks"], num_images, num_blocks)

    @property
    def recipe(self) -> Recipe:
        """How layers are quantized and corrected."""
        settings = self.config.quantizer
        quantizer = WeightQuantizer(settings.weights, settings.granularity == "per_channel", settings.scheme == "symmetric")
        config = self.config
        return Recipe(quantizer, config.activations.range, config.corrections, config.data.seed, config.adaround.steps)

    @cached_property
    def calibration(self) -> list[Tensor]:
        """Calibration images in batches, where anything reads them."""
        if not self.config.corrections and not self.config.activations.bits:
            return []
        images = self.slices.calibration
        network = self.float_network
        return calibration_batches(images.load(0, len(images))[0].to(network.device), network.images_at_once)

    def prepared_layers(self, plain: bool = False) -> PreparedLayers:
        """Where quantized layers are kept: those that ship, or those rounded to nearest without corrections."""
        return PreparedLayers(self.folder / "prepared" / fingerprint(self.plain_identity if plain else self.identity)[:16])

    def equalize(self) -> None:
        """Corrects the float network and keeps what changed, unless that is done."""
        prepared_layers = self.prepared_layers()
        if not prepared_layers.network_file.exists():
            check_calibration(self.space, self.recipe, self.calibration)
            prepared_layers.write_network(*equalized(self.float_network, self.recipe, self.calibration))

    def unprepared(self) -> list[tuple[bool, int]]:
        """(plain, layer) of the layers that are not prepared yet; without corrections the plain ones are those that ship."""
        variants = [False, True] if self.config.corrections else [False]
        return [(plain, layer) for plain in variants for layer in self.prepared_layers(plain).missing(self.space.num_layers)]

    def prepare_layer(self, plain: bool, layer: int) -> None:
        """Quantizes and corrects a layer at each of its candidates, and keeps it."""
        network, recipe = (self.float_network, self.recipe.plain) if plain else (self.network, self.recipe)
        at = self._runs
        runs = at[2] if at is not None and at[0] == plain and at[1] <= layer else self.calibration
        self._runs = plain, layer, advanced(network, runs, layer)
        made = prepare_layer(network, self.space, recipe, layer, self._runs[2])
        self.prepared_layers(plain).write_layer(layer, *made)

    @cached_property
    def network(self) -> Network:
        """The network that is quantized: the float one, as corrections of it left it."""
        if not at_stage(self.config.corrections, NetworkCorrection):
            return self.float_network
        tensors, _ = self.prepared_layers().read_network(self.float_network.device)
        return self.float_network.updated(tensors) if tensors else self.float_network

    @cached_property
    def prepared(self) -> Prepared:
        """Every layer at every candidate as it ships; made here where a command asks for it before a run has."""
        return self._prepared(plain=False)

    @cached_property
    def plain(self) -> Prepared:
        """Every layer at every candidate without corrections."""
        return self._prepared(plain=True) if self.config.corrections else self.prepared

    def _prepared(self, plain: bool) -> Prepared:
        self.equalize()
        for variant, layer in self.unprepared():
            if variant == plain:
                self.prepare_layer(plain, layer)
        self._runs = None  # what is kept of them is large
        prepared_layers, device = self.prepared_layers(plain), self.float_network.device
        layers: list[QuantizedLayer] = []
        notes: list[str] = [] if plain else prepared_layers.read_network(device)[1]
        for layer in range(self.space.num_layers):
            made, further = prepared_layers.read_layer(layer, device)
            layers += made
            notes += further
        network, recipe = (self.float_network, self.recipe.plain) if plain else (self.network, self.recipe)
        return Prepared(network, self.space, recipe, tuple(layers), self.calibration, tuple(notes))

    @cached_property
    def bench(self) -> Workbench:
        """What measuring needs."""
        return self._bench(self.prepared)

    @cached_property
    def plain_bench(self) -> Workbench:
        """The same with layers that are rounded to nearest, without corrections."""
        return self._bench(self.plain)

    def bench_of(self, kind: str) -> Workbench:
        """What measuring a kind of tile needs."""
        return self.plain_bench if tile_kind(kind).is_uncorrected else self.bench

    def _bench(self, prepared: Prepared) -> Workbench:
        return Workbench(
            prepared,
            self.config.criterion,
            self.blocks,
            self.slices.sensitivity.load,
            self.config.measure.batch_images,
            self.configured_limit,
            self.config.measure.batch_statistics,
            self.config.gradients.vectors,
            self.config.gradients.seed,
        )

    def deployed(self, assignment: Assignment) -> tuple[Network, dict[int, QuantizedLayer]]:
        """The network and its layers as they ship, with the corrections that the assignment names.

        Final corrections are made once for an assignment, and kept.
        """
        prepared = self.plain if assignment.corrected == "none" else self.prepared
        chosen = prepared.chosen(assignment)
        if assignment.corrected != "all" or not prepared.has_final or not chosen:
            return prepared.network, chosen
        prepared_layers = self.prepared_layers()
        changed = prepared_layers.read_final(assignment, self.float_network.device)
        if changed is None:
            changed = prepared.final(assignment)
            prepared_layers.write_final(assignment, changed)
        return prepared.network.updated(changed), chosen

    def loss(self, assignment: Assignment) -> Counts:
        """Sums of loss and Brier score of the network that ships over the sensitivity set, and its hits."""
        if assignment.corrected == "all" and not self.has_probe_model:
            return self.probe_loss(assignment)
        network, replaced = self.deployed(assignment)
        folded, replaced = network.folded_with(replaced)
        return self._summed(lambda block: deployed_scores(self.bench, folded, replaced, block))

    def probe_loss(self, assignment: Assignment) -> Counts:
        """The same as probes see it: without final corrections."""
        bench = self.plain_bench if assignment.corrected == "none" else self.bench
        return self._summed(lambda block: scores(bench, assignment, block))

    def other_corrections(self, assignment: Assignment) -> list[Assignment]:
        """The same bits with fewer corrections: without the final ones, where there are some, and without any."""
        if not self.config.corrections:
            return []
        levels = ["static", "none"] if self.images_per_reestimation else ["none"]
        return [assignment.with_corrections(level) for level in ("all", *levels) if level != assignment.corrected]

    @property
    def has_probe_model(self) -> bool:
        """Whether probes measure another network than the one that ships."""
        return bool(at_stage(self.config.corrections, FinalCorrection)) or self.config.measure.batch_statistics

    @property
    def images_per_reestimation(self) -> int:
        """Forward images that final corrections take for each assignment, at most."""
        final = at_stage(self.config.corrections, FinalCorrection).values()
        arguments = self.loaded.model, len(self.slices.calibration), self.config.network.graph
        return sum(correction.forward_images(*arguments) for correction in final)

    def _summed(self, scored: Callable[[int], Scores]) -> Counts:
        found = [scored(block) for block in range(len(self.blocks))]
        loss, brier = (float(sum(getattr(block, name).sum() for block in found)) for name in ("losses", "briers"))
        hits = "".join("01"[int(hit)] for block in found for hit in block.hits)
        return Counts(len(hits), loss, brier=brier, hits=hits)

    def accuracies(self, assignments: Sequence[Assignment], start: int, stop: int) -> list[Counts]:
        """Counts on images start..stop−1 of the validation set, each decoded once, of every assignment as it ships."""
        variants = [self.deployed(assignment) for assignment in assignments]
        return count_each(variants, self.slices.validation, start, stop, reference=self.float_network)

    @property
    def assignments_at_once(self) -> int:
        """How many assignments one task evaluates: several where images are decoded, else one, which spreads the work best."""
        return 1 if isinstance(self.slices.validation, MemorySlice) else ASSIGNMENTS_AT_ONCE

    @cached_property
    def plan(self) -> Plan:
        """The tiles of this run; rows of a tile follow from the store where there is one, else from the memory limit."""
        kinds = estimators.kinds_of(self.config.estimators, bool(self.config.corrections))
        if exists(self.store_path):
            rows = MeasurementStore.open(self.store_path).rows_per_tile
        else:
            widest = max(stop - start for start, stop in self.blocks)
            measuring = self.config.measure
            batching = network_batching(
                self.float_network, widest, measuring.batch_images, self.configured_limit, measuring.batch_statistics
            )
            rows = rows_per_tile(self.float_network, self.space, batching, self.memory_limit)
        return Plan(self.space, self.blocks, kinds, rows, self.config.gradients.vectors, self.config.gradients.seed)

    @cached_property
    def num_logits(self) -> int:
        """Logits of an image."""
        return int(self.float_network.logits(self.float_network.example).shape[1])

    def store_todo(self) -> list[Tile]:
        """Tiles that are not measured yet; IdentityMismatch where the store has other layers or candidates."""
        if not exists(self.store_path):
            return list(self.plan.tiles)
        store = MeasurementStore.open(self.store_path)
        if (store.space.layers, store.space.options) != (self.space.layers, self.space.options):
            store.check(self.identity, store.coverage)
        return store.missing(self.plan)

    @property
    def configured_limit(self) -> int | None:
        """The configured limit in bytes. What is free now shapes tiles once, and nothing that numbers depend on later."""
        limit = self.config.measure.memory_limit_mb
        return None if limit is None else limit * 10**6

    @property
    def memory_limit(self) -> int:
        """Bytes that measuring may take in one worker: as configured, or its part of a quarter of what is free."""
        if self.configured_limit is not None:
            return self.configured_limit
        import psutil

        return int(psutil.virtual_memory().available) // (4 * self.config.cluster.workers)

    @property
    def workload(self) -> Workload:
        """Cost of the network and of its suffixes."""
        network = self.float_network
        return Workload(network.macs, tuple(place.cut.suffix_macs for place in network.places))

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return self.config.run_folder

    @property
    def store_path(self) -> Path | str:
        """Where its measurements are."""
        return store_of(self.config)

    @cached_property
    def contents(self) -> str:
        """Hash of what this process read under the settings, so far as it shapes a number: a worker's is to be the flow's."""
        return fingerprint([self.identity, self.slices.sensitivity.sha256, len(self.slices.validation)])

    @cached_property
    def plain_identity(self) -> dict[str, Any]:
        """What changes the meaning of one number that is measured without corrections."""
        config = self.config
        identity: dict[str, Any] = {
            "weights": self.loaded.weights_sha256,
            "image_shape": list(self.loaded.image_shape),
            "layers": [
                {**asdict(layer), "shape": list(layer.shape), "bits": list(bits)}
                for layer, bits in zip(self.space.layers, self.space.bit_widths, strict=True)
            ],
            "quantizer": config.quantizer.model_dump(mode="json"),
            "criterion": config.criterion,
            "numeric": {"dtype": config.network.numeric, "tf32": config.network.numeric == "tf32"},
        }
        if config.activations.bits:
            identity["activations"] = {
                "bits": list(config.activations.bits),
                "range": config.activations.range,
                "calibration_set": self.slices.calibration.sha256,
            }
        return identity

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What changes the meaning of one number (design: identity)."""
        config, identity = self.config, dict(self.plain_identity)
        if config.corrections:
            identity["corrections"] = sorted(config.corrections)
            identity["calibration_set"] = self.slices.calibration.sha256
            if "adaround" in config.corrections:
                identity["adaround"] = {"steps": config.adaround.steps, "seed": config.data.seed}
        if config.measure.batch_statistics:
            identity["batch_statistics"] = True
        return identity

    @cached_property
    def coverage(self) -> dict[str, Any]:
        """Which images are measured, in which blocks: what may grow."""
        return {"sensitivity_set": self.slices.sensitivity.sha256, "blocks": [list(block) for block in self.blocks]}

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Versions and device: a difference warns."""
        return {
            "clado": clado.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "device": str(self.float_network.device),
            "processor": platform.processor() or platform.machine(),
            "threads": self.config.cluster.threads_per_worker,
        }

    def open_store(self) -> MeasurementStore:
        """The run's store, made where there is none and grown where images were added; IdentityMismatch where it holds other
        numbers."""
        if not exists(self.store_path):
            return MeasurementStore.create(self.store_path, self.plan, self.identity, self.coverage, self.provenance)
        store = MeasurementStore.open(self.store_path)
        if self.adds_images(store):
            store.grow(self.plan, self.coverage)
        return store

    @cached_property
    def store(self) -> MeasurementStore:
        """The run's store as a worker keeps it open, to write tiles one after another."""
        return MeasurementStore.open(self.store_path)

    def as_measured(self) -> "OpenedRun":
        """This session, refused (IdentityMismatch) where network, images or settings are no longer those of the run's store."""
        if self.adds_images(MeasurementStore.open(self.store_path)):
            raise IdentityMismatch(
                f"the settings of {self.folder} ask for more images than were measured; expected `clado run` with them first"
            )
        return self

    def adds_images(self, store: MeasurementStore) -> bool:
        """Whether this run adds images to those of a store; IdentityMismatch where anything else differs. Writes nothing."""
        old, mine = store.coverage, self.coverage
        kept = len(old["blocks"])
        adds = len(mine["blocks"]) > kept and mine["blocks"][:kept] == old["blocks"]
        adds = adds and self._first_images(old["blocks"][-1][1]) == old["sensitivity_set"]
        store.check(self.identity, old if adds else mine)
        return adds

    def _first_images(self, count: int) -> str:
        """Hash of the sensitivity set that the same settings draw with fewer images."""
        fewer = self.config.data.model_copy(update={"sensitivity_images": count})
        return load_data(fewer, self.loaded.image_shape, self.loaded.preprocessing).sensitivity.sha256

    def evaluation_cache(self, which: str, variant: Variant = "deployed") -> EvaluationCache:
        """Evaluations on the `sensitivity` or the `validation` set: of networks that ship, or as probes see them."""
        identity = dict(self.identity)
        if variant == "probe_model":
            identity["variant"] = variant
        identity["slice"] = getattr(self.slices, which).sha256
        return EvaluationCache(self.folder / "evaluations" / which, fingerprint(identity))


def _device(name: str) -> torch.device:
    """Where this process computes; a GPU that is asked for and absent is refused."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("cluster.device is cuda and this process sees no GPU; expected one, or device: cpu or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def store_of(config: RunConfig) -> Path | str:
    """Where a run keeps what it measured: in its folder, or in a bucket."""
    return config.store or config.run_folder / "store.zarr"


def limits_of(config: RunConfig, space: SearchSpace) -> list[Constraint]:
    """The configuration's constraints on a space; a size that counts scales is another cost than the budget's size."""
    return [limit_of(settings, config, space) for settings in config.constraints]


def limit_of(settings: ConstraintSettings, config: RunConfig, space: SearchSpace) -> Constraint:
    """One constraint of a configuration, or of a command line."""
    check_constraint(settings)
    if settings.scales:
        limit = constraint(settings.name, space, settings.bound, overhead_bytes=scale_bytes(config, space))
        return replace(limit, name=f"{settings.name}_with_scales")
    return Budget(settings.name, settings.bound, None if settings.path is None else str(settings.path)).limit(space)


def scale_bytes(config: RunConfig, space: SearchSpace) -> dict[str, int]:
    """Bytes of each layer's float32 scales, and of its 32-bit zero points under the affine scheme."""
    numbers = 2 if config.quantizer.scheme == "affine" else 1
    per_channel = config.quantizer.granularity == "per_channel"
    return {layer.name: 4 * numbers * (layer.num_channels if per_channel else 1) for layer in space.layers}


def _labelled(images: ImageSlice) -> bool:
    """Whether the images have labels, by the first that can be read; those that cannot are counted later."""
    for k in range(len(images)):
        with suppress(UnreadableImage):
            return images.load(k, k + 1)[1] is not None
    return True
