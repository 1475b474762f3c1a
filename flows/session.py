"""A configuration opened: network, data, search space, plan and identity. The flow's process and every worker hold one each."""

import platform
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import clado
from clado import estimators
from clado.candidates import Budget, budgets_of, check_budgets
from clado.config import RunConfig, fingerprint
from clado.constraints import Constraint, size
from clado.errors import ConfigurationError, DataError
from clado.evaluation import Counts, count
from clado.images import DataSlices, check_slice
from clado.ledger import Ledger
from clado.measure import Workbench, losses, network_batching, rows_per_tile
from clado.network import Network
from clado.probes import Plan, Workload, sample_blocks
from clado.quantizers import WeightQuantizer
from clado.shards import Store
from clado.sources import LoadedNetwork, load_data, load_network
from clado.space import Assignment, SearchSpace

EVALUATION_SHARD = 2500  # validation images of one Dask task


@dataclass
class Session:
    """What a process needs to compute a tile or an evaluation of a run."""

    config: RunConfig
    loaded: LoadedNetwork
    network: Network
    slices: DataSlices
    space: SearchSpace

    @staticmethod
    @lru_cache(maxsize=1)
    def open(config: RunConfig) -> "Session":
        """Loads network and data and refuses what does not fit; touches no server, worker or store. One run at a time is kept."""
        torch.set_num_threads(config.cluster.threads_per_worker)
        loaded = load_network(config.network)
        slices = load_data(config.data, loaded.image_shape)
        if config.criterion == "cross_entropy" and slices.sensitivity.load(0, 1)[1] is None:
            raise DataError(
                "criterion cross_entropy needs labels and the sensitivity images have none; use criterion: kl_to_float"
            )
        _refuse_unmatched(config.network.fixed, [name for name, _ in loaded.model.named_parameters()])
        network = Network(loaded.model, loaded.example_input, config.network.fixed, graph=config.network.graph)
        space = network.search_space(config.bits).restricted(config.layers.bits).tied(config.layers.ties)
        return Session(config, loaded, network, slices, space)

    def check(self) -> None:
        """Decodes every image once, tries every budget and a store that is there: before anything is started or written."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigurationError(f"{self.folder} is a file; expected a folder for the run, or a free name (folder: runs/…)")
        classes = int(self.network.logits(self.network.example).shape[1])
        for images in (self.slices.sensitivity, self.slices.validation):
            check_slice(images, self.loaded.image_shape, classes)
        check_budgets(self.space, self.budgets, self.limits)
        if self.store_path.exists():
            self.open_store()

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The budgets asked for."""
        return budgets_of(**self.config.budgets.model_dump())

    @property
    def limits(self) -> list[Constraint]:
        """Limits that every answer must meet beside its budget."""
        return limits_of(self.config, self.space)

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """Sample blocks of the sensitivity set."""
        return sample_blocks(len(self.slices.sensitivity), self.config.data.sample_blocks)

    @cached_property
    def bench(self) -> Workbench:
        """What measuring needs, every weight quantized once."""
        settings = self.config.quantizer
        quantizer = WeightQuantizer(settings.weights, settings.granularity == "per_channel", settings.scheme == "symmetric")
        load = self.slices.sensitivity.load
        return Workbench(
            self.network,
            self.space,
            quantizer,
            self.config.criterion,
            self.blocks,
            load,
            self.config.measure.batch_images,
            self.configured_limit,
        )

    def loss(self, assignment: Assignment) -> Counts:
        """Sum of an assignment's loss over the sensitivity set, block by block."""
        sums = [losses(self.bench, assignment, block) for block in range(len(self.blocks))]
        return Counts(sum(map(len, sums)), float(sum(part.sum() for part in sums)))

    def accuracy(self, assignment: Assignment, start: int, stop: int) -> Counts:
        """Counts of an assignment on images start..stop−1 of the validation set."""
        return count(self.network, self.bench.weights(assignment), self.slices.validation, start, stop)

    @cached_property
    def plan(self) -> Plan:
        """The tiles of this run; rows of a tile follow from the store where there is one, else from the memory limit."""
        kinds = estimators.kinds_of(self.config.estimators)
        if self.store_path.exists():
            rows = Store.open(self.store_path).rows_per_tile
        else:
            widest = max(stop - start for start, stop in self.blocks)
            batching = network_batching(self.network, widest, self.config.measure.batch_images, self.configured_limit)
            rows = rows_per_tile(self.network, self.space, batching, self.memory_limit)
        return Plan(self.space, self.blocks, kinds, rows)

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
        graph = self.network.graph
        return Workload(graph.macs, tuple(cut.suffix_macs for cut in graph.cuts))

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return self.config.run_folder

    @property
    def store_path(self) -> Path:
        """Where its measurements are."""
        return self.folder / "store.zarr"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What changes the meaning of one number (design: identity)."""
        config = self.config
        return {
            "weights": self.loaded.weights_sha256,
            "image_shape": list(self.loaded.image_shape),
            "quantizer": config.quantizer.model_dump(mode="json"),
            "criterion": config.criterion,
            "numeric": {"dtype": "float32", "tf32": False},
        }

    @cached_property
    def coverage(self) -> dict[str, Any]:
        """What was measured of it: layers, bits, images."""
        layers = [{**asdict(layer), "shape": list(layer.shape)} for layer in self.space.layers]
        return {
            "layers": layers,
            "bits": [list(bits) for bits in self.space.bit_widths],
            "sensitivity_set": self.slices.sensitivity.sha256,
            "blocks": [list(block) for block in self.blocks],
        }

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Versions and device: a difference warns."""
        return {
            "clado": clado.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "device": str(self.network.device),
            "processor": platform.processor() or platform.machine(),
            "threads": self.config.cluster.threads_per_worker,
        }

    def open_store(self) -> Store:
        """The run's store, made where there is none; IdentityMismatch where it holds other numbers."""
        if not self.store_path.exists():
            return Store.create(self.store_path, self.plan, self.identity, self.coverage, self.provenance)
        store = Store.open(self.store_path)
        store.check(self.identity, self.coverage)
        return store

    def ledger(self, which: str) -> Ledger:
        """Evaluations on the `sensitivity` or the `validation` set."""
        identity = {**self.identity, "slice": getattr(self.slices, which).sha256, "layers": self.space.names}
        return Ledger(self.folder / "evaluations" / which, fingerprint(identity))


def limits_of(config: RunConfig, space: SearchSpace) -> list[Constraint]:
    """The configuration's constraints on a space; a size that counts scales is another cost than the budget's size."""
    limits = []
    for c in config.constraints:
        if c.scales:
            counted = size.constraint(space, c.bound, scale_bytes(config, space))
            limits.append(replace(counted, name="size_with_scales"))
        else:
            limits.append(Budget(c.kind, c.bound, None if c.path is None else str(c.path)).constraint(space))
    return limits


def scale_bytes(config: RunConfig, space: SearchSpace) -> dict[str, int]:
    """Bytes of each layer's float32 scales, and of its 32-bit zero points under the affine scheme."""
    numbers = 2 if config.quantizer.scheme == "affine" else 1
    per_channel = config.quantizer.granularity == "per_channel"
    return {layer.name: 4 * numbers * (layer.num_channels if per_channel else 1) for layer in space.layers}


def _refuse_unmatched(patterns: tuple[str, ...], names: list[str]) -> None:
    """A `fixed` pattern that matches nothing is a typing error, and would search a layer that should stay."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigurationError(f"network.fixed: no parameter matches {pattern!r}; names are such as {', '.join(names[:3])}")
