"""The module that `clado.quantize` gives computes what was measured, and is a module like others."""

import copy

import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim

import clado
from clado.errors import ConfigurationError, NetworkError
from clado.exporting._torch_module import GRID_BUFFERS
from tests import tolerance
from tests.networks import Attention, Normed, Residual, Tied, build, images, labels

KINDS = (Residual, Attention, Tied, Normed)
CORRECTIONS = ("output_statistics", "batchnorm_reestimation")


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def prepared(request):
    network = clado.Network(build(request.param), images(1))
    space = network.search_space((2, 4, 8)).with_activations((4, 8))
    return clado.prepare(network, space, images(40, seed=3), corrections=CORRECTIONS)


@pytest.fixture(scope="module")
def module(prepared) -> nn.Module:
    return clado.quantize(prepared.network, prepared.space.narrowest, prepared=prepared)


def test_it_computes_what_was_measured(prepared, module):
    """The module's own losses and classes are those of `evaluate`."""
    x, y = images(12), labels(12)
    network, layers = prepared.deployed(prepared.space.narrowest)
    with torch.no_grad():
        logits = module(x)
    tolerance.assert_close_but_for_ties(logits, network.logits(x, layers))
    measured = clado.evaluate(prepared.network, prepared.space.narrowest, (x, y), prepared=prepared)
    direct = float(nn.functional.cross_entropy(logits.double(), y))
    # one image may fall on either side of a tie of its inputs' grids
    assert abs(direct - measured.loss) <= float(logits.abs().max()) / len(x)
    assert abs(float((logits.argmax(1) == y).sum()) - measured.top1 * len(x)) <= 1 + 1e-9


def test_it_differs_from_the_float_module(prepared, module):
    with torch.no_grad():
        assert float((module(images(4)) - prepared.network.logits(images(4))).abs().max()) > 50 * tolerance.FORWARD


def test_its_state_makes_another_module_the_same(prepared, module, tmp_path):
    """Weights, statistics and grids of inputs are in the state: bits of the other module do not matter."""
    torch.save(module.state_dict(), tmp_path / "state.pt")
    other = clado.quantize(prepared.network, prepared.space.widest, prepared=prepared)
    x = images(6, seed=5)
    with torch.no_grad():
        assert not torch.equal(other(x), module(x))
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(other(x), module(x))
        assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_the_float_module_does_not_take_the_state_for_its_own(prepared, module):
    """The float module would leave out the grids of inputs, so torch refuses."""
    with pytest.raises(RuntimeError, match=GRID_BUFFERS[0]):
        copy.deepcopy(prepared.network.model).load_state_dict(module.state_dict())


def test_every_tensor_moves_to_another_device(module):
    moved = copy.deepcopy(module).to("meta")
    assert {tensor.device.type for tensor in moved.state_dict().values()} == {"meta"}
    assert moved(images(2).to("meta")).shape == (2, 4)


def test_torch_export_takes_it(module):
    program = torch.export.export(module, (images(2),), dynamic_shapes=({0: Dim("batch", max=64)},))
    x = images(5, seed=8)
    with torch.no_grad():
        tolerance.assert_close_but_for_ties(program.module()(x), module(x))


def test_onnx_takes_it(module, tmp_path):
    torch.onnx.export(module, (images(2),), tmp_path / "module.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "module.onnx"), providers=["CPUExecutionProvider"])
    x = images(2, seed=8)
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        tolerance.assert_close_but_for_ties(torch.from_numpy(logits), module(x))


def test_without_prepared_weights_are_rounded_to_nearest():
    network = clado.Network(build(Residual), images(1))
    assignment = clado.Assignment((4, None, 2, 8, 4))
    module, x = clado.quantize(network, assignment), images(6)
    quantizer, state = clado.WeightQuantizer(), module.state_dict()
    for layer, weight, bits in zip(network.layers, network.weights, assignment.bits, strict=True):
        expected = weight if bits is None else quantizer.fake_quantize(weight, bits, layer.channel_axis)
        assert torch.equal(state[layer.name], expected)
    kl = clado.evaluate(network, assignment, x).loss
    with torch.no_grad():
        log_p, log_q = network.logits(x).double().log_softmax(1), module(x).double().log_softmax(1)
    assert kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(1).mean()), rel=1e-3)
    assert not module.training
    assert network.model.training


def test_what_does_not_fit_is_refused():
    network = clado.Network(build(Residual), images(1))
    space = network.search_space((2, 8))
    with pytest.raises(NetworkError, match="2 layers, the network 5"):
        clado.quantize(network, clado.Assignment((2, 8)))
    with pytest.raises(ConfigurationError, match="expected prepared="):
        clado.quantize(network, space.with_activations((8,)).widest)
    with pytest.raises(ConfigurationError, match="prepared belongs to another network"):
        clado.quantize(clado.Network(build(Residual), images(1)), space.widest, prepared=clado.prepare(network, space))
