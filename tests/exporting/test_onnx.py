"""ONNX files compute in ONNX Runtime what torch computes, from codes in integer types; what is missing is named."""

import copy
import importlib
import json
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from clado.data.sources.zoo import load_network
from clado.data.zoo.networks import VisionTransformer
from clado.errors import ConfigurationError
from clado.exporting import _onnx_agreement
from clado.exporting._onnx_agreement import Agreement, compare
from clado.exporting._torch_module import as_module
from clado.exporting.onnx import OnnxSize, export_onnx
from clado.grids import ActivationGrid, QuantizedLayer
from clado.network.network import Network
from clado.quantization.preparation import Recipe, prepare
from clado.quantization.quantizers import WeightQuantizer
from clado.run.opened_run import OpenedRun, open_run
from clado.settings.loading import parse_config
from clado.settings.schema import NetworkSettings
from flows.commands.export import ONNX, export_as
from tests import tolerance
from tests.networks import Attention, Residual, Tied, Volume, build, images
from tests.running import config

TYPES = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int2": 2, "uint2": 2}


def deployed(
    network: Network,
    x: Tensor,
    bits: tuple[int, ...],
    widths: tuple[int, ...] = (),
    symmetric: bool = True,
    corrections: tuple[str, ...] = (),
) -> tuple[Network, dict[int, QuantizedLayer]]:
    """A mixed assignment: the bits in turn."""
    space = network.search_space(tuple(sorted(set(bits)))).with_activations(widths)
    prepared = prepare(network, space, Recipe(WeightQuantizer("mse", symmetric, symmetric), "mse", corrections), [x])
    chosen = [space.option(i, bits[i % len(bits)], widths[i % len(widths)] if widths else None) for i in range(space.num_layers)]
    return prepared.deployed(space.assignment(chosen))


def nodes_of(path: Path, operator: str) -> list[onnx.NodeProto]:
    return [node for node in onnx.load(path).graph.node if node.op_type == operator]


def initializers(path: Path, kind: str) -> list[onnx.TensorProto]:
    """Stored tensors of the types that begin so."""
    name = onnx.TensorProto.DataType.Name
    return [tensor for tensor in onnx.load(path).graph.initializer if name(tensor.data_type).lower().startswith(kind)]


def types_of(path: Path) -> dict[str, str]:
    """Type of each layer's codes."""
    actual = {
        tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type).lower() for tensor in onnx.load(path).graph.initializer
    }
    return {name.removesuffix(".codes"): kind for name, kind in actual.items() if name.endswith(".codes")}


