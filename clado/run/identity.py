"""The identity of a run: everything that changes the meaning of a measured number, and the check of a store against it."""

import platform
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import torch

import clado
from clado.data.sources import load_data
from clado.errors import IdentityMismatch
from clado.measuring.plan import Tile
from clado.run.inputs import RunInputs
from clado.settings.identity import fingerprint
from clado.storage.measurement_store import MeasurementStore, exists


class RunIdentity:
    """The identity of a run, and its store, which holds only numbers of this identity."""

    def __init__(self, inputs: RunInputs) -> None:
        self.inputs = inputs

    @cached_property
    def without_corrections(self) -> dict[str, Any]:
        """Everything that changes the meaning of a number that is measured without corrections."""
        inputs, config = self.inputs, self.inputs.config
        identity: dict[str, Any] = {
            "weights": inputs.loaded.weights_sha256,
            "image_shape": list(inputs.loaded.image_shape),
            "layers": [
                {**asdict(layer), "shape": list(layer.shape), "bits": list(bits)}
                for layer, bits in zip(inputs.space.layers, inputs.space.bit_widths, strict=True)
            ],
            "quantizer": config.quantizer.model_dump(mode="json"),
            "criterion": config.criterion,
            "numeric": {"dtype": config.network.numeric, "tf32": config.network.numeric == "tf32"},
        }
        if config.activations.bits:
            identity["activations"] = {
                "bits": list(inputs.space.activation_widths),
                "range": config.activations.range,
                "calibration_set": inputs.slices.calibration.sha256,
            }
        return identity

    @cached_property
    def document(self) -> dict[str, Any]:
        """Everything that changes the meaning of a measured number."""
        config, identity = self.inputs.config, dict(self.without_corrections)
        if config.corrections:
            identity["corrections"] = sorted(config.corrections)
            identity["calibration_set"] = self.inputs.slices.calibration.sha256
            if "adaround" in config.corrections:
                identity["adaround"] = {"steps": config.adaround.steps, "seed": config.data.seed}
        if config.measure.batch_statistics:
            identity["batch_statistics"] = True
        return identity

    @cached_property
    def coverage(self) -> dict[str, Any]:
        """The measured images and their blocks. This part may grow."""
        blocks = [list(block) for block in self.inputs.sample_blocks]
        return {"sensitivity_set": self.inputs.slices.sensitivity.sha256, "blocks": blocks}

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Versions and device. A difference causes a warning."""
        return {
            "clado": clado.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "device": str(self.inputs.float_network.device),
            "processor": platform.processor() or platform.machine(),
            "threads": self.inputs.config.cluster.threads_per_worker,
        }

    @cached_property
    def contents(self) -> str:
        """Hash of the network and the images that this process has read. A worker's hash must equal the flow's."""
        slices = self.inputs.slices
        return fingerprint([self.document, slices.sensitivity.sha256, len(slices.validation)])

    def open_store(self) -> MeasurementStore:
        """The run's store. It is made if there is none, and grows if images were added.

        Raises:
            IdentityMismatch: The folder holds a store of other numbers.
        """
        path, plan = self.inputs.store_path, self.inputs.plan
        if not exists(path):
            return MeasurementStore.create(path, plan, self.document, self.coverage, self.provenance)
        store = MeasurementStore.open(path)
        if self.adds_images(store):
            store.grow(plan, self.coverage)
        return store

    @cached_property
    def store(self) -> MeasurementStore:
        """The run's store, which a worker keeps open to write tiles."""
        return MeasurementStore.open(self.inputs.store_path)

    def missing_tiles(self) -> list[Tile]:
        """Tiles that are not measured yet. IdentityMismatch where the store has other layers or candidates."""
        inputs = self.inputs
        if not exists(inputs.store_path):
            return list(inputs.plan.tiles)
        store = MeasurementStore.open(inputs.store_path)
        if (store.space.layers, store.space.options) != (inputs.space.layers, inputs.space.options):
            store.check(self.document, store.coverage)
        return store.missing(inputs.plan)

    def check_measured(self) -> None:
        """Raises IdentityMismatch if network, images or settings differ from those of the run's store."""
        if self.adds_images(MeasurementStore.open(self.inputs.store_path)):
            raise IdentityMismatch(
                f"the settings of {self.inputs.folder} ask for more images than were measured; expected `clado run` with them "
                "first"
            )

    def adds_images(self, store: MeasurementStore) -> bool:
        """Whether this run adds images to those of a store; IdentityMismatch where anything else differs. Writes nothing."""
        old, new = store.coverage, self.coverage
        num_old = len(old["blocks"])
        adds = len(new["blocks"]) > num_old and new["blocks"][:num_old] == old["blocks"]
        adds = adds and self._first_images(old["blocks"][-1][1]) == old["sensitivity_set"]
        store.check(self.document, old if adds else new)
        return adds

    def _first_images(self, count: int) -> str:
        """Hash of the sensitivity set that the same settings give with fewer images."""
        fewer = self.inputs.config.data.model_copy(update={"sensitivity_images": count})
        return load_data(fewer, self.inputs.loaded.image_shape, self.inputs.loaded.preprocessing).sensitivity.sha256
