"""Milliseconds and bytes of networks in ONNX Runtime, compared with the predictions of a profile. Asserts nothing.

    python -m tests.benchmarks.bench_runtime resnet18 FOLDER --write  # writes files, and says which kernels run
    python -m tests.benchmarks.bench_runtime resnet18 FOLDER          # times them; the machine should do nothing else

Other networks are mobilenet_v2 and vit_b_16, with random weights, and efficientnet_lite0, which needs the extra
`efficientnet`. They run on noise of 224 pixels with one thread. Uniform networks, ONNX Runtime's own `quantize_static`
and networks of random options are timed. docs/limits.md has the figures.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from clado.bits import FLOAT
from clado.exporting.runtimes import median_seconds
from clado.exporting.runtimes.onnxruntime import runtime
from clado.network.network import Network
from clado.quantization.preparation import Recipe, prepare
from clado.quantization.quantizers import WeightQuantizer
from clado.records.text import file_name
from clado.space import Assignment, SearchSpace
from flows.commands.profile import Turns, machine, networks_of, predicted_seconds, table_of, time_turns

STATIC = "quantize_static"
CALIBRATION, TURNS = 4, 9


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


def write(name: str, folder: Path) -> tuple[SearchSpace, dict[str, Assignment]]:
    """Writes the missing networks. Returns the space and the assignments by name."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 224, 224)
    is_transformer = name.startswith("vit")
    split = ["*.in_proj_weight"] if is_transformer else []
    network, calibration = Network(load(name), x[:1], split=split), x[:CALIBRATION]
    folder.mkdir(parents=True, exist_ok=True)
    space = network.search_space((4,) if is_transformer else (4, 8, "float")).with_activations([] if is_transformer else [8])
    networks = {**networks_of(space), **mixed(space)}
    prepared = prepare(network, space, Recipe(WeightQuantizer("minmax"), "minmax"), [calibration])
    for title, assignment in networks.items():
        if not (file := file_of(folder, title)).exists():
            runtime.write(file, *prepared.deployed(assignment), calibration)
    if not (file := file_of(folder, STATIC)).exists() and not is_transformer:
        quantize_static(file_of(folder, FLOAT), file, calibration)
    return space, networks


def mixed(space: SearchSpace) -> dict[str, Assignment]:
    """Three networks of random options: of the quantized options, of 8 bits and float, and of all options."""
    generator = np.random.default_rng(0)
    kinds = {
        "mixed 4, 8": lambda bits: bits is not None,
        "mixed 8, float": lambda bits: bits != 4,
        "mixed 4, 8, float": lambda bits: True,
    }
    named = {}
    for title, takes in kinds.items():
        offered = [[k for k in space.options_of(i) if takes(space.options[k].bits)] for i in range(space.num_layers)]
        if all(offered) and len(space.bit_widths[0]) > 1:
            named[title] = space.assignment([int(generator.choice(options)) for options in offered])
    return named


def file_of(folder: Path, title: str) -> Path:
    """The file of a network."""
    return folder / f"{file_name(title)}.onnx"


def measure(name: str, folder: Path, space: SearchSpace, networks: dict[str, Assignment]) -> None:
    """Prints a line for each network: milliseconds, bytes, and predicted ÷ measured time."""
    x = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(1)).numpy()
    files = {title: file_of(folder, title) for title in [*networks, STATIC] if file_of(folder, title).exists()}
    timed = Turns("benchmark", {"threads": 1})
    profiled = {title: files[title] for title in networks_of(space)}
    time_turns(timed, runtime, profiled, x[:1], space.names, TURNS)
    table = folder / "times.csv"
    table.write_text(table_of(space, timed, 1))
    sessions = {title: runtime.open(file, 1) for title, file in files.items()}
    seconds = median_seconds({title: (lambda run=run: run(x[:1])) for title, run in sessions.items()}, 2 * TURNS)
    expected = sessions[FLOAT](x)
    print(f"{name}: {machine()['processor']}, one thread, {dict(runtime.versions())}")
    for title, run in sessions.items():
        assignment = networks.get(title)
        ratio = "-"
        if assignment is not None and len(space.chosen_options(assignment)) == space.num_layers:
            ratio = f"{predicted_seconds(table, space, assignment) / seconds[title]:.3f}"
        print(
            f"{title:<18} {1000 * seconds[title]:8.2f} ms  {seconds[FLOAT] / seconds[title]:5.2f} times as fast as float  "
            f"predicted ÷ measured {ratio:>6}  {files[title].stat().st_size:>12,} bytes  "
            f"logits {float(np.abs(run(x) - expected).mean()):.3f} from float"
        )


def kernels(folder: Path, space: SearchSpace, networks: dict[str, Assignment]) -> None:
    """Prints the kernels of each network, and the bytes of codes and scales as a share of their claim."""
    for title, assignment in networks.items():
        file = file_of(folder, title)
        claimed = sum(
            layer.weight_bytes(bits) + 4 * layer.num_channels
            for layer, bits in zip(space.layers, assignment.bits, strict=True)
            if bits is not None
        )
        linear = sum(layer.operator == "linear" for layer in space.layers)
        share = f"codes and scales {sum(runtime.code_bytes(file).values()) / claimed:.4f} of their claim; " if claimed else ""
        print(f"{title}: {share}{linear} linear layers; {dict(runtime.kernels(file))}")


if __name__ == "__main__":
    network_name, home, *rest = sys.argv[1:]
    written = write(network_name, Path(home))
    if rest == ["--write"]:
        kernels(Path(home), *written)
    else:
        measure(network_name, Path(home), *written)
