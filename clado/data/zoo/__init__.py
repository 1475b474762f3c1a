"""The zoo: small networks that we trained on Fashion-MNIST, and images for a demo. `train.py` makes every file again."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from clado.data.zoo.networks import MobileNetV2, ResNet20, UNet, VisionTransformer

ZOO = Path(__file__).parent
MEAN, STD = 0.2860, 0.3530  # of Fashion-MNIST's training pixels, scaled to 0..1
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20_fashion_mnist": ResNet20,
    "mobilenetv2_fashion_mnist": MobileNetV2,
    "vit_fashion_mnist": VisionTransformer,
    "unet_fashion_mnist": UNet,
}
SEGMENTING = frozenset({"unet_fashion_mnist"})
"""Networks that give each pixel of a composite of images a class (`composites.py`). The others give an image its class."""
