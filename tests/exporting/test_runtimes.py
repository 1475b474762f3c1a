"""Runtimes: a network is written so that integer kernels run it, and what has none is said."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer, get_model

from clado.data.sources.zoo import load_network
from clado.errors import ConfigurationError
from clado.exporting.runtimes import median_seconds, runtime_of
from clado.exporting.runtimes import onnxruntime as module
from clado.exporting.runtimes._onnx_layout import EXACT_SUMS
from clado.exporting.runtimes.onnxruntime import runtime
from clado.network.network import Network
from clado.quantization.preparation import Recipe, prepare
from clado.quantization.quantizers import WeightQuantizer
from clado.settings.schema import NetworkSettings
from clado.space import Layer
from tests.contracts.runtime import RuntimeContract, inverted, quantized
from tests.exporting.test_onnx import deployed
from tests.networks import Attention, Tied, build, images

FLOAT_PRODUCTS = ("Conv", "FusedConv", "MatMul", "Gemm", "FusedGemm")


class TestOnnxRuntime(RuntimeContract):
    name = "onnxruntime"
    options = ((8, 8), (4, 8), (2, 8), (8, None), (4, None))

    def test_int8_kernels_run_every_layer_with_a_quantized_input(self, runtime, files):
        """Codes of 2 and 4 bits too: they are widened when the file is loaded, and are narrow in it."""
        for bits in (8, 4, 2):
            kernels = runtime.kernels(files[(bits, 8)])
            assert kernels["QLinearConv"] == 4
            assert kernels["QGemm"] == 1
            assert not any(name in kernels for name in FLOAT_PRODUCTS)
            dtypes = Counter(
                onnx.TensorProto.DataType.Name(t.data_type)
                for t in onnx.load(files[(bits, 8)]).graph.initializer
                if ".codes" in t.name and "bias" not in t.name
            )
            assert dtypes == {f"INT{bits}": 5}

    def test_matrix_products_with_float_inputs_are_fused(self, runtime, files):
        """Both 1x1 convolutions and the linear layer."""
        for bits in (8, 4):
            kernels = runtime.kernels(files[(bits, None)])
            assert kernels["MatMulNBits"] == 3
            assert "DequantizeLinear" not in kernels  # other weights are decoded when the file is loaded


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_queries_keys_and_values_are_products_of_their_own(bits, tmp_path):
    x = images(16, seed=3)
    network = Network(build(Attention), x[:1], split=["*in_proj_weight"])
    network, layers = deployed(network, x, (bits,))
    runtime.write(tmp_path / "n.onnx", network, layers, x)
    linear = [layer for layer in network.layers if layer.operator == "linear"]
    assert runtime.kernels(tmp_path / "n.onnx")["MatMulNBits"] == len(linear) == 6
    logits = torch.from_numpy(runtime.open(tmp_path / "n.onnx", 1)(x.numpy()))
    measured = network.logits(x, layers)
    assert float((logits - measured).abs().mean()) <= 0.02 * float(measured.abs().max())  # inputs become int8 in the kernel


def test_every_linear_layer_of_the_zoos_transformer_is_fused_at_four_bits(tmp_path):
    """Those of ViT-B/16 too: see the next test, and `tests.benchmarks.bench_runtime vit_b_16`."""
    model, image_shape = load_network(NetworkSettings(source="zoo", name="vit_fashion_mnist"))
    x = torch.randn(1, *image_shape)
    network = Network(model, x, split=["*.in_proj_weight"])
    linear = [i for i, layer in enumerate(network.layers) if layer.operator == "linear"]
    layers = {i: layer for i, layer in quantized(network, x, 4, None).items() if i in linear}
    runtime.write(tmp_path / "n.onnx", network, layers, x)
    assert runtime.kernels(tmp_path / "n.onnx")["MatMulNBits"] == len(linear) > 20


def test_every_linear_layer_of_a_vit_b_16_encoder_layer_is_fused_at_four_bits(tmp_path):
    """torchvision's network with random weights, with two of its twelve equal encoder layers."""
    torch.manual_seed(0)
    shape = {"hidden_dim": 768, "num_heads": 12, "mlp_dim": 3072}
    model = VisionTransformer(image_size=224, patch_size=16, num_layers=2, **shape).eval()
    nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision starts it at zero
    whole = get_model("vit_b_16", weights=None).state_dict()
    assert all(whole[name].shape == tensor.shape for name, tensor in model.state_dict().items())
    x = torch.randn(1, 3, 224, 224)
    network = Network(model, x, split=["*.in_proj_weight"])
    linear = [i for i, layer in enumerate(network.layers) if layer.operator == "linear"]
    space = network.search_space((4,))
    prepared = prepare(network, space, Recipe(WeightQuantizer("minmax"), "minmax", ()), [x])
    layers = {i: layer for i, layer in prepared.deployed(space.widest)[1].items() if i in linear}
    runtime.write(tmp_path / "n.onnx", network, layers, x)
    kernels = runtime.kernels(tmp_path / "n.onnx")
    assert kernels["MatMulNBits"] == len(linear) == 6 * 2 + 1  # queries, keys, values, their output, two of the MLP; the head
    assert kernels.get("FusedMatMul", 0) + kernels.get("MatMul", 0) == 2 * 2  # of the attention: they have no weight
    assert not any(name in kernels for name in ("Gemm", "FusedGemm"))
    measured = network.logits(x, layers)
    logits = torch.from_numpy(runtime.open(tmp_path / "n.onnx", 1)(x.numpy()))
    assert float((logits - measured).abs().mean()) <= 0.02 * float(measured.abs().max())  # inputs become int8 in the kernel


