"""Laws of the graph: a resumed run is the whole run, stacked or not, and the module is never touched."""

import copy

import pytest
import torch
from torch import nn

from clado.errors import ConfigurationError, NetworkError
from clado.network import Network
from tests.networks import Attention, Branching, Residual, Tied, Volume, build, images, replaced_logits

KINDS = pytest.mark.parametrize("kind", [Residual, Attention, Tied, Volume])
PATHS = pytest.mark.parametrize("graph", [True, False], ids=["graph", "whole"])
LAYERS = {
    Residual: ["stem.weight", "depthwise.weight", "grouped.weight", "up.weight", "head.weight"],
    Attention: ["patch.weight", "attention.in_proj_weight", "attention.out_proj.weight", "mlp.weight", "head.weight"],
    Tied: ["first.weight", "second.weight", "head.weight"],
    Volume: ["volume.weight", "grown.weight", "rows.weight", "longer.weight", "head.weight"],
}


@KINDS
@PATHS
def test_every_weight_of_a_convolution_or_linear_operator_is_a_layer_in_execution_order(kind, graph):
    network = Network(build(kind), images(1), graph=graph)
    assert [layer.name for layer in network.layers] == LAYERS[kind]


@KINDS
def test_whole_forwards_know_the_same_layers_and_the_same_rest(kind):
    graph, whole = Network(build(kind), images(1)), Network(build(kind), images(1), graph=False)
    assert graph.layers == whole.layers
    assert graph.graph.macs == whole.graph.macs
    assert {row[:2] for row in graph.coverage()} == {row[:2] for row in whole.coverage()}


@KINDS
@PATHS
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_whole_run_equals_the_module(kind, count, graph):
    model = build(kind)
    torch.testing.assert_close(
        Network(model, images(1), graph=graph).logits(images(count)), replaced_logits(model, {}, images(count))
    )


@KINDS
@PATHS
def test_a_run_resumed_at_any_layer_equals_the_module_with_both_weights_replaced(kind, graph):
    model = build(kind)
    network = Network(model, images(1), graph=graph)
    x = images(3)
    other = {i: weight * 0.7 + 0.01 for i, weight in enumerate(network.weights)}
    for i in range(len(network.layers)):
        for j in range(i + 1, len(network.layers)):
            state = network.advance(network.begin(x), i)
            state = network.advance(state, j, {i: other[i]})
            resumed = network.finish(state, {j: other[j]})
            whole = replaced_logits(model, {network.layers[i].name: other[i], network.layers[j].name: other[j]}, x)
            torch.testing.assert_close(resumed, whole, rtol=1e-5, atol=1e-6)


@KINDS
def test_stacked_states_run_as_they_would_alone_and_are_not_changed(kind):
    network = Network(build(kind), images(1))
    for layer in range(len(network.layers)):
        states = [network.advance(network.begin(images(2, seed)), layer) for seed in (5, 6, 7)]
        before = copy.deepcopy(states)
        together = network.finish(network.stack(states, layer))
        alone = torch.cat([network.finish(state) for state in states])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
        for state, kept in zip(states, before, strict=True):
            assert all(torch.equal(state.values[slot], kept.values[slot]) for slot in kept.values)


@PATHS
def test_tied_weights_are_replaced_in_every_place(graph):
    model = build(Tied)
    network = Network(model, images(1), graph=graph)
    weight = network.weights[1] * 0.5
    reference = build(Tied)
    with torch.no_grad():
        reference.second.weight.copy_(weight)
    torch.testing.assert_close(network.logits(images(2), {1: weight}), replaced_logits(reference, {}, images(2)))
    state = network.state_dict({1: weight})
    assert torch.equal(state["second.weight"], weight)
    assert torch.equal(state["third.weight"], weight)


