"""ONNX Runtime on a CPU.

Integer kernels exist for these options. `_onnx_layout.py` writes the graph so that they are used:

- weights of 2, 4 or 8 bits and inputs of 8 bits: convolutions (`QLinearConv`) and linear layers
  (`QGemm`, `MatMulIntegerToFloat`). All compute on int8, so fewer bits save bytes but no time.
- weights of 2, 4 or 8 bits and inputs in float: linear layers and 1x1 convolutions (`MatMulNBits`).

On CPUs without VNNI, sums of 8-bit codes saturate. MobileNetV2's logits are then ten times as far
off. The session option `session.x64quantprecision` prevents it, and takes 1.4 times the time. A
file's metadata says whether it needs the option. On a Xeon with VNNI and AMX the option changed no
output, and took 1.8 times the time. So it is set only on CPUs whose sums saturate.

Everything else computes in float32. 3, 5, 6 and 7 bits are stored in a wider type, so the file is
larger than claimed.

Needs ONNX Runtime 1.25 or later. Telemetry is switched off before it is imported.

Sources: onnxruntime.ai (graph optimisations, profiling); github.com/microsoft/onnxruntime, pull
requests 27614 and 27769 (`MatMulNBits` from DequantizeLinear and MatMul) and 27379 (telemetry).
"""

import base64
import json
import os
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from clado.errors import ConfigurationError, NetworkError
from clado.exporting._onnx_agreement import library
from clado.exporting._torch_module import as_layers
from clado.exporting.onnx import OPSET, TWO_BITS, export_onnx
from clado.exporting.packed import bits_of
from clado.exporting.runtimes import LayerTimes, Logits, Runtime
from clado.exporting.runtimes._onnx_layout import EXACT_SUMS, PRODUCTS, SESSION, lay_out
from clado.network.network import Network, Replaced
from clado.space import Layer

OLDEST = (1, 25)
STORED = (2, 4, 8)
RANGE_BATCH = 16  # images of a pass that looks for ranges; few, because every result is kept
WARM_UP = 2
SUMS = base64.b64decode("CAo6OAoYCgFhCgFiEgFjIg1NYXRNdWxJbnRlZ2VyEgFnWgkKAWESBAoCCAJaCQoBYhIECgIIA2IDCgFjQgQKABAV")
"""An ONNX file: MatMulInteger of `a` (uint8) and `b` (int8)."""


def _lacks_kernel(layer: Layer, bits: int | None, activation_bits: int | None, symmetric: bool) -> str | None:
    """Why ONNX Runtime computes an option in float32 or stores it wider. None if it does neither, or if the layer is in float."""
    if bits is None:
        return None
    is_linear = layer.operator == "linear"
    is_convolution = layer.operator in ("conv1d", "conv2d", "conv3d")
    is_pointwise = is_convolution and all(length == 1 for length in layer.shape[2:]) and layer.shape[1] > 1
    if not (is_linear or is_convolution):
        return f"{layer.operator} has no integer kernel"
    if bits not in STORED:
        return f"{bits} bits have no type of their own"
    if activation_bits is None:
        return None if is_linear or is_pointwise else "a convolution over several positions needs 8-bit activations"
    if activation_bits != 8:
        return f"{activation_bits}-bit activations have no kernel; 8-bit ones have"
    return None if symmetric else "int8 kernels need the symmetric scheme"


def _write(path: Path, network: Network, layers: Replaced, calibration: Tensor) -> None:
    """Writes a network so that integer kernels are used if they exist. The write is atomic."""
    _library()
    widths = [bits_of(layer.grid.codes) for layer in as_layers(layers).values() if layer.grid is not None]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.laid-out")
    try:
        export_onnx(temporary, network, layers, TWO_BITS if min(widths, default=8) <= 2 else OPSET)
        lay_out(temporary, lambda file, names: _ranges(file, names, calibration))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _ranges(path: Path, names: Sequence[str], images: Tensor) -> dict[str, tuple[float, float]]:
    """Lowest and highest value of tensors of a file on images."""
    if not len(images):
        raise ConfigurationError("results of int8 convolutions need calibration images; expected data.calibration_images: 256")
    onnx = library("onnx")
    model = onnx.load(path)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    options = _with_entries(_options(1), model)
    session = _library().InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    lows, highs = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    for start in range(0, len(images), RANGE_BATCH):
        results = session.run(list(names), {"images": images[start : start + RANGE_BATCH].float().cpu().contiguous().numpy()})
        lows = np.minimum(lows, [result.min() for result in results])
        highs = np.maximum(highs, [result.max() for result in results])
    return {name: (float(low), float(high)) for name, low, high in zip(names, lows, highs, strict=True)}


