"""Torchvision's classification networks by name, with weights from a local file: nothing is ever downloaded."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from clado.data.images import ImageShape
from clado.errors import NetworkError
from clado.plugins import nearest
from clado.settings.schema import NetworkSettings

IMAGE_SHAPE: ImageShape = (3, 224, 224)
INPUT_TRANSFORM = ("googlenet", "inception_v3")
_OF_DENSE = re.compile(
    r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var|num_batches_tracked))"
)


def load_network(settings: NetworkSettings) -> tuple[nn.Module, ImageShape]:
    """The architecture of that name; its weights are the file `network.weights`, or random numbers if the settings say so."""
    models = _models()
    names: list[str] = models.list_models(module=models)
    if settings.name not in names:
        raise NetworkError(
            f"torchvision has no network {settings.name!r}{nearest(settings.name, names)}; it has {', '.join(names)}"
        )
    crop = IMAGE_SHAPE[1] if (weights := _weights(settings)) is None else _transform(weights).crop_size[0]
    # a vision transformer is built for one image size
    options: dict[str, Any] = {"image_size": crop} if crop != IMAGE_SHAPE[1] and settings.name.startswith("vit_") else {}
    if settings.name in INPUT_TRANSFORM and weights is not None:
        options["transform_input"] = True  # the weights expect another normalisation than torchvision lists with them
    with warnings.catch_warnings():
        # googlenet and inception_v3 announce another initialisation; the weights that follow replace it.
        warnings.simplefilter("ignore", FutureWarning)
        model: nn.Module = models.get_model(settings.name, weights=None, **options)
    return model, (IMAGE_SHAPE[0], crop, crop)


def preprocessing(settings: NetworkSettings) -> dict[str, Any]:
    """The preprocessing that torchvision lists with its weights; nothing for other weights.

    Its weights are those that the settings name, or whose published file the settings name.
    """
    if (weights := _weights(settings)) is None:
        return {}
    transform = _transform(weights)
    return {
        "resize": transform.resize_size[0],
        "interpolation": transform.interpolation.value,
        "mean": tuple(transform.mean),
        "std": tuple(transform.std),
    }


def current_names(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict with the names that densely connected layers had when their weights were published: norm.1, now norm1."""
    if not any(_OF_DENSE.fullmatch(name) for name in state):
        return state
    return {_OF_DENSE.sub(r"\1\2", name): tensor for name, tensor in state.items()}


def _weights(settings: NetworkSettings) -> Any:
    """The member of torchvision's enumeration that the settings name, or that is published under the file's name; else None."""
    enumeration = _models().get_model_weights(settings.name)
    if settings.weights_name is not None:
        if settings.weights_name not in enumeration.__members__:
            names = list(enumeration.__members__)
            raise NetworkError(
                f"network.weights_name {settings.weights_name!r} is not among torchvision's weights of {settings.name}"
                f"{nearest(settings.weights_name, names)}; it has {', '.join(names)}"
            )
        return enumeration[settings.weights_name]
    stem = settings.weights.stem if isinstance(settings.weights, Path) else None
    return next((weights for weights in enumeration if PurePosixPath(weights.url).stem == stem), None)


def _transform(weights: Any) -> Any:
    return weights.transforms()


def _models() -> ModuleType:
    try:
        from torchvision import models
    except ImportError as error:
        raise NetworkError(
            f"network.source torchvision needs torchvision ({error}); install it: pip install torchvision"
        ) from None
    return models  # type: ignore[no-any-return]