def run(path: Path, x: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenedRun:
    """A run of the shipped ResNet-20 with candidates of every type."""
    document = config(tmp_path_factory.mktemp("onnx") / "run", bits=[2, 3, 4, 8, 16], corrections=["output_statistics"])
    return open_run(parse_config(document))


@pytest.fixture(scope="module")
def shown(opened: OpenedRun) -> tuple[Tensor, Tensor]:
    """The 200 images of that run, and labels."""
    x, labels = opened.slices.validation.load(0, 200)
    assert labels is not None
    return x, labels


def checked(path: Path, network: Network, layers: Mapping[int, QuantizedLayer], opset: int) -> OnnxSize:
    """Exports, and checks what is true of every file."""
    size = export_onnx(path, network, layers, opset)
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert size.file_bytes == path.stat().st_size
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["images", "logits"]
    assert {value.type.tensor_type.shape.dim[0].dim_param for value in (*model.graph.input, *model.graph.output)} == {"batch"}
    bits = json.loads({entry.key: entry.value for entry in model.metadata_props}["clado.bits"])
    kinds = types_of(path)
    assert kinds.keys() == bits.keys() == {network.layers[i].name for i in layers}
    for name, kind in kinds.items():  # no narrower type would do
        assert TYPES[kind] == min(b for b in ((2, 4, 8, 16) if opset >= 25 else (4, 8, 16)) if b >= bits[name])
    weights = {layer.name: layer.num_weights for layer in network.layers}
    assert size.weight_bytes == sum((weights[name] * TYPES[kind] + 7) // 8 for name, kind in kinds.items())
    assert set(size.widened) == {(name, bits[name], kind) for name, kind in kinds.items() if bits[name] < TYPES[kind]}
    left = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    assert not left & {layer.name for layer in network.layers}  # no weight is there as floats as well
    assert b"/clado/" not in path.read_bytes()  # no paths of this machine
    return size


# -- the zoo -------------------------------------------------------------------------------------------------------------------


@pytest.mark.system
def test_a_run_exports_what_computes_the_same_in_onnx_runtime(opened, shown, tmp_path):
    space, (x, labels) = opened.space, shown
    assignment = space.assignment([a + i % 5 for i, a in enumerate(space.offsets[:-1])])
    path, told = export_as("onnx", opened, assignment, tmp_path / "out")
    assert path == tmp_path / "out" / ONNX
    assert space.from_json(json.loads((tmp_path / "out" / "assignment.json").read_text())) == assignment
    network, layers = opened.preparation.deployed(assignment)
    size = checked(path, network, layers, 21)
    assert {(bits, kind) for _, bits, kind in size.widened} == {(2, "int4"), (3, "int4")}
    agreement = compare(path, network, layers, x, labels)
    assert told.splitlines() == [
        f"{size.file_bytes:,} bytes, {size.weight_bytes:,} of them weights; {len(size.widened)} layers are stored wider, "
        "as ONNX can: 2 bits as int4, 3 bits as int4",
        str(agreement),
    ]
    assert_same(agreement, network, layers, x, labels)


@pytest.mark.system
def test_mobilenet_with_affine_weights_computes_the_same(shown, tmp_path):
    model, (x, labels) = load_network(NetworkSettings(source="zoo", name="mobilenetv2_fashion_mnist"))[0], shown
    network, layers = deployed(Network(model, x[:1]), x[:32], (3, 4, 8, 5, 16, 2), (), False)
    checked(tmp_path / "n.onnx", network, layers, 25)
    assert_same(compare(tmp_path / "n.onnx", network, layers, x, labels), network, layers, x, labels)


def assert_same(agreement: Agreement, network: Network, layers: Mapping[int, QuantizedLayer], x: Tensor, labels: Tensor) -> None:
    assert agreement.num_images == len(x)
    assert agreement.max_difference <= 1e-3
    assert agreement.disagreements == 0
    expected = float((network.logits(x, layers).argmax(1) == labels).double().mean())
    assert agreement.top1_torch == pytest.approx(expected)
    assert agreement.top1_optimised == pytest.approx(expected, abs=0.01)


def rounded_otherwise(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose parameters differ in their last places, as products do that are added in another order."""
    generator, other = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.mul_(1 + tolerance.eps() * torch.randn(parameter.shape, generator=generator))
    return other


@pytest.mark.system
@pytest.mark.parametrize("name", ["resnet20", "vit"])
def test_quantized_inputs_of_the_zoo_compute_the_same_but_for_single_codes(name, opened, shown, tmp_path):
    """Where an input lies between two codes, the last place decides, in torch too, where weights differ in it."""
    x, network = shown[0], opened.float_network
    if name == "vit":
        torch.manual_seed(0)
        network = Network(VisionTransformer(depth=2), x[:1], split=["*in_proj_weight"])
    network, layers = deployed(network, x[:32], (4, 8, 3), (8,), name != "vit")
    checked(tmp_path / "n.onnx", network, layers, 21)
    sources = {output: node for node in onnx.load(tmp_path / "n.onnx").graph.node for output in node.output}
    for node in sources.values():
        if node.op_type in ("Conv", "Gemm"):  # what else multiplies weights has reshapes in between
            assert all(sources[value].op_type == "DequantizeLinear" for value in node.input[:2])
    # queries, keys and values read one input; equal grids of one input are one
    uses = {i: network.layers[i].name.removesuffix(".k").removesuffix(".v") for i in layers}
    quantized = len(nodes_of(tmp_path / "n.onnx", "QuantizeLinear"))
    assert len(layers) - 4 <= quantized <= len(set(uses.values()))
    assert len(nodes_of(tmp_path / "n.onnx", "DequantizeLinear")) == quantized + len(layers)
    model = as_module(network, layers)
    with torch.inference_mode():
        expected = model(x)
        others = [rounded_otherwise(model, seed)(x) for seed in range(8)]
        reach = max(float((other - expected).abs().max()) for other in others)
    difference = (run(tmp_path / "n.onnx", x) - expected).abs().amax(1)
    assert float(difference.median()) <= 1e-3
    assert float(difference.max()) <= 1e-3 + 3 * reach
    agreement = compare(tmp_path / "n.onnx", network, layers, x)
    assert agreement.max_difference == pytest.approx(float(difference.max()), abs=1e-4)
    assert agreement.disagreements <= 2
    assert agreement.top1_torch is None
    assert agreement.top1_optimised >= 0.97


# -- operators and types ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "symmetric"), [(Residual, True), (Attention, False), (Tied, False), (Volume, True)])
def test_every_kind_of_layer_is_exported(kind, symmetric, tmp_path):
    x = images(40, seed=3)
    network = Network(build(kind), x[:1], split=["*in_proj_weight"] if kind is Attention else [])
    network, layers = deployed(network, x, (1, 2, 3, 4, 8, 16), (), symmetric, ("output_statistics", "batchnorm_reestimation"))
    # some stay floats: one part of a split weight, and a layer
    layers = {i: layer for i, layer in layers.items() if not network.layers[i].name.endswith((".k", "mlp.weight"))}
    checked(tmp_path / "n.onnx", network, layers, 25 if kind is Tied else 21)
    torch.testing.assert_close(run(tmp_path / "n.onnx", x[:5]), network.logits(x[:5], layers), rtol=0, atol=1e-3)


class Shown(nn.Module):
    """Shows what each of its layers reads."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(count))
        for layer in self.layers:
            nn.init.eye_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x.flatten(1)) for layer in self.layers], 1)