def _open(path: Path, threads: int) -> Logits:
    session = _session(path, _options(threads))

    def logits(images: NDArray[np.float32]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = session.run(["logits"], {"images": images})[0]
        return result

    return logits


def _profile(path: Path, threads: int, images: NDArray[np.float32], names: Sequence[str], passes: int) -> LayerTimes:
    """Medians over passes of each node's time, added for each layer, by ONNX Runtime's profiler."""
    with TemporaryDirectory() as folder:
        options = _options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = _session(path, options)
        for _ in range(WARM_UP + passes):
            session.run(["logits"], {"images": images})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    by_length = sorted(names, key=len, reverse=True)
    seconds: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            seconds.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event["dur"] / 1e6)
    layers = dict.fromkeys(names, 0.0)
    rest = 0.0
    for node, values in seconds.items():
        # the times of nodes with one name are added; each pass has the same number of them
        per_pass = np.array(values).reshape(WARM_UP + passes, -1).sum(1)
        share = median(per_pass[WARM_UP:].tolist())
        layer = next((name for name in by_length if node == name or node.startswith(tuple(name + mark for mark in "._/'"))), None)
        if layer is None:
            rest += share
        else:
            layers[layer] += share
    return LayerTimes(layers, rest)


def _kernels(path: Path) -> dict[str, int]:
    onnx = library("onnx")
    with TemporaryDirectory() as folder:
        options = _options(1)
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        _session(path, options)
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    return dict(Counter(node.op_type for node in graph.node))


def _code_bytes(path: Path) -> dict[str, int]:
    """Bytes of the tensors that make each layer's weight: codes, scales and zero points."""
    onnx = library("onnx")
    model = onnx.load(path)
    bits: dict[str, int] = json.loads({entry.key: entry.value for entry in model.metadata_props}["clado.bits"])
    sizes = {tensor.name: len(tensor.raw_data) for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    weights: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.op_type in PRODUCTS and (layer := node.name.rstrip("'")) in bits:
            weights.setdefault(layer, []).append(node.input[1])
    if lost := sorted(set(bits) - set(weights)):
        raise NetworkError(f"no product in {path} reads the codes of {', '.join(lost[:8])}")
    counted: set[str] = set()
    totals = {}
    for layer, values in weights.items():
        stack, totals[layer] = list(values), 0
        while stack:
            value = stack.pop()
            if value in producers:
                stack += producers[value].input
            elif value in sizes and value not in counted:
                counted.add(value)
                totals[layer] += sizes[value]
    return totals


def _versions() -> dict[str, str]:
    return {name: str(library(name).__version__) for name in ("onnxruntime", "onnx")}


def _with_entries(options: Any, model: Any) -> Any:
    """The options, with the session entries that a file needs on this CPU."""
    unneeded = () if _sums_saturate() else dict(EXACT_SUMS)
    for key, value in _entries(model).items():
        if key not in unneeded:
            options.add_session_config_entry(key, value)
    return options


@cache
def _sums_saturate() -> bool:
    """Whether this CPU's int8 kernels saturate sums of products: 64 products of the largest codes are added."""
    session = _library().InferenceSession(SUMS, _options(1), providers=["CPUExecutionProvider"])
    sums = session.run(None, {"a": np.full((8, 64), 255, np.uint8), "b": np.full((64, 16), 127, np.int8)})[0]
    return bool((sums != 64 * 255 * 127).any())


def _entries(model: Any) -> dict[str, str]:
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return dict(json.loads(metadata.get(SESSION, "{}")))


def _session(path: Path, options: Any) -> Any:
    options = _with_entries(options, library("onnx").load(path))
    return _library().InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _options(threads: int) -> Any:
    options = _library().SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return options


def _library() -> ModuleType:
    """ONNX Runtime, without telemetry. Raises ConfigurationError if it is absent or too old."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is loaded
    runtime = library("onnxruntime")
    runtime.disable_telemetry_events()
    version = tuple(int(part) for part in runtime.__version__.split(".")[:2])
    if version < OLDEST:
        raise ConfigurationError(
            f"ONNX Runtime {runtime.__version__} does not fuse MatMulNBits; expected {'.'.join(map(str, OLDEST))} or later: "
            "pip install -U onnxruntime"
        )
    return runtime


LOADER = '''"""The network, for ONNX Runtime on a CPU: run(images) gives its logits."""

import json
import os
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent
FACTS = json.loads((HERE / "deployment.json").read_text(encoding="utf-8"))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = FACTS["threads"]
sums = onnxruntime.InferenceSession(SUMS, providers=["CPUExecutionProvider"])
is_exact = (sums.run(None, {"a": np.full((8, 64), 255, np.uint8), "b": np.full((64, 16), 127, np.int8)})[0] == 2072640).all()
for key, value in FACTS["session"].items():
    if not (is_exact and key == "session.x64quantprecision"):  # some processors saturate such sums without it
        options.add_session_config_entry(key, value)
session = onnxruntime.InferenceSession(str(HERE / FACTS["file"]), options, providers=["CPUExecutionProvider"])


def run(images):
    """Logits (N, classes) of normalised images (N, C, H, W), float32."""
    return session.run(["logits"], {"images": images})[0]
'''.replace("(SUMS,", f"({SUMS!r},")

runtime = Runtime(
    title="ONNX Runtime",
    requirements=("onnxruntime>=1.25",),
    loader=LOADER,
    session_entries=lambda path: _entries(library("onnx").load(path)),
    file="network.onnx",
    lacks_kernel=_lacks_kernel,
    write=_write,
    open=_open,
    profile=_profile,
    kernels=_kernels,
    code_bytes=_code_bytes,
    versions=_versions,
)
__all__ = ["runtime"]
