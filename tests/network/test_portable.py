"""A graph that goes to another process: the same logits bit for bit, without an export, and without the module's tensors."""

import pickle

import pytest
import torch
from torch import nn

from clado.errors import NetworkError
from clado.network import network as networks
from clado.network.network import Network
from clado.network.program import SizeRule
from tests.networks import Attention, Normed, Recurrent, Residual, Tied, Tokens, build, images

KINDS = (Residual, Attention, Tied, Recurrent, Normed, Tokens)


def sent(network: Network) -> networks.PortableGraph:
    """As Dask sends it."""
    return pickle.loads(pickle.dumps(network.portable))


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_network_computes_the_same_bits_and_exports_nothing(kind, monkeypatch):
    x = images(5)
    original = Network(build(kind), x[:2])
    exported = sent(original)
    monkeypatch.setattr(networks, "compile_graph", lambda *arguments: pytest.fail("it was exported again"))
    model = build(kind)
    restored = Network(model, x[:2], exported=exported)
    assert restored.layers == original.layers
    assert [place.cut for place in restored.places] == [place.cut for place in original.places]
    assert restored.coverage() == original.coverage()
    assert torch.equal(restored.logits(x), original.logits(x))
    for layer in range(len(original.layers)):  # and from every cut, with a weight replaced
        replaced = {layer: original.weights[layer] * 0.5}
        runs = [network.finish(network.advance(network.begin(x), layer), replaced) for network in (original, restored)]
        assert torch.equal(*runs)
    owned = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert {weight.data_ptr() for weight in restored.weights} <= owned  # no copies


@pytest.mark.parametrize("kind", KINDS)
def test_the_modules_tensors_are_not_sent(kind):
    wide = build(kind)
    graph = Network(wide, images(2)).portable.graph
    sizes = {(tuple(tensor.shape), tensor.data_ptr()) for tensor in wide.parameters()}
    assert not sizes & {(tuple(v.shape), v.data_ptr()) for v in graph.constants.values() if isinstance(v, torch.Tensor)}


def test_a_restored_network_reads_its_own_modules_weights():
    x = images(3)
    exported = sent(Network(build(Residual), x[:2]))
    other = build(Residual, seed=7)
    assert torch.equal(Network(other, x[:2], exported=exported).logits(x), Network(other, x[:2]).logits(x))


def test_a_module_that_does_not_fit_is_exported_itself():
    x = images(3)
    exported = sent(Network(build(Residual), x[:2]))
    wider = Residual(channels=8).eval()
    assert not exported.fits(wider)
    assert torch.equal(Network(wider, x[:2], exported=exported).logits(x), Network(wider, x[:2]).logits(x))
    with pytest.raises(NetworkError, match="graph of another network was given for Residual"):
        exported.restored(wider)


def test_what_has_no_graph_or_other_values_is_not_sent():
    network = Network(build(Residual), images(2))
    assert Network(build(Residual), images(2), graph=False).portable is None
    assert network.updated({"norm.running_mean": torch.zeros(6)}).portable is None


class Halved(nn.Module):
    """Sizes that grow with the images, with the images plus a constant, and with half of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.reshape(x.shape[0] * 2, -1).reshape(-1, 64))


def test_size_rules_are_plain_numbers_where_they_can_be():
    program = torch.export.export(
        Halved().eval(), (images(2),), dynamic_shapes=({0: torch.export.Dim("batch", max=1000)},)
    ).run_decompositions({})
    sizes = [n.meta["val"] for n in program.graph_module.graph.nodes if n.op != "output"]
    batch = next(v.shape[0] for v in sizes if getattr(v, "ndim", 0) == 4)
    symbol = batch.node.expr
    assert SizeRule.of(batch, symbol) == SizeRule(0, 1)
    assert SizeRule.of(2 * batch + 3, symbol) == SizeRule(3, 2)
    assert SizeRule.of(7, symbol) == SizeRule(7, 0)
    squared = SizeRule.of(batch * batch, symbol)
    assert squared.expression is not None
    assert [squared(n) for n in (1, 2, 9)] == [1, 4, 81]
    assert [SizeRule.of(2 * batch + 3, symbol)(n) for n in (1, 5)] == [5, 13]