@pytest.mark.parametrize(("opset", "widths"), [(21, (1, 2, 3, 4, 6, 8, 12, 16)), (25, (1, 2, 3))])
def test_inputs_meet_their_grid_exactly(opset, widths, tmp_path):
    """Codes, what lies between them, and what lies beyond the ends."""
    grids = [ActivationGrid(bits, 2.0**-bits, 2 ** (bits - 1) - 1) for bits in widths]
    network = Network(Shown(len(widths)), torch.zeros(1, 1, 2, 3))
    eye = WeightQuantizer("minmax").grid(torch.eye(6), 2)
    layers = {i: QuantizedLayer(torch.eye(6), None, grid, eye) for i, grid in enumerate(grids)}
    size = export_onnx(tmp_path / "n.onnx", network, layers, opset)
    assert size.weight_bytes == (9 if opset == 25 else 18)  # equal codes are stored once
    steps = torch.cat([torch.arange(-9, 10) / 2 ** (bits + 1) for bits in widths])  # codes and ties
    x = torch.cat([torch.linspace(-1.5, 1.5, 6 * 999), steps, torch.tensor([-1e6, 1e6, -0.0])])
    x = x[: len(x) // 6 * 6].reshape(-1, 1, 2, 3)
    expected = torch.cat([grid.fake_quantize(x).flatten(1) for grid in grids], 1)
    assert torch.equal(run(tmp_path / "n.onnx", x), expected)
    types = (8, 16)  # narrower ones fail in ONNX Runtime's usual optimisation
    actual = {(TYPES[onnx.TensorProto.DataType.Name(t.data_type).lower()]) for t in initializers(tmp_path / "n.onnx", "uint")}
    assert actual == {min(b for b in types if b >= bits) for bits in widths}
    assert len(nodes_of(tmp_path / "n.onnx", "Clip")) == len(set(widths) - set(types))


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
def test_inputs_of_any_width_load_with_the_usual_optimisation(activation, width, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), activation(), nn.Conv2d(4, 4, 3), activation(), nn.Flatten(), nn.Linear(64, 5))
    x = images(64)
    network, layers = deployed(Network(model.eval(), x[:2]), x, (4,), (width,))
    export_onnx(tmp_path / "n.onnx", network, layers)
    agreement = compare(tmp_path / "n.onnx", network, layers, x)
    assert agreement.max_difference < 1e-4
    assert agreement.disagreements == 0
    options = onnxruntime.SessionOptions()
    usual = onnxruntime.InferenceSession(
        str(tmp_path / "n.onnx"), options, ["CPUExecutionProvider"], disabled_optimizers=["WeightBiasQuantization"]
    )
    actual = torch.from_numpy(usual.run(None, {"images": x.numpy()})[0])
    assert (actual - network.logits(x, layers)).abs().mean() < 1e-3  # biases are left in float, as docs/limits.md says


# -- what is refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", ["onnxscript", "onnx_ir", "onnxruntime"])
def test_missing_packages_are_named_with_the_extra(absent, tmp_path, monkeypatch):
    def without(name: str, package: str | None = None) -> object:
        if name == absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return importlib.import_module(name, package)

    x = torch.zeros(1, 1, 2, 3)
    network, file = Network(Shown(1), x), tmp_path / "n.onnx"
    call = (lambda: compare(file, network, {}, x)) if absent == "onnxruntime" else (lambda: export_onnx(file, network, {}))
    monkeypatch.setattr(_onnx_agreement, "import_module", without)
    with pytest.raises(ConfigurationError, match=rf"not installed \({absent}\); install them with: pip install 'clado\[onnx\]'"):
        call()
    assert list(tmp_path.iterdir()) == []


def test_an_operator_set_without_four_bits_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="set 20 has no four-bit integers; expected 21 or later"):
        export_onnx(tmp_path / "n.onnx", Network(Shown(1), torch.zeros(1, 1, 2, 3)), {}, 20)


def test_a_difference_is_seen(tmp_path):
    """The comparison can fail: the file of one network against another's layers."""
    x = images(400)
    network = Network(build(Tied), x[:1])
    narrow, wide = (deployed(network, x, bits)[1] for bits in ((1,), (8,)))
    export_onnx(tmp_path / "n.onnx", network, narrow)
    agreement = compare(tmp_path / "n.onnx", network, wide, x, torch.zeros(400, dtype=torch.long))
    assert agreement.max_difference > 1e-3
    assert agreement.disagreements > 0
    assert "another first class on" in str(agreement)
    assert str(Agreement(5, 1e-4, 0, 0.9, None)).endswith("90.00 % as in torch")
