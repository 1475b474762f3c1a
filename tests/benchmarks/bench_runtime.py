"""Milliseconds and bytes of uniform networks in ONNX Runtime, compared with its `quantize_static`. Asserts nothing.

    python -m tests.benchmarks.bench_runtime resnet18           # torchvision's, random weights
    python -m tests.benchmarks.bench_runtime efficientnet_lite0 # needs the extra `efficientnet`

Networks run on noise of 224 pixels with one thread. docs/limits.md has the figures.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from clado.exporting.runtimes import median_seconds
from clado.exporting.runtimes.onnxruntime import runtime
from clado.network.network import Network
from clado.quantization.preparation import Recipe, prepare
from clado.quantization.quantizers import WeightQuantizer

OPTIONS = ((8, 8), (4, 8))
CALIBRATION, TURNS = 4, 15


def load(name: str) -> nn.Module:
    """The module, in eval mode."""
    if name == "efficientnet_lite0":
        from clado.data.factories import efficientnet_lite0

        network = efficientnet_lite0()
        return (network[0] if isinstance(network, tuple) else network).eval()
    from torchvision.models import get_model

    return get_model(name, weights=None).eval()


def quantize_static(path: Path, target: Path, x: Tensor) -> None:
    """ONNX Runtime's own quantization, per channel."""
    from onnxruntime import quantization
    from onnxruntime.quantization import shape_inference

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.images: Iterator[dict[str, np.ndarray]] = iter([{"images": image[None].numpy()} for image in x])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.images, None)

    shape_inference.quant_pre_process(str(path), str(target.with_suffix(".pre")))
    types = {"weight_type": quantization.QuantType.QInt8, "activation_type": quantization.QuantType.QUInt8}
    quantization.quantize_static(str(target.with_suffix(".pre")), str(target), Reader(), per_channel=True, **types)


def main(name: str, folder: Path) -> None:
    """Prints a line for each network."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 224, 224)
    network, calibration = Network(load(name), x[:1]), x[:CALIBRATION]
    files = {"float": folder / "float.onnx"}
    runtime.write(files["float"], network, {}, calibration)
    for bits, activation_bits in OPTIONS:
        space = network.search_space((bits,)).with_activations([activation_bits])
        prepared = prepare(network, space, Recipe(WeightQuantizer("minmax"), "minmax"), [calibration])
        file = files[f"{bits}/{activation_bits}"] = folder / f"{bits}-{activation_bits}.onnx"
        runtime.write(file, *prepared.deployed(space.widest), calibration)
        claimed = sum(layer.weight_bytes(bits) + 4 * layer.num_channels for layer in network.layers)
        stored = sum(runtime.code_bytes(file).values())
        print(f"{bits}/{activation_bits}: codes and scales {stored / claimed:.4f} of their claim; {dict(runtime.kernels(file))}")
    files["quantize_static"] = folder / "static.onnx"
    quantize_static(files["float"], files["quantize_static"], calibration)
    sessions = {key: runtime.open(file, 1) for key, file in files.items()}
    expected = sessions["float"](x.numpy())
    one = x[:1].numpy()
    seconds = median_seconds({key: (lambda run=run: run(one)) for key, run in sessions.items()}, TURNS)
    for key, run in sessions.items():
        difference = float(np.abs(run(x.numpy()) - expected).mean())
        print(
            f"{key:<16} {1000 * seconds[key]:8.2f} ms {files[key].stat().st_size:>12,} bytes, logits {difference:.3f} from float"
        )


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        main(sys.argv[1], Path(temporary))
