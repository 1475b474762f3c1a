"""A run that has been opened. The process of the flow and every worker hold one."""

from contextlib import suppress
from dataclasses import replace
from functools import cached_property

import torch

from clado.criteria import criterion_of, packed
from clado.data.decoding import EncodedSlice
from clado.data.images import DataSlices, ImageSlice, kept
from clado.data.sources import LoadedNetwork, absent_data, load_data, load_network
from clado.errors import ConfigurationError, DataError, UnreadableImage
from clado.interaction.estimators import check_criterion
from clado.network.network import Network, prefers_channels_last
from clado.network.portable import PortableGraph
from clado.quantization.preparation import check_space
from clado.run.evaluation import RunEvaluation
from clado.run.identity import RunIdentity
from clado.run.inputs import RunInputs
from clado.run.plugin_checks import check_plugins
from clado.run.preparation import RunPreparation
from clado.run.searched import search_space
from clado.settings.schema import RunConfig

KEPT_SHARE = 8
"""Decoded images of a set that is read for every assignment take at most this fraction (1 / n) of a worker's memory."""


class OpenedRun(RunInputs):
    """Everything that a process needs to compute a tile or an evaluation of a run. Parts are made at their first use."""

    @cached_property
    def identity(self) -> RunIdentity:
        """Its identity and its store."""
        return RunIdentity(self)

    @cached_property
    def preparation(self) -> RunPreparation:
        """Its layers at every candidate, and the networks that assignments deploy."""
        return RunPreparation(self, self.identity)

    @cached_property
    def evaluation(self) -> RunEvaluation:
        """Losses and accuracies of its assignments."""
        return RunEvaluation(self, self.identity, self.preparation)


def open_run(
    config: RunConfig, *, planning: bool = False, exported: PortableGraph | None = None, checking: bool = False
) -> OpenedRun:
    """Loads network and data, and raises an error if something does not fit. It uses no server, worker, store or cache.

    Args:
        config: The settings.
        planning: Missing images are only counted, with the numbers of the settings.
        exported: The network's graph, if another process with the same settings has exported it.
        checking: All images will be checked next (`clado.run.checks`), so they are checked while the network is exported.

    Raises:
        DataError: The criterion needs labels and there are none, or the images do not fit.
        ConfigurationError: The settings do not fit the network or this machine.
    """
    check_plugins(config)
    torch.set_num_threads(config.cluster.threads_per_worker)
    loaded = load_network(config.network)
    slices = _load_slices(config, loaded, planning)
    if checking:
        for images in slices.used:
            if isinstance(images, EncodedSlice):
                images.check_ahead()
    network = _float_network(config, loaded, exported)
    space = search_space(config, network)
    check_space(network, space)
    check_criterion(config.estimators, config.criterion, packed(config.criterion, network.outputs).offers)
    run = OpenedRun(config, loaded, network, slices, space)
    if not planning:
        limit = run.memory_limit // KEPT_SHARE
        run.slices = replace(
            slices,
            sensitivity=kept(slices.sensitivity, limit),
            decision=None if slices.decision is None else kept(slices.decision, limit),
            selection=kept(slices.selection, limit),
        )
    return run


def _load_slices(config: RunConfig, loaded: LoadedNetwork, planning: bool) -> DataSlices:
    if planning and config.data.path is not None and not config.data.path.exists():
        return absent_data(config.data, loaded.image_shape).held_out()
    slices = load_data(config.data, loaded.image_shape, loaded.preprocessing).held_out()
    if criterion_of(config.criterion).needs_targets and not _labelled(slices.sensitivity):
        raise DataError(
            f"criterion {config.criterion} needs labels and the sensitivity images have none; use criterion: kl_to_float"
        )
    return slices


def _float_network(config: RunConfig, loaded: LoadedNetwork, exported: PortableGraph | None) -> Network:
    """The loaded network as a graph, on the device of this process."""
    device = _device(config.cluster.device)
    channels_last = config.network.channels_last
    if channels_last is None:
        channels_last = prefers_channels_last(loaded.model, device)
    layout = torch.channels_last if channels_last else torch.preserve_format
    return Network(
        loaded.model.to(device).to(memory_format=layout),
        loaded.example_input.to(device),
        config.network.fixed,
        split=config.network.split,
        graph=config.network.graph,
        numeric=config.network.numeric,
        channels_last=channels_last,
        exported=exported,
    )


def _device(name: str) -> torch.device:
    """The device of this process. Raises ConfigurationError if the settings ask for a GPU and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("cluster.device is cuda and this process sees no GPU; expected one, or device: cpu or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _labelled(images: ImageSlice) -> bool:
    """Whether the images have labels, by the first image that can be read. Unreadable images are counted later."""
    for k in range(len(images)):
        with suppress(UnreadableImage):
            return images.load(k, k + 1)[1] is not None
    return True
