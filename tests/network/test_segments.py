"""Segments of a graph: together they are the network, each holds a layer, and blocks are not torn apart."""

import pytest
import torch

from clado.network.graph import Graph
from clado.network.network import Network
from clado.network.segments import Segment, segments
from tests.networks import Attention, Normed, Recurrent, Residual, build, images

KINDS = pytest.mark.parametrize("kind", [Residual, Attention, Recurrent, Normed])


def parts(kind, blocks=()) -> tuple[Graph, tuple[Segment, ...], Network]:
    network = Network(build(kind), images(1))
    graph = network.differentiable().engine
    assert isinstance(graph, Graph)
    return graph, segments(graph, blocks, images(2)), network


@KINDS
def test_run_one_after_another_they_are_the_network(kind):
    graph, found, network = parts(kind)
    x = images(3, seed=1)
    expected = network.logits(x)
    with torch.no_grad():
        for segment in found:
            x = segment.run(graph, x, {})
    assert torch.equal(x, expected)


@KINDS
def test_each_layer_is_in_one_and_each_holds_a_layer(kind):
    graph, found, network = parts(kind)
    assert sorted(i for segment in found for i in segment.layers) == list(range(len(network.layers)))
    assert all(segment.layers for segment in found)
    assert [segment.start for segment in found[1:]] == [segment.stop for segment in found[:-1]]
    assert found[-1].stop == len(graph.instructions)


def test_a_shortcut_is_not_cut_and_layers_without_one_stand_alone():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            return x + self.b(torch.relu(self.a(x)))

    model = torch.nn.Sequential(torch.nn.Linear(6, 4), Block(), torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
    graph = Network(model, torch.randn(1, 6)).differentiable().engine
    assert [segment.layers for segment in segments(graph, (), torch.randn(2, 6))] == [(0,), (1, 2), (3,), (4,)]
    joined = segments(graph, [(0,), (1,), (2, 3), (4,)], torch.randn(2, 6))
    assert [segment.layers for segment in joined] == [(0,), (1, 2, 3), (4,)]


def test_the_parameters_that_a_segment_reads_are_named():
    graph, found, network = parts(Normed)
    read = set().union(*(segment.reads(graph) for segment in found))
    assert {name for name, _ in network.model.named_parameters()} <= read
