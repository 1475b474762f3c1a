"""A network or images from Python code: what `package.module:function` returns.

For a network that is a torch.nn.Module, or (torch.nn.Module, example input). For images it is (images, targets), a DataLoader, or
a dictionary of such with the keys train and val.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from clado.data.images import DataSlices, ImageShape, ImageSlice, MemorySlice, PickedSlice, as_slice
from clado.errors import CladoError, ConfigurationError, DataError, NetworkError
from clado.plugins import imported
from clado.settings.schema import DataSettings, NetworkSettings


def load_network(settings: NetworkSettings) -> tuple[nn.Module, Tensor | None]:
    """The network and the example input that the function returns.

    It is called without arguments. It may be in a module of the current directory.
    """
    result = _call(settings.name)
    model, example = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module) or not (example is None or isinstance(example, Tensor)):
        type_names = (
            f"({', '.join(type(element).__name__ for element in result)})" if isinstance(result, tuple) else type(result).__name__
        )
        raise NetworkError(
            f"{settings.name} returned {type_names}; expected a torch.nn.Module, or (torch.nn.Module, example input tensor)"
        )
    return model, example


def load_data(settings: DataSettings, image_shape: ImageShape) -> DataSlices:
    """Slices of what the function returns: an iterable that `clado.data.images.as_slice` takes, or {"train": ..., "val": ...}.

    An `ImageSlice` is read when it is needed. Anything else is held in memory. Sensitivity images are the first of one
    permutation, so a larger set contains the smaller one of the same seed.

    Raises:
        DataError: There are too few images, or they do not fit.
    """
    if settings.factory is None:
        raise ConfigurationError("source factory needs factory: package.module:function, which returns (images, targets)")
    result = _call(settings.factory, DataError)
    parts = result if isinstance(result, Mapping) else {"train": result}
    if not {"train"} <= set(parts) <= {"train", "val"}:
        raise DataError(f"{settings.factory} returned the keys {', '.join(map(str, parts))}; expected train, or train and val")
    slices = {name: as_slice(part, image_shape, classes=False) for name, part in parts.items()}
    training, separate = slices["train"], slices.get("val")
    sensitivity, calibration = settings.sensitivity_images, settings.calibration_images
    validation = (settings.validation_images or 1) if separate is None else 0
    if (needed := sensitivity + calibration + validation) > len(training):
        raise DataError(
            f"{settings.factory} gives {len(training)} images; {needed} are needed: {sensitivity} for sensitivity, {calibration} "
            "for calibration" + (f", at least {validation} for validation" if validation else "")
        )
    order = np.random.default_rng(settings.seed).permutation(len(training)).tolist()
    rest = order[sensitivity : len(order) - calibration]
    if separate is None:
        count = len(rest) if settings.validation_images is None else validation
        validating, rest = _picked(training, rest[:count]), rest[count:]
    else:
        validating = _picked(separate, _validation_order(settings, len(separate)))
    return DataSlices(
        calibration=_picked(training, order[::-1][:calibration]),
        sensitivity=_picked(training, order[:sensitivity]),
        validation=validating,
        selection=_picked(training, rest[: settings.selection_images]),
    )


def _validation_order(settings: DataSettings, count: int) -> list[int]:
    """Numbers of the validation images if they have a separate set: all in order, or as many as the settings ask for."""
    if settings.validation_images is None:
        return list(range(count))
    if settings.validation_images > count:
        raise DataError(f"data.validation_images asks for {settings.validation_images} images; {settings.factory} gives {count}")
    order: list[int] = np.random.default_rng(settings.seed).permutation(count).tolist()
    return order[: settings.validation_images]


def _picked(images: ImageSlice, numbers: Sequence[int]) -> ImageSlice:
    """Some images of a slice, in a given order. They are in memory if the slice is."""
    if not isinstance(images, MemorySlice):
        return PickedSlice([images], numbers)
    x, targets = images.load(0, len(images))
    return MemorySlice(x[list(numbers)], None if targets is None else targets[list(numbers)], images.num_classes)


def _call(name: str, error_type: type[NetworkError] | type[DataError] = NetworkError) -> Any:
    function = imported(name, "factory", "function", error_type)
    if not callable(function):
        module_name, _, key = name.partition(":")
        raise error_type(f"factory {name!r}: {module_name} has no function {key!r}; it is a {type(function).__name__}")
    try:
        return function()
    except CladoError:
        raise
    except Exception as error:
        raise error_type(f"factory {name!r} raised {type(error).__name__}: {error}") from error
