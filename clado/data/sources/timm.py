"""timm's networks by name, with weights from a local safetensors file: nothing is ever downloaded."""

import warnings
from types import ModuleType
from typing import Any

from torch import nn

from clado.data.images import ImageShape
from clado.errors import NetworkError
from clado.plugins import nearest
from clado.settings.schema import NetworkSettings


def load_network(settings: NetworkSettings) -> tuple[nn.Module, ImageShape]:
    """The architecture of that name; its weights are the file `network.weights`, or random numbers if the settings say so.

    Networks made for one image size (vision transformers) are built for `network.image_shape` where it is given.
    """
    timm = _timm()
    names: list[str] = timm.list_models()
    name, _, tag = settings.name.partition(".")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")] if tag else []
    if tag and name in names and tag not in tags:
        raise NetworkError(f"timm has no weights {tag!r} of {name}{nearest(tag, tags)}; it has {', '.join(tags) or 'none'}")
    if name not in names:
        raise NetworkError(
            f"timm has no network {settings.name!r}{nearest(settings.name, names)}; timm.list_models() names its {len(names)}"
        )
    options: dict[str, object] = {}
    if settings.image_shape is not None:
        options["in_chans"] = settings.image_shape[0]
        if timm.get_pretrained_cfg(settings.name).fixed_input_size:
            options["img_size"] = settings.image_shape[1:]
    model: nn.Module = timm.create_model(settings.name, pretrained=False, **options)
    channels, height, width = timm.get_pretrained_cfg(settings.name).input_size
    return model, (channels, height, width)


def preprocessing(settings: NetworkSettings) -> dict[str, Any]:
    """The preprocessing that timm lists with the weights of that name and tag.

    The resize is the crop divided by the share of the image that the crop keeps.
    """
    config = _timm().get_pretrained_cfg(settings.name)
    shape = settings.image_shape or config.input_size
    values: dict[str, Any] = {"interpolation": config.interpolation}
    if shape[0] == config.input_size[0]:
        values |= {"mean": tuple(config.mean), "std": tuple(config.std)}
    if config.crop_mode == "center":
        values["resize"] = int(max(shape[1:]) / config.crop_pct)
    return values


def _timm() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm imports modules that timm itself has deprecated
            import timm
    except ImportError as error:
        raise NetworkError(f"network.source timm needs timm ({error}); install it: pip install timm") from None
    return timm
