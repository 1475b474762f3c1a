"""MCT on EfficientNet-Lite0 and photographs, in an environment of its own: reads images, writes a line of JSON.

    python peer_mct_photos.py IMAGES.safetensors BYTES

IMAGES holds `calibration` (n, 3, 224, 224), `images` and `labels`. `bench_run` calls it. Post-training quantization with MCT's
default target (2, 4 and 8 bits per channel), activations in float, at most BYTES bytes of weights.
"""

import json
import os
import platform
import sys
import time

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.benchmarks.peer_mct import SETTINGS, chosen_bits, quantized, searched, size_bytes, versions

BATCH = 8


class Padded(nn.Sequential):
    """A padding and a convolution, which MCT reads. It does not read a convolution that pads by itself."""


def plain(model: nn.Module) -> nn.Module:
    """The network with ZeroPad2d and Conv2d in the place of its padded convolutions."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Conv2d) and type(child) is not nn.Conv2d:
            conv = nn.Conv2d(
                child.in_channels, child.out_channels, child.kernel_size, child.stride, 0, child.dilation, child.groups,
                child.bias is not None,
            )  # fmt: skip
            conv.load_state_dict({key: value for key, value in child.state_dict().items() if key in ("weight", "bias")})
            padding = getattr(child, "static_padding", None)
            pads = isinstance(padding, nn.ZeroPad2d) and any(padding.padding)
            setattr(model, name, Padded(nn.ZeroPad2d(padding.padding), conv) if pads else conv)
        else:
            plain(child)
    return model


def hits(model: nn.Module, images: Tensor, labels: Tensor) -> list[int]:
    """Whether each image's top class is right."""
    with torch.inference_mode():
        logits = torch.cat([model(batch) for batch in images.split(BATCH)])
    return (logits.argmax(1) == labels).int().tolist()


def main() -> None:
    """Quantizes once, and prints what came out."""
    from clado.data.factories import efficientnet_lite0

    torch.manual_seed(0)
    np.random.seed(0)
    data, limit = load_file(sys.argv[1]), float(sys.argv[2])
    model = plain(efficientnet_lite0()[0].eval())
    expected, actual = (network(data["images"][:4]) for network in (efficientnet_lite0()[0].eval(), model))
    if not torch.allclose(expected, actual, atol=1e-3):
        raise ValueError("the network that MCT gets computes something else")
    layers = searched(model)
    begin = time.perf_counter()
    final, _ = quantized(SETTINGS["symmetric"], model, data["calibration"], limit)
    seconds = time.perf_counter() - begin
    bits = chosen_bits(final, layers)
    line = {
        "bytes": size_bytes(layers, bits),
        "seconds": round(seconds, 1),
        "hits": "".join(map(str, hits(final, data["images"], data["labels"]))),
        "versions": versions(),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
