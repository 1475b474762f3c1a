"""Torchvision's classification networks by name, with weights from a local safetensors file: nothing is ever downloaded."""

import warnings
from types import ModuleType

from torch import nn

from clado.config import NetworkSettings
from clado.errors import NetworkError
from clado.images import ImageShape
from clado.plugins import nearest

IMAGE_SHAPE: ImageShape = (3, 224, 224)


def load_network(settings: NetworkSettings) -> tuple[nn.Module, ImageShape]:
    """The architecture of that name; its weights are the file `network.weights`, or random numbers if the settings say so."""
    models = _models()
    valid: list[str] = models.list_models(module=models)
    if settings.name not in valid:
        raise NetworkError(
            f"torchvision has no network {settings.name!r}{nearest(settings.name, valid)}; it has {', '.join(valid)}"
        )
    with warnings.catch_warnings():
        # googlenet and inception_v3 announce another initialisation; the weights that follow replace it.
        warnings.simplefilter("ignore", FutureWarning)
        model: nn.Module = models.get_model(settings.name, weights=None)
    return model, IMAGE_SHAPE


def _models() -> ModuleType:
    try:
        from torchvision import models
    except ImportError as error:
        raise NetworkError(
            f"network.source torchvision needs torchvision ({error}); install it: pip install torchvision"
        ) from None
    return models  # type: ignore[no-any-return]
