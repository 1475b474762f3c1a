"""A compiled suffix computes what the loop over instructions computes, whatever is put in place and stacked."""

import pytest
import torch

from clado.config import NetworkSettings
from clado.errors import NetworkError
from clado.network import Network
from clado.quantizers import ActivationGrid, QuantizedLayer, WeightQuantizer
from tests import tolerance
from tests.networks import Attention, Normed, Recurrent, Residual, build, images


def compiled(network: Network, backend: str = "eager") -> Network:
    other = Network(build(Residual), images(1))  # any: its graph is replaced
    other.graph, other.weights = network.graph.compiled(backend), network.weights
    return other


def check(network: Network, own: Network) -> None:
    """From every layer, two sizes of stacks, layer replaced and not: logits within rounding."""
    quantizer = WeightQuantizer("minmax")
    for i, layer in enumerate(network.layers):
        weight = quantizer.fake_quantize(network.weights[i], 3, layer.channel_axis)
        for replaced in ({}, {i: weight}, {i: 0.5 * weight}):
            for count in (2, 3):
                x = images(count)
                state = network.advance(network.begin(x), i)
                expected = network.finish(state, replaced)
                tolerance.close(own.finish(own.advance(own.begin(x), i), replaced), expected)
                stacked = own.finish(own.stack([own.advance(own.begin(x), i)] * 2, i), replaced)
                tolerance.close(stacked, torch.cat([expected, expected]))


@pytest.mark.parametrize("kind", [Residual, Attention, Recurrent])
def test_runs_to_the_end_are_those_of_the_loop(kind) -> None:
    network = Network(build(kind), images(1))
    check(network, compiled(network))
    folded, _ = network.folded()
    check(folded, compiled(network).folded()[0])


def test_a_bias_where_there_was_none_is_another_program() -> None:
    network = Network(build(Normed), images(1))
    own, x = compiled(network), images(2)
    layer = network.graph.biases.index(None)
    given = {layer: QuantizedLayer(network.weights[layer], torch.ones(network.layers[layer].num_channels))}
    for replaced in ({}, given, {}, given):
        tolerance.close(own.logits(x, replaced), network.logits(x, replaced))
    assert float((own.logits(x, given) - own.logits(x)).abs().max()) > 3 * tolerance.FORWARD


def test_each_place_is_compiled_once_and_no_more() -> None:
    """Counted: programs of the graph, and none where the run does not reach the end or puts a grid on an input."""
    network = compiled(Network(build(Residual), images(1)))
    graph = network.graph
    network.advance(network.begin(images(2)), 2)
    assert graph._suffixes == {}
    network.finish(network.begin(images(2)), {0: QuantizedLayer(network.weights[0], None, ActivationGrid(4, 0.1, 8))})
    assert graph._suffixes == {}
    for _ in range(2):
        for i in range(len(network.layers)):
            network.finish(network.advance(network.begin(images(3)), i))
    assert len(graph._suffixes) == len({cut.position for cut in graph.cuts})


@pytest.mark.system
@pytest.mark.parametrize("kind", [Residual, Attention])
def test_torchs_own_compiler_computes_the_same(kind) -> None:
    network = Network(build(kind), images(1))
    check(network, compiled(network, "inductor"))


def test_what_has_no_graph_is_not_compiled() -> None:
    with pytest.raises(NetworkError, match="only a graph can be compiled"):
        Network(build(Residual), images(1), graph=False, compile=True)
    with pytest.raises(ValueError, match="compile: true needs graph: true"):
        NetworkSettings(name="resnet20_fashion_mnist", graph=False, compile=True)
    assert Network(build(Residual), images(1), compile=True).graph.backend == "inductor"