@PATHS
def test_the_mode_it_arrives_in_does_not_matter_and_is_left_as_it_was(graph):
    model = build(Residual).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = Network(model, images(1), graph=graph).logits(images(4))
    assert model.training
    assert model.dropout.training
    torch.testing.assert_close(logits, Network(build(Residual).eval(), images(1)).logits(images(4)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_macs_are_those_of_the_textbook():
    network = Network(build(Residual), images(1))
    assert [layer.macs for layer in network.layers] == [8 * 8 * 6 * 9, 8 * 8 * 6 * 9, 8 * 8 * 6 * 3 * 9, 8 * 8 * 6 * 6 * 4, 6 * 4]
    assert network.graph.macs == sum(layer.macs for layer in network.layers)
    assert [cut.suffix_macs for cut in network.graph.cuts] == [sum(y.macs for y in network.layers[i:]) for i in range(5)]


@PATHS
def test_every_parameter_is_searched_or_accounted_for(graph):
    model = build(Attention)
    network = Network(model, images(1), fixed=("patch.*",), graph=graph)
    searched = {layer.name for layer in network.layers}
    rows = {name: size for name, size, _ in network.coverage()}
    assert searched | set(rows) == {name for name, _ in model.named_parameters()}
    assert not searched & set(rows)
    assert rows["patch.weight"] == 4 * model.patch.weight.numel()
    assert sum(rows.values()) + sum(4 * layer.num_weights for layer in network.layers) == sum(
        4 * p.numel() for p in model.parameters()
    )


class _Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x + torch.rand_like(x))


class _Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs += 1
        return self.layer(x)


class _Weightless(nn.Module):
    def forward(self, x):
        return x * 2


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (_Random(), "random numbers in aten.rand"),
        (_Counting(), "changes its buffers .*runs"),
        (_Weightless(), "no convolution or linear"),
    ],
)
def test_networks_that_cannot_be_cut_are_refused_by_name(model, says):
    with pytest.raises(NetworkError, match=says):
        Network(model, torch.randn(2, 4))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (_Random(), "draws random numbers"),
        (_Counting(), "changes its buffer runs"),
        (_Weightless(), "no convolution or linear"),
    ],
)
def test_networks_that_are_no_function_of_their_images_are_refused_whole_as_well(model, says):
    with pytest.raises(NetworkError, match=says):
        Network(model, torch.randn(2, 4), graph=False)


def test_a_network_that_branches_on_its_images_is_sent_to_whole_forwards_and_what_the_example_never_met_is_reported():
    model = build(Branching)
    with pytest.raises(NetworkError, match=r"torch\.export cannot turn Branching .*(\n.*)*graph=False"):
        Network(model, images(1))
    network = Network(model, images(1), graph=False)
    assert [layer.name for layer in network.layers] == ["stem.weight", "calm.weight", "head.weight"]
    assert ("loud.weight", 64) in {row[:2] for row in network.coverage()}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    model = build(Residual)
    with torch.no_grad():
        model.grouped.weight[0, 0, 0, 0] = value
    with pytest.raises(NetworkError, match=r"grouped\.weight"):
        Network(model, images(1))


@KINDS
def test_channels_last_computes_the_same(kind):
    model = build(kind).to(memory_format=torch.channels_last) if kind is not Volume else build(kind)
    expected = Network(build(kind), images(1)).logits(images(3))
    network = Network(model, images(1), channels_last=True)
    torch.testing.assert_close(network.logits(images(3)), expected, rtol=1e-5, atol=1e-6)


@KINDS
@PATHS
def test_bfloat16_is_near_and_only_where_asked_for(kind, graph):
    exact = Network(build(kind), images(1), graph=graph).logits(images(3))
    coarse = Network(build(kind), images(1), graph=graph, numeric="bfloat16").logits(images(3))
    assert not torch.equal(coarse.float(), exact)
    torch.testing.assert_close(coarse.float(), exact, rtol=0.1, atol=0.1)
    assert torch.equal(Network(build(kind), images(1), graph=graph).logits(images(3)), exact)


def test_an_unknown_numeric_mode_is_refused():
    with pytest.raises(ConfigurationError, match="expected one of float32, tf32, bfloat16"):
        Network(build(Tied), images(1), numeric="float16")