def test_pooling_and_clipping_keep_the_grid_behind_them(tmp_path):
    """Rounding commutes with both. So no grid is added, and the file computes what was measured, but for single codes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(8, 5)
    )
    x = images(64)
    network, layers = deployed(Network(model.eval(), x[:1]), x, (8,), (8,))
    runtime.write(tmp_path / "n.onnx", network, layers, x[:0])  # no range is needed
    kernels = runtime.kernels(tmp_path / "n.onnx")
    assert (kernels["QLinearConv"], kernels["QGemm"], kernels["QuantizeLinear"]) == (2, 1, 1)
    assert not any(name in kernels for name in FLOAT_PRODUCTS)
    logits = torch.from_numpy(runtime.open(tmp_path / "n.onnx", 1)(x.numpy()))
    measured = network.logits(x, layers)
    assert float((logits - measured).abs().mean()) <= float(measured.max() - measured.min()) / 255


def test_pooling_behind_a_layer_in_float_stays_in_float(tmp_path):
    """Its int8 kernel is slow between two layouts of values. Rounding after the pooling gives the same values."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(8, 5)
    )
    x = images(64)
    network, layers = deployed(Network(model.eval(), x[:1]), x, (8,), (8,))
    layers = {i: layer for i, layer in layers.items() if i > 0}
    runtime.write(tmp_path / "n.onnx", network, layers, x[:0])
    producers = {output: node for node in onnx.load(tmp_path / "n.onnx").graph.node for output in node.output}
    pool = next(node for node in producers.values() if node.op_type == "MaxPool")
    assert producers[pool.input[0]].op_type in ("Conv", "Relu")
    options = module._with_entries(onnxruntime.SessionOptions(), onnx.load(tmp_path / "n.onnx"))
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "n.onnx"), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert operators.index("MaxPool") < operators.index("QuantizeLinear") < operators.index("QLinearConv")
    assert [operators.count(name) for name in ("QuantizeLinear", "QLinearConv", "QGemm")] == [1, 1, 1]
    logits = torch.from_numpy(runtime.open(tmp_path / "n.onnx", 1)(x.numpy()))
    measured = network.logits(x, layers)
    assert float((logits - measured).abs().mean()) <= float(measured.max() - measured.min()) / 255


def test_a_channel_that_batch_norm_switches_off_keeps_its_bias(tmp_path):
    """Its scale is zero, and a bias in units of zero would be lost."""
    network, x = inverted()
    with torch.no_grad():
        network.model.expand_norm.weight[:8] = 0
        network.model.expand_norm.bias[:8] = 3.0
    network = Network(network.model, x[:1])
    layers = quantized(network, x, 8, 8)
    runtime.write(tmp_path / "n.onnx", network, layers, x)
    measured = network.logits(x, layers)
    logits = torch.from_numpy(runtime.open(tmp_path / "n.onnx", 1)(x.numpy()))
    assert float((logits - measured).abs().mean()) <= 6 * float(measured.max() - measured.min()) / 255


def test_a_weight_that_is_used_twice_is_stored_once(tmp_path):
    x = images(64)
    network, layers = deployed(Network(build(Tied), x[:1]), x, (8,), (8,))
    runtime.write(tmp_path / "n.onnx", network, layers, x)
    assert runtime.kernels(tmp_path / "n.onnx")["QLinearConv"] == 3
    stored = runtime.code_bytes(tmp_path / "n.onnx")
    assert sum(stored.values()) <= sum(layer.weight_bytes(8) + 4 * layer.num_channels + 8 for layer in network.layers)
    measured = network.logits(x, layers)
    logits = torch.from_numpy(runtime.open(tmp_path / "n.onnx", 1)(x.numpy()))
    assert float((logits - measured).abs().mean()) <= 4 * float(measured.max() - measured.min()) / 255


