"""Checks before a run starts or writes anything: images, budgets, and an existing store."""

from collections.abc import Callable, Sequence

from clado.choosing.proposals import check_budgets
from clado.data.decoding import EncodedSlice
from clado.data.images import ImageSlice, KeptSlice, check_slice
from clado.errors import ConfigurationError, DataError
from clado.exporting.runtimes import runtime_of
from clado.measuring.workbench import on_device
from clado.run.opened_run import OpenedRun, open_run
from clado.storage.measurement_store import MeasurementStore, exists


def too_many_unreadable(where: object, names: Sequence[str], allowed: int) -> DataError:
    """The error if more images cannot be read than the settings allow."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return DataError(
        f"more images below {where} cannot be read than data.max_corrupt_images: {allowed} allows: {shown}; repair or remove "
        "them, or allow more"
    )


def checked(run: OpenedRun) -> OpenedRun:
    """This run, or a run with the same settings whose `data.skip` names the images that cannot be read."""
    return _without_unreadable(run, check)


def with_readable_selection(run: OpenedRun) -> OpenedRun:
    """The same for the selection images, which only some commands read. There may be none."""
    return _without_unreadable(run, lambda run: _unreadable(run, run.slices.selection) if len(run.slices.selection) else [])


def _without_unreadable(run: OpenedRun, find: Callable[[OpenedRun], list[str]]) -> OpenedRun:
    while names := find(run):
        data, skip = run.config.data, (*run.config.data.skip, *names)
        if len(skip) > data.max_corrupt_images:
            raise too_many_unreadable(data.path, skip, data.max_corrupt_images)
        config = run.config.model_copy(update={"data": data.model_copy(update={"skip": skip})})
        run = open_run(config, exported=run.float_network.portable)
    return run


def check(run: OpenedRun) -> list[str]:
    """Checks every image once, and checks every budget and an existing store, before anything is started or written.

    Returns:
        The names of images that cannot be read, if some are allowed.

    Raises:
        ConfigurationError: The run's folder is a file, or the criterion or the metric fails on the first image.
        DataError: An image does not fit the network, or cannot be read and no image may be left out.
        InfeasibleError: No assignment meets a budget.
        IdentityMismatch: The store holds other numbers.
    """
    if run.folder.exists() and not run.folder.is_dir():
        raise ConfigurationError(f"{run.folder} is a file; expected a folder for the run, or a free name (folder: runs/…)")
    if names := _unreadable(run, *run.slices.used):
        return names
    _try_own_functions(run)
    _check_runtime(run)
    check_budgets(run.space, run.budgets, run.limits)
    if exists(run.store_path):
        run.identity.adds_images(MeasurementStore.open(run.store_path))
    return []


def _try_own_functions(run: OpenedRun) -> None:
    """Raises ConfigurationError for a criterion or a user-defined metric that fails on the first image."""
    tries = {run.packed_criterion.refuse_unfit: run.slices.sensitivity, run.judge.refuse_unfit: run.slices.validation}
    for refuse_unfit, images in tries.items():
        x, targets = on_device(run.float_network, images.load(0, 1))
        refuse_unfit(run.float_network.logits(x), targets)


def _check_runtime(run: OpenedRun) -> None:
    """Refuses a runtime that is not installed, and a network whose outputs are not logits."""
    if run.config.runtime is None:
        return
    runtime_of(run.config.runtime.name).versions()
    if not run.float_network.outputs.are_logits:
        raise ConfigurationError(
            f"the network returns outputs of the form {run.float_network.outputs.text()}, but a runtime is measured "
            "with logits (N, C); expected settings without runtime"
        )


def _unreadable(run: OpenedRun, *slices: ImageSlice) -> list[str]:
    """Names of images that cannot be read, if some are allowed. Raises DataError for other faults of an image."""
    names: list[str] = []
    for images in slices:
        unreadable: dict[int, str] = {}
        allowed = unreadable if run.config.data.max_corrupt_images else None
        try:
            check_slice(images, run.loaded.image_shape, run.num_logits, unreadable=allowed, classes=run.has_classes)
        finally:
            source = images.source if isinstance(images, KeptSlice) else images
            if isinstance(source, EncodedSlice):
                source.end_ahead()
        names += unreadable.values()
    return names
