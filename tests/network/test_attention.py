"""Attention in an exported graph with the images first: the same function without detours, and only where that is so."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clado.network.attention import Movement, images_first
from clado.network.network import Network
from clado.network.program import export
from tests import tolerance
from tests.networks import calls_of

pytestmark = pytest.mark.numeric

ORDERS = {"aten.transpose.int", "aten.permute.default"}


class _SelfAttention(nn.Module):
    """`nn.MultiheadAttention` as a residual branch."""

    def __init__(self, batch_first: bool = True, heads: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.attention = nn.MultiheadAttention(8, heads, batch_first=batch_first, bias=bias)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = x.squeeze(1)
        y = x if self.batch_first else x.transpose(0, 1)
        y = self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + (y if self.batch_first else y.transpose(0, 1))).mean(1))


class _Shared(_SelfAttention):
    """The projection before attention has a second reader."""

    def forward(self, x):
        x = x.squeeze(1)
        qkv = F.linear(x.transpose(0, 1), self.attention.in_proj_weight).transpose(0, 1)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in qkv.chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((y + qkv[..., :8].relu()).mean(1))


class _Crossed(_SelfAttention):
    """Queries from elsewhere than keys and values."""

    def forward(self, x):
        x = x.squeeze(1)
        return self.head(self.attention(x[:, :3], x, x, need_weights=False)[0].mean(1))


class _Direct(_SelfAttention):
    """Written with the images first."""

    def forward(self, x):
        x = x.squeeze(1)
        qkv = F.linear(x, self.attention.in_proj_weight).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]).transpose(1, 2).reshape(x.shape)
        return self.head(self.attention.out_proj(y).mean(1))


def tokens(count: int, length: int = 5) -> torch.Tensor:
    return torch.randn(count, 1, length, 8, generator=torch.Generator().manual_seed(count))


MODELS = {
    "images first": _SelfAttention,
    "positions first": lambda: _SelfAttention(batch_first=False),
    "one head": lambda: _SelfAttention(heads=1),
    "no bias": lambda: _SelfAttention(bias=False),
    "shared": _Shared,
    "crossed": _Crossed,
    "direct": _Direct,
}


@pytest.mark.parametrize("length", [1, 2, 3, 5])
@pytest.mark.parametrize("name", MODELS)
def test_the_graph_computes_what_the_module_does_for_any_number_of_images(name, length):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    network = Network(model, tokens(2, length))
    for count in (1, 2, 3, 7):
        with torch.no_grad():
            tolerance.assert_close(network.logits(tokens(count, length)), model(tokens(count, length)))


@pytest.mark.parametrize("name", ["images first", "positions first", "one head", "no bias"])
def test_no_detour_is_left_around_self_attention(name):
    model = MODELS[name]().eval()
    program = export(model, tokens(2))
    images_first(program)
    nodes = list(program.graph_module.graph.nodes)
    left = {str(node.target) for node in nodes}
    moved = [node.target for node in nodes if isinstance(node.target, Movement)]
    assert len(moved) == 4
    assert not {"aten.clone.default", "aten.select.int", "aten.view.default"} & left
    assert all(movement.is_view((2, 5, 24)) for movement in moved[:3])
    if name != "positions first":
        assert not ORDERS & left


@pytest.mark.parametrize("name", ["shared", "direct"])
def test_what_is_no_detour_or_has_other_readers_stays(name):
    program = export(MODELS[name]().eval(), tokens(2))
    before = [str(node.target) for node in program.graph_module.graph.nodes]
    images_first(program)
    assert [str(node.target) for node in program.graph_module.graph.nodes] == before


def test_projections_of_attention_read_images_first():
    network = Network(_SelfAttention().eval(), tokens(2))
    assert [calls_of(network, tokens(3), layer)[0].input.shape[:2] for layer in (0, 1)] == [(3, 5), (3, 5)]


def test_a_movement_splits_picks_permutes_and_merges():
    x = torch.arange(2 * 3 * 8).reshape(2, 3, 8)
    movement = Movement((-1, 3, 2, 4), ((2, 1),), (1, 0, 2), (3, -1))
    assert torch.equal(movement(x), x[..., 4:].transpose(0, 1).reshape(3, -1))
    assert not movement.is_view(x.shape)
    assert Movement((-1, 3, 2, 4), ((2, 1),), (0, 2, 1), (-1, 4, 3)).is_view(x.shape)