def test_sums_of_large_codes_do_not_saturate(tmp_path):
    """Two products of the largest codes leave 16 bits, which kernels of CPUs without VNNI add in."""
    model = nn.Sequential(nn.Conv2d(1, 8, 4, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 4))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    x = 1 - 0.01 * images(64).abs()
    network, layers = deployed(Network(model.eval(), x[:1]), x, (8,), (8,))
    runtime.write(tmp_path / "n.onnx", network, layers, x)
    measured = network.logits(x, layers)
    logits = torch.from_numpy(runtime.open(tmp_path / "n.onnx", 1)(x.numpy()))
    assert float((logits - measured).abs().max()) <= 0.01 * float(measured.abs().max())


def test_the_exact_kernels_are_used_only_where_sums_saturate(tmp_path, monkeypatch):
    """Both kernels compute the same where they do not: that is what the small product asks."""
    network, x = inverted()
    layers = quantized(network, x, 8, 8)
    runtime.write(tmp_path / "n.onnx", network, layers, x)
    assert dict(runtime.session_entries(tmp_path / "n.onnx")) == dict(EXACT_SUMS)  # in the file, for any machine
    options: list[dict[str, str]] = []
    logits = []
    for saturates in (True, False):
        monkeypatch.setattr(module, "_sums_saturate", lambda saturates=saturates: saturates)
        opened = module._with_entries(onnxruntime.SessionOptions(), onnx.load(tmp_path / "n.onnx"))
        options.append({key: opened.get_session_config_entry(key) for key in dict(EXACT_SUMS) if _has(opened, key)})
        logits.append(runtime.open(tmp_path / "n.onnx", 1)(x.numpy()))
    assert options == [dict(EXACT_SUMS), {}]
    monkeypatch.undo()
    if not module._sums_saturate():
        assert np.array_equal(*logits)


def _has(options: onnxruntime.SessionOptions, key: str) -> bool:
    try:
        options.get_session_config_entry(key)
    except RuntimeError:
        return False
    return True


def test_the_small_product_is_what_its_name_says():
    model = onnx.load_from_string(module.SUMS)
    assert [node.op_type for node in model.graph.node] == ["MatMulInteger"]
    assert [value.type.tensor_type.elem_type for value in model.graph.input] == [onnx.TensorProto.UINT8, onnx.TensorProto.INT8]
    assert repr(module.SUMS) in runtime.loader


CONV, POINTWISE, LINEAR = (
    Layer("a", (8, 4, 3, 3), "conv2d"),
    Layer("b", (8, 4, 1, 1), "conv2d"),
    Layer("c", (8, 4), "linear"),
)


@pytest.mark.parametrize(
    ("layer", "bits", "activation_bits", "symmetric", "reason"),
    [
        (CONV, 4, 8, True, None),
        (LINEAR, 8, 8, True, None),
        (POINTWISE, 4, None, True, None),
        (LINEAR, 2, None, False, None),
        (CONV, 8, None, True, "needs 8-bit activations"),
        (LINEAR, 3, None, True, "3 bits have no type"),
        (LINEAR, 4, 4, True, "4-bit activations have no kernel"),
        (CONV, 8, 8, False, "the symmetric scheme"),
        (Layer("d", (8, 4, 2, 2), "conv_transpose2d"), 8, 8, True, "conv_transpose2d has no integer kernel"),
    ],
)
def test_what_has_no_kernel_is_said_with_the_reason(layer, bits, activation_bits, symmetric, reason):
    lacking = runtime.lacks_kernel(layer, bits, activation_bits, symmetric)
    assert (lacking is None) if reason is None else (reason in lacking)


def test_int8_results_need_calibration_images(tmp_path):
    network, x = inverted()
    with pytest.raises(ConfigurationError, match="calibration images"):
        runtime.write(tmp_path / "n.onnx", network, quantized(network, x, 8, 8), x[:0])
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_runtime_is_answered_with_the_known_ones():
    with pytest.raises(ConfigurationError, match="unknown runtime 'onnxruntim'; expected one of onnxruntime"):
        runtime_of("onnxruntim")


def test_calls_are_timed_in_turns():
    order: list[str] = []
    seconds = median_seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert set(seconds) == {"a", "b"}
