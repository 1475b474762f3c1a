"""Laws of the graph: a resumed run is the whole run, stacked or not, and the module is never touched."""

import copy
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_structure

from clado.errors import ConfigurationError, NetworkError
from clado.grids import ActivationGrid, QuantizedLayer
from clado.network.network import Network
from clado.quantization.quantizers import WeightQuantizer
from tests import tolerance
from tests.networks import (
    Attention,
    Branching,
    Normed,
    Recurrent,
    Residual,
    Tied,
    Tokens,
    Volume,
    build,
    calls_of,
    images,
    on_batch_statistics,
    owner_of,
    rebuilt,
    renormalised,
    replaced_logits,
)

pytestmark = pytest.mark.numeric

ALL = (Residual, Attention, Tied, Recurrent, Volume, Normed)
KINDS = pytest.mark.parametrize("kind", ALL)
PATHS = pytest.mark.parametrize("graph", [True, False], ids=["graph", "whole"])
LAYERS = {
    Residual: ["stem.weight", "depthwise.weight", "grouped.weight", "up.weight", "head.weight"],
    Attention: ["patch.weight", "attention.in_proj_weight", "attention.out_proj.weight", "mlp.weight", "head.weight"],
    Tied: ["first.weight", "second.weight", "head.weight"],
    Recurrent: ["first.weight", "again.weight", "between.weight", "head.weight"],
    Volume: ["volume.weight", "grown.weight", "rows.weight", "longer.weight", "head.weight"],
    Normed: ["stem.weight", "depthwise.weight", "up.weight", "hidden.weight", "head.weight"],
}


@cache
def network_of(kind, graph=True, **settings) -> Network:
    """A network that tests share: none of them changes it."""
    return Network(build(kind), images(1), graph=graph, **settings)


@pytest.fixture(autouse=True, scope="module")
def no_test_changes_a_module():
    yield
    for kind in ALL:
        for graph in (True, False):
            state = network_of(kind, graph).model.state_dict()
            assert all(torch.equal(state[name], tensor) for name, tensor in build(kind).state_dict().items())


@KINDS
@PATHS
def test_every_weight_of_a_convolution_or_linear_operator_is_a_layer_in_execution_order(kind, graph):
    assert [layer.name for layer in network_of(kind, graph).layers] == LAYERS[kind]


@KINDS
def test_whole_forwards_know_the_same_layers_and_the_same_rest(kind):
    graph, whole = network_of(kind), network_of(kind, False)
    assert graph.layers == whole.layers
    assert graph.macs == whole.macs
    assert {row[:2] for row in graph.coverage()} == {row[:2] for row in whole.coverage()}


@KINDS
@PATHS
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_whole_run_equals_the_module(kind, count, graph):
    expected = replaced_logits(build(kind), {}, images(count))
    assert_same(network_of(kind, graph).logits(images(count)), expected)


@KINDS
@PATHS
def test_a_run_resumed_at_any_layer_equals_the_module_with_both_weights_replaced(kind, graph):
    model, network = build(kind), network_of(kind, graph)
    x = images(3)
    other = {i: weight * 0.7 + 0.01 for i, weight in enumerate(network.weights)}
    for i in range(len(network.layers)):
        for j in range(i + 1, len(network.layers)):
            state = network.advance(network.begin(x), i)
            state = network.advance(state, j, {i: other[i]})
            resumed = network.finish(state, {j: other[j]})
            whole = replaced_logits(model, {network.layers[i].name: other[i], network.layers[j].name: other[j]}, x)
            assert_same(resumed, whole)


@KINDS
def test_stacked_states_run_as_they_would_alone_and_are_not_changed(kind):
    network = network_of(kind)
    for layer in range(len(network.layers)):
        states = [network.advance(network.begin(images(2, seed)), layer) for seed in (5, 6, 7)]
        before = copy.deepcopy(states)
        stacked = network.finish(network.stack(states, layer))
        alone = torch.cat([network.finish(state) for state in states])
        assert_same(stacked, alone)
        for state, original in zip(states, before, strict=True):
            assert all(torch.equal(state.values[slot], original.values[slot]) for slot in original.values)


@PATHS
def test_tied_weights_are_replaced_in_every_place(graph):
    network = network_of(Tied, graph)
    weight = network.weights[1] * 0.5
    reference = build(Tied)
    with torch.no_grad():
        reference.second.weight.copy_(weight)
    assert_same(network.logits(images(2), {1: weight}), replaced_logits(reference, {}, images(2)))
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
    assert_same(logits, Network(build(Residual).eval(), images(1)).logits(images(4)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_macs_are_those_of_the_textbook():
    network = network_of(Residual)
    assert [layer.macs for layer in network.layers] == [8 * 8 * 6 * 9, 8 * 8 * 6 * 9, 8 * 8 * 6 * 3 * 9, 8 * 8 * 6 * 6 * 4, 6 * 4]
    assert network.macs == sum(layer.macs for layer in network.layers)
    assert [place.cut.suffix_macs for place in network.places] == [sum(y.macs for y in network.layers[i:]) for i in range(5)]


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


class _Returning(nn.Module):
    """Features and logits, in a form."""

    def __init__(self, form):
        super().__init__()
        self.form, self.body, self.head = form, nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        features = F.relu(self.body(x))
        return self.form(features, self.head(features))


FORMS = {
    "a tuple": lambda f, z: (f, z),
    "a list in a dictionary": lambda f, z: {"logits": z, "features": [f, f.sum(1)]},
    "a map": lambda f, z: f.reshape(-1, 2, 3),
    "one number": lambda f, z: z[:, 0],
    "classes too": lambda f, z: (z, z.argmax(1)),
}


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_of_any_form_are_packed_and_come_back_as_the_module_gives_them(form, graph):
    torch.manual_seed(0)
    model, x = _Returning(FORMS[form]).eval(), torch.randn(5, 4)
    network = Network(model, x[:1], graph=graph)
    packed = network.logits(x)
    assert packed.ndim == 2
    found, expected = network.outputs.unpacked(packed), model(x)
    assert tree_structure(found) == tree_structure(expected)
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=2 * tolerance.FORWARD)
    assert torch.equal(network.outputs.packed(found), packed)
    weights = ["body.weight", "head.weight"][: len(network.layers)]
    assert [layer.name for layer in network.layers] == weights


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(
    ("form", "says"),
    [
        (lambda f, z: (z, 3.0), "an object of type float"),
        (lambda f, z: (z, None), "an object of type NoneType"),
        (lambda f, z: {"loss": z.mean(), "logits": z}, r"\(\) for 2 images"),
        (lambda f, z: z.T.reshape(3, -1), r"\(3, 2\) for 2 images"),
        (lambda f, z: z.argmax(1), "no floating-point tensor"),
    ],
)
def test_outputs_that_are_no_tensors_of_the_images_are_refused(form, says, graph):
    with pytest.raises(NetworkError, match=f"the network returns .*{says}"):
        Network(_Returning(form), torch.randn(2, 4), graph=graph)


class _InPlace(nn.Module):
    """Changes its images."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(F.relu(self.body(F.relu(x.sub_(0.5), inplace=True))))


def test_images_that_the_module_changes_in_place_stay_as_they_are_and_the_logits_are_the_modules():
    torch.manual_seed(0)
    model, x = _InPlace().eval(), torch.randn(5, 4)
    copy = x.clone()
    assert_same(Network(model, torch.randn(1, 4)).logits(copy), model(x.clone()).detach())
    assert torch.equal(copy, x)
    with pytest.raises(NetworkError, match="changes its images in place"):
        Network(model, x, graph=False)


class _Blur(nn.Module):
    """A filter that nothing trains, behind a convolution; with an attention mask's −∞."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)
        self.register_buffer("filter", torch.full((4, 1, 3, 3), 1 / 9), persistent=False)
        self.register_buffer("mask", torch.triu(torch.full((3, 3), -torch.inf), 1))

    def forward(self, x):
        y = F.conv2d(F.relu(self.stem(x)), self.filter, padding=1, groups=4).mean((2, 3))
        return self.head(y) @ self.mask.softmax(-1)


@pytest.mark.parametrize("graph", [True, False])
def test_buffers_are_no_layers_and_may_be_masks(graph):
    network = Network(build(_Blur), images(1), graph=graph)
    assert [layer.name for layer in network.layers] == ["stem.weight", "head.weight"]


class _Thirds(nn.Module):
    """Reads one parameter in three parts."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Parameter(torch.randn(18, 6)), nn.Linear(6, 3)

    def forward(self, x):
        q, k, v = (F.linear(x, part) for part in self.qkv.chunk(3))
        return self.head(q * k + v)


def test_whole_forwards_know_a_weight_that_is_read_in_parts_as_one():
    torch.manual_seed(0)
    network = Network(_Thirds(), torch.randn(1, 6), graph=False)
    assert [(layer.name, layer.shape, layer.macs) for layer in network.layers] == [
        ("qkv", (18, 6), 18 * 6),
        ("head.weight", (3, 6), 18),
    ]
    assert calls_of(network, torch.randn(1, 6), 0) == []  # no call reads it whole


@pytest.mark.parametrize("graph", [True, False])
def test_three_axes_are_an_image_where_the_network_takes_one_and_signals_where_it_does_not(graph):
    signals = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    network = Network(signals, torch.randn(4, 2, 16), graph=graph)
    assert network.image_shape == (2, 16)
    assert network.logits(torch.randn(5, 2, 16)).shape == (5, 3)
    assert Network(build(Residual), images(1)[0], graph=graph).image_shape == (1, 8, 8)


def test_a_single_image_is_refused_for_what_the_network_does_with_an_image():
    said = []
    for example in (images(1), images(1)[0]):
        with pytest.raises(NetworkError) as refusal:
            Network(build(Branching), example)
        said.append(str(refusal.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("graph", [True, False])
def test_a_vector_that_is_read_as_a_matrix_is_no_layer(graph):
    class Scorer(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.direction = nn.Linear(4, 6), nn.Parameter(torch.ones(6))

        def forward(self, x):
            return F.linear(self.body(x), self.direction.view(1, 6))

    network = Network(Scorer(), torch.randn(1, 4), graph=graph)
    assert [layer.name for layer in network.layers] == ["body.weight"]
    assert "direction" in {name for name, *_ in network.coverage()}


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_are_cast_to_the_type_of_the_example(dtype, graph):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval().to(dtype)
    x = images(3)
    actual, terms = Network(model, images(1).to(dtype), graph=graph).logits(x), 144 if dtype is torch.float64 else 1
    assert actual.dtype == dtype
    # sums of narrow numbers are float32: each of three operators rounds its result
    tolerance.assert_close(actual, model(x.to(dtype)).detach(), tolerance.of_forward(3, terms, dtype))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"fixed": "stem.weight"}, "fixed is 'stem.weight'; expected a list of name patterns"),
        ({"fixed": ["stem"]}, "fixed: no parameter matches 'stem'"),
        ({"split": ["*.in_proj_wieght"]}, r"split: no parameter matches '\*\.in_proj_wieght'"),
    ],
)
def test_patterns_that_name_nothing_are_refused(arguments, says):
    with pytest.raises(ConfigurationError, match=says):
        Network(build(Residual), images(1), **arguments)


def test_a_network_that_branches_on_its_images_is_sent_to_whole_forwards_and_what_the_example_never_met_is_reported(capfd):
    model = build(Branching)
    with pytest.raises(NetworkError, match=r"Branching .* decides by the content of the images(.*\n)*.*graph=False"):
        Network(model, images(1))
    assert capfd.readouterr() == ("", "")  # torch.export would print a part of a graph
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
    expected = network_of(kind).logits(images(3))
    network = Network(model, images(1), channels_last=True)
    assert_same(network.logits(images(3)), expected)


@PATHS
def test_other_values_are_laid_out_as_the_modules_own(graph):
    """Corrections of the whole network come from files, which know no layout."""
    model = build(Residual).to(memory_format=torch.channels_last)
    network = Network(model, images(1), graph=graph, channels_last=True)
    values = {name: parameter.detach().contiguous() + 1 for name, parameter in model.named_parameters()}
    other = network.updated(values)
    assert [w.stride() for w in other.weights] == [w.stride() for w in network.weights]
    assert any(not weight.is_contiguous() for weight in other.weights)
    assert all(torch.equal(weight, values[layer.name]) for weight, layer in zip(other.weights, other.layers, strict=True))


@KINDS
@PATHS
def test_bfloat16_is_near_and_only_where_asked_for(kind, graph):
    exact = network_of(kind, graph).logits(images(3))
    coarse = network_of(kind, graph, numeric="bfloat16").logits(images(3))
    assert not torch.equal(coarse.float(), exact)
    # sums are float32: each of up to ten operators rounds its result
    tolerance.assert_close(coarse.float(), exact, tolerance.of_forward(10, 1, torch.bfloat16))
    assert torch.equal(network_of(kind, graph).logits(images(3)), exact)


def test_an_unknown_numeric_mode_is_refused():
    with pytest.raises(ConfigurationError, match="expected one of float32, tf32, bfloat16"):
        Network(build(Tied), images(1), numeric="float16")


# -- a layer replaced whole: weight, bias, the grid of its input ----------------------------------------------------------------


def other_layer(network: Network, i: int, activation: bool = True, bias: bool = True) -> QuantizedLayer:
    """Something else in the place of a layer: another weight and, where it may have them, another bias and a coarse input."""
    old_bias = network.biases[i]
    old_bias = torch.zeros(network.layers[i].num_channels) if old_bias is None else old_bias
    moved = old_bias + torch.linspace(-0.3, 0.4, len(old_bias))
    return QuantizedLayer(
        network.weights[i] * 0.7 + 0.01,
        moved if bias and network.places[i].takes_bias else None,
        ActivationGrid.of_range(-0.5 - 0.1 * i, 0.8, 2) if activation else None,
    )


def expected_logits(network: Network, replaced: dict[int, QuantizedLayer], x: torch.Tensor) -> torch.Tensor:
    """The reference: the module rebuilt by hand."""
    with torch.no_grad():
        return rebuilt(network.model, {network.layers[i].name: layer for i, layer in replaced.items()})(x)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance.assert_close(actual, expected.to(actual.dtype), tolerance.of_forward(10, 64, actual.dtype))


IN_REACH = {  # of whole forwards: which inputs may be rounded; attention's are not seen
    kind: [name for name in names if "attention" not in name] for kind, names in LAYERS.items()
}
TAKES_BIAS = {kind: LAYERS[kind] for kind in ALL} | {
    Tied: ["first.weight", "head.weight"],
    Recurrent: ["first.weight", "between.weight", "head.weight"],
}


@KINDS
def test_a_layer_takes_a_bias_unless_its_weight_is_used_twice(kind):
    network = network_of(kind)
    assert [place.layer.name for place in network.places if place.takes_bias] == TAKES_BIAS[kind]
    parameters = dict(network.model.named_parameters())
    for name, bias in zip(LAYERS[kind], network.biases, strict=True):
        old_bias = parameters.get(name.replace("weight", "bias")) if name in TAKES_BIAS[kind] else None
        assert (bias is None) == (old_bias is None)
        assert bias is None or torch.equal(bias, old_bias)


@KINDS
@pytest.mark.parametrize("what", ["weight and bias", "weight and input", "all"])
def test_a_replaced_layer_is_that_of_the_module_rebuilt_with_it(kind, what):
    network, x = network_of(kind), images(3)
    layers = {
        i: other_layer(network, i, what != "weight and bias", what != "weight and input") for i in range(len(network.layers))
    }
    for i, layer in layers.items():
        assert_same(network.logits(x, {i: layer}), expected_logits(network, {i: layer}, x))
    assert_same(network.logits(x, layers), expected_logits(network, layers, x))


@KINDS
def test_every_part_of_a_replaced_layer_shows_in_the_logits(kind):
    """Else the laws above would hold, within their tolerance, for a network that ignores it."""
    network, x = network_of(kind), images(3)
    for i in range(len(network.layers)):
        layer = other_layer(network, i)
        full = network.logits(x, {i: layer})
        assert (
            float((full - network.logits(x, {i: QuantizedLayer(layer.weight, layer.bias)})).abs().max()) > 3 * tolerance.FORWARD
        )
        if layer.bias is not None and i != LAYERS[kind].index("head.weight"):
            plain = network.logits(x, {i: QuantizedLayer(layer.weight, None, layer.activation)})
            assert float((full - plain).abs().max()) > 3 * tolerance.FORWARD


@KINDS
def test_whole_forwards_do_the_same_where_they_can_and_say_where_they_cannot(kind):
    whole, graph, x = network_of(kind, False), network_of(kind), images(3)
    possible = {}
    for i, name in enumerate(LAYERS[kind]):
        layer = other_layer(whole, i)
        if name not in IN_REACH[kind]:
            with pytest.raises(
                NetworkError, match=rf"input of {name} cannot be reached with whole forward passes; leave activations in float"
            ):
                whole.logits(x, {i: layer})
            layer = QuantizedLayer(layer.weight, layer.bias)
        if not whole.places[i].takes_bias:
            with pytest.raises(NetworkError, match=f"{name} has no bias, and whole forward passes cannot add one"):
                whole.logits(x, {i: QuantizedLayer(layer.weight, torch.ones(whole.layers[i].num_channels))})
        if graph.places[i].takes_bias or layer.bias is None:
            possible[i] = layer
            assert_same(whole.logits(x, {i: layer}), expected_logits(whole, {i: layer}, x))
    assert_same(whole.logits(x, possible), expected_logits(whole, possible, x))


@pytest.mark.parametrize(("kind", "layer"), [(Tied, 1), (Recurrent, 1)])
def test_a_bias_for_a_weight_that_is_used_twice_is_refused(kind, layer):
    network = network_of(kind)
    with pytest.raises(NetworkError, match=rf"{LAYERS[kind][layer]} cannot have a bias"):
        network.logits(images(1), {layer: QuantizedLayer(network.weights[layer], torch.ones(4))})


@KINDS
@PATHS
def test_a_resumed_run_keeps_what_was_replaced_before_until_its_last_use(kind, graph):
    network, x = network_of(kind, graph), images(2)
    layers = {}
    for i, name in enumerate(LAYERS[kind]):
        layer = other_layer(network, i, bias=graph and name in TAKES_BIAS[kind])
        layers[i] = layer if graph or name in IN_REACH[kind] else QuantizedLayer(layer.weight, layer.bias)
    for i, j in pairwise(range(len(layers))):
        state = network.advance(network.begin(x), i)
        state = network.advance(state, j, {i: layers[i]})
        for stop in range(j, len(layers)):  # by way of every later cut
            state = network.advance(state, stop, {j: layers[j]} if stop > j else None)
        resumed = network.finish(state, {j: layers[j]})
        assert_same(resumed, expected_logits(network, {i: layers[i], j: layers[j]}, x))


def test_states_with_unlike_layers_yet_to_use_are_not_for_one_stack():
    network = network_of(Recurrent)
    layers = [other_layer(network, 1), other_layer(network, 1, activation=False)]
    states = [network.advance(network.begin(images(2)), 2, {1: layer}) for layer in layers]
    again = network.advance(network.begin(images(2, seed=5)), 2, {1: layers[0]})
    floats = network.advance(network.begin(images(2)), 2)
    keys = [state.stack_key for state in (*states, again, floats)]
    assert keys[0] == keys[2]
    assert len(set(keys)) == 3
    behind = [network.advance(state, 3) for state in (*states, again, floats)]
    assert len({state.stack_key for state in behind}) == 1  # used for the last time: all alike
    stacked = network.stack([states[0], again], 2)
    expected = expected_logits(network, {1: layers[0]}, torch.cat([images(2), images(2, seed=5)]))
    assert_same(network.finish(stacked), expected)


def images_first(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Attention has tokens before images, or both in one axis."""
    return value if value.shape == like.shape else value.reshape(like.transpose(0, 1).shape).transpose(0, 1)


@KINDS
def test_what_a_layer_sees_is_what_a_hook_on_the_module_sees(kind):
    network, x = network_of(kind), images(3)
    model = rebuilt(network.model, {})
    hooked = []

    def hook(module, arguments, output):
        hooked.append((arguments[0].clone(), output.clone()))  # the module may go on in place

    for i, name in enumerate(LAYERS[kind]):
        owner, _ = owner_of(model, name)
        users = [module for module in model.modules() if getattr(module, "weight", None) is owner.weight]
        hooks = [module.register_forward_hook(hook) for module in dict.fromkeys(users)]
        hooked.clear()
        with torch.inference_mode():
            model(x)
            calls = calls_of(network, x, i)
            for handle in hooks:
                handle.remove()
            assert len(calls) == len(hooked) == (1 if name in TAKES_BIAS[kind] else 2)
            for call, user, (inputs, outputs) in zip(calls, users * 2, hooked, strict=False):
                assert_same(images_first(call.input, inputs), inputs)
                assert_same(images_first(call.apply(call.input, network.weights[i], user.bias), outputs), outputs)


# -- queries, keys and values as layers of their own ----------------------------------------------------------------------------

SPLIT = ["attention.in_proj_weight.q", "attention.in_proj_weight.k", "attention.in_proj_weight.v"]


@cache
def split_network() -> Network:
    return network_of(Attention, split=("*.in_proj_weight",))


def test_a_split_weight_is_three_layers_in_the_place_of_one():
    network = split_network()
    assert [layer.name for layer in network.layers] == ["patch.weight", *SPLIT, *LAYERS[Attention][2:]]
    assert [network.layers[i].shape for i in (1, 2, 3)] == [(8, 8)] * 3
    assert torch.equal(torch.cat(network.weights[1:4]), network.model.attention.in_proj_weight)
    assert torch.equal(torch.cat(network.biases[1:4]), network.model.attention.in_proj_bias)
    fused = network_of(Attention)
    assert sum(layer.macs for layer in network.layers[1:4]) == fused.layers[1].macs
    assert sum(layer.num_weights for layer in network.layers) == sum(layer.num_weights for layer in fused.layers)
    assert network.coverage() == fused.coverage()
    assert_same(network.logits(images(3)), fused.logits(images(3)))


@pytest.mark.parametrize("part", [1, 2, 3])
def test_one_part_replaced_is_those_rows_replaced(part):
    network, x = split_network(), images(3)
    layer = other_layer(network, part)
    assert_same(network.logits(x, {part: layer}), expected_logits(network, {part: layer}, x))
    model = copy.deepcopy(network.model).eval()
    rows = slice(8 * part - 8, 8 * part)
    with torch.no_grad():
        model.attention.in_proj_weight[rows] = layer.weight
        model.attention.in_proj_bias[rows] = layer.bias
        expected = model(x)
    assert_same(network.logits(x, {part: QuantizedLayer(layer.weight, layer.bias)}), expected)
    state = network.state_dict({part: layer})
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_parts_replaced_one_after_another_are_the_module_with_all_of_their_rows_replaced():
    network, x = split_network(), images(3)
    layers = {i: other_layer(network, i, activation=False) for i in range(len(network.layers))}
    for chosen in ([1, 2], [1, 3], [2, 3], [1, 2, 3], list(layers)):
        state = network.begin(x)
        for i, j in pairwise([*chosen, len(layers)]):
            state = network.advance(network.advance(state, i), j, {i: layers[i]})
        expected = expected_logits(network, {i: layers[i] for i in chosen}, x)
        assert_same(network.finish(state), expected)
        assert_same(network.logits(x, {i: layers[i] for i in chosen}), expected)
    loaded = copy.deepcopy(network.model).eval()
    loaded.load_state_dict(network.state_dict(layers))
    with torch.no_grad():
        assert_same(loaded(x), expected)


def test_parts_read_one_input_and_the_finest_of_their_grids_counts():
    network, x = split_network(), images(3)
    grids = {1: ActivationGrid.of_range(-2, 2, 2), 2: ActivationGrid.of_range(-2, 2, 4), 3: ActivationGrid.of_range(-2, 2, 3)}
    layers = {i: QuantizedLayer(network.weights[i], None, grid) for i, grid in grids.items()}
    assert_same(network.logits(x, layers), expected_logits(network, {2: layers[2]}, x))


@pytest.mark.parametrize("bits", [2, 4])
def test_all_parts_at_equal_bits_per_channel_are_the_fused_layer(bits):
    network, fused, quantizer = split_network(), network_of(Attention), WeightQuantizer()
    parts = {i: quantizer.fake_quantize(network.weights[i], bits) for i in (1, 2, 3)}
    whole = quantizer.fake_quantize(fused.weights[1], bits)
    assert torch.equal(torch.cat(list(parts.values())), whole)
    assert_same(network.logits(images(3), parts), fused.logits(images(3), {1: whole}))


@pytest.mark.parametrize(
    ("kind", "split", "says"),
    [
        (Attention, "mlp.weight", r"mlp\.weight cannot be split .* rows in thirds; it has 8 rows"),
        (Residual, "stem.weight", r"stem\.weight cannot be split .* expected one linear operator .* aten\.conv2d"),
        (Tied, "second.*", r"second\.weight cannot be split .* read by aten\.conv2d\.default, aten\.conv2d\.default"),
    ],
)
def test_what_is_no_three_projections_is_not_split(kind, split, says):
    with pytest.raises(NetworkError, match=says):
        Network(build(kind), images(1), split=(split,))


def test_whole_forwards_split_nothing():
    with pytest.raises(NetworkError, match="split only in a graph; expected graph=True, or no split"):
        Network(build(Attention), images(1), split=("*.in_proj_weight",), graph=False)


# -- other values of parameters and buffers -------------------------------------------------------------------------------------


@KINDS
@PATHS
def test_other_values_give_what_a_module_with_that_state_gives(kind, graph):
    network, x = network_of(kind, graph), images(3)
    other = build(kind, seed=7).eval()
    names = [name for name, _ in other.named_parameters()] + [name for name, b in other.named_buffers() if b.is_floating_point()]
    state = {name: other.state_dict()[name] for name in names}
    if graph:  # a token expanded over the batch is not read as it is
        state = {name: tensor for name, tensor in state.items() if name in network.engine.named}
    expected = copy.deepcopy(network.model)
    expected.load_state_dict({**state, **({"third.weight": state["second.weight"]} if kind is Tied else {})}, strict=False)
    changed = network.updated(state)
    assert_same(changed.logits(x), replaced_logits(expected, {}, x))
    assert all(torch.equal(weight, state[name]) for weight, name in zip(changed.weights, LAYERS[kind], strict=True))
    layers = {0: other_layer(changed, 0)}
    assert_same(changed.logits(x, layers), expected_logits(Network(expected, x, graph=False), layers, x))
    assert_same(network.logits(x), replaced_logits(build(kind), {}, x))  # the first network has not changed


@PATHS
def test_changes_add_up_and_the_last_one_counts(graph):
    network, x = network_of(Normed, graph), images(3)
    first, second = torch.full((6,), 0.3), torch.full((6,), 2.0)
    changed = network.updated({"first.running_mean": first, "first.running_var": first})
    changed = changed.updated({"first.running_var": second})
    expected = replaced_logits(network.model, {"first.running_mean": first, "first.running_var": second}, x)
    assert_same(changed.logits(x), expected)
    state = changed.state_dict({})
    assert torch.equal(state["first.running_mean"], first)
    assert torch.equal(state["first.running_var"], second)


@PATHS
@pytest.mark.parametrize("name", ["first.scale", "stem.bias"])
def test_an_unknown_name_is_refused(graph, name):
    with pytest.raises(NetworkError, match=f"{name}.* cannot get another value"):
        network_of(Normed, graph).updated({name: torch.zeros(6)})


# -- what the module gets --------------------------------------------------------------------------------------------------------


@KINDS
def test_the_state_of_replaced_layers_loaded_into_the_module_gives_the_same_logits(kind):
    """A bias goes into the layer's own bias, else into the batch norm after it, else gets its own name next to the weight."""
    network, x = network_of(kind), images(3)
    layers = {i: other_layer(network, i, activation=False) for i in range(len(network.layers))}
    for chosen in ({i: layers[i]} for i in layers) if kind in (Residual, Normed) else (layers,):
        state = network.state_dict(chosen)
        model = build(kind).eval()
        added = set(state) - set(model.state_dict())
        for name in added:
            model.get_submodule(name.removesuffix(".bias")).bias = nn.Parameter(torch.zeros_like(state[name]))
        model.load_state_dict(state)
        with torch.no_grad():
            assert_same(model(x), network.logits(x, chosen))
            assert_same(model(x), expected_logits(network, chosen, x))


def test_a_bias_goes_where_the_module_has_a_place_for_it():
    network = network_of(Normed)
    tensors = network.model.state_dict()

    def differing(i):
        state = network.state_dict({i: other_layer(network, i)})
        return {name for name, tensor in state.items() if name not in tensors or not torch.equal(tensor, tensors[name])}

    assert differing(0) == {"stem.weight", "first.running_mean"}
    assert differing(1) == {"depthwise.weight", "depthwise.bias"}
    assert differing(2) == {"up.weight", "third.running_mean"}
    assert differing(3) == {"hidden.weight", "fourth.running_mean"}
    assert differing(4) == {"head.weight", "head.bias"}


def test_a_bias_that_goes_into_a_batch_norm_moves_the_mean_that_ships():
    network, x = network_of(Normed), images(3)
    layer = other_layer(network, 0, activation=False)
    shipped = network.updated({"first.running_mean": torch.full((6,), 0.5)})
    state = shipped.state_dict({0: layer})
    assert torch.equal(state["first.running_mean"], 0.5 - layer.bias)
    loaded = build(Normed)
    loaded.load_state_dict(state)
    assert_same(replaced_logits(loaded, {}, x), shipped.logits(x, {0: layer}))


class _Bare(nn.Module):
    """Weights without a bias under names of several kinds, two of them in one module."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
        self.first = nn.Parameter(torch.randn(8, 8))
        self.second = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        x = x.squeeze(1)
        x = self.attention(x, x, x, need_weights=False)[0].mean(1)
        return F.linear(F.relu(F.linear(x, self.first)), self.second)


def test_biases_that_the_module_has_no_place_for_have_names_of_their_own():
    model = _Bare()
    network = Network(model, images(1))
    layers = {i: QuantizedLayer(w, torch.full((len(w),), float(i))) for i, w in enumerate(network.weights)}
    added = {name: tensor for name, tensor in network.state_dict(layers).items() if name not in model.state_dict()}
    assert {name: float(tensor[0]) for name, tensor in added.items()} == {
        "attention.in_proj_bias": 0.0,
        "attention.out_proj.bias": 1.0,
        "first_bias": 2.0,
        "second_bias": 3.0,
    }


# -- batch norm -----------------------------------------------------------------------------------------------------------------

NORMED = pytest.mark.parametrize("kind", [Residual, Normed, Tokens])


@NORMED
def test_on_batch_statistics_a_run_is_the_module_with_its_batch_norms_in_training(kind):
    network, x = network_of(kind), images(5)
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    training = network.with_batch_statistics()
    with torch.no_grad():
        assert_same(training.logits(x), on_batch_statistics(network.model)(x))
        layers = {i: other_layer(network, i) for i in range(len(network.layers))}
        reference = rebuilt(network.model, {network.layers[i].name: layer for i, layer in layers.items()})
        assert_same(training.logits(x, layers), on_batch_statistics(reference)(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.model.state_dict().items())
    assert_same(network.logits(x), replaced_logits(network.model, {}, x))
    assert float((training.logits(x) - network.logits(x)).abs().max()) > 1e-2


@NORMED
def test_stacked_probes_have_statistics_of_their_own(kind):
    network = network_of(kind)
    training = network.with_batch_statistics()
    parts = [images(4, seed) * (1 + seed) for seed in (0, 1, 2)]
    alone = torch.cat([training.logits(part) for part in parts])
    for layer in range(len(network.layers)):
        states = [training.advance(training.begin(part), layer) for part in parts]
        assert_same(training.finish(training.stack(states, layer)), alone)
    assert float((training.logits(torch.cat(parts)) - alone).abs().max()) > 1e-2  # as one probe they are another


def test_whole_forwards_have_no_batch_statistics():
    with pytest.raises(NetworkError, match="batch statistics need a graph; expected graph: true"):
        network_of(Residual, False).with_batch_statistics()


@NORMED
@PATHS
@pytest.mark.parametrize("sizes", [(24,), (1, 7, 16), (12, 12)])
def test_normalisation_is_that_of_the_module_whatever_the_batches(kind, graph, sizes):
    network, x = network_of(kind, graph), images(24)
    layers = {i: other_layer(network, i, bias=graph) for i in range(1, len(network.layers))}
    for chosen in ({}, layers):
        actual = network.normalisation(x.split(sizes), chosen)
        reference = rebuilt(network.model, {network.layers[i].name: layer for i, layer in chosen.items()})
        expected = renormalised(reference, x)
        assert set(actual) == set(expected)
        for name, tensor in expected.items():
            assert_same(actual[name], tensor)
        assert_same(network.updated(actual).logits(x, chosen), replaced_logits(reference, actual, x))


@pytest.mark.parametrize("graph", [True, False])
def test_batch_norms_before_the_first_searched_layer_are_normalised_too(graph):
    model, x = build(Normed), images(24)
    first = Network(model, images(1)).layers[0].name
    actual = Network(model, images(1), [first], graph=graph).normalisation(x.split((10, 14)))
    expected = renormalised(model, x)
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert_same(actual[name], tensor)


def test_later_batch_norms_see_what_earlier_ones_have_become():
    network, x = network_of(Normed), images(24)
    actual = network.normalisation([x])
    stale = network.updated({name: tensor for name, tensor in actual.items() if not name.startswith("first")}).normalisation([x])
    assert float((actual["second.running_var"] - build(Normed).state_dict()["second.running_var"]).abs().max()) > 1e-2
    assert all(torch.equal(stale[name], actual[name]) for name in actual)  # what they were before does not count


class _PreActivated(nn.Module):
    """The input of a batch norm is changed in place after it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        x = self.stem(x)
        x += self.body(F.relu(self.norm(x)))
        return self.head(x.mean((2, 3)))


@PATHS
def test_a_value_changed_in_place_behind_a_batch_norm_counts_as_the_batch_norm_saw_it(graph):
    model, x = build(_PreActivated), images(12)
    actual = Network(model, images(1), graph=graph).normalisation([x[:5], x[5:]])
    for name, tensor in renormalised(model, x).items():
        assert_same(actual[name], tensor)


@pytest.mark.parametrize("kind", [Tied, Attention])
def test_without_batch_norm_there_is_nothing_to_normalise(kind):
    network = network_of(kind)
    assert network.normalisation([images(4)]) == network_of(kind, False).normalisation([images(4)]) == {}
    assert torch.equal(network.with_batch_statistics().logits(images(4)), network.logits(images(4)))


class _SharedNorm(nn.Module):
    """One batch norm after two layers: its statistics belong to neither of them."""

    def __init__(self, two_names):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.again = self.norm if two_names else None
        self.own = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        return self.head(self.own((self.again or self.norm)(self.second(x)).mean((2, 3))))


@pytest.mark.parametrize("two_names", [False, True])
def test_a_batch_norm_with_two_readers_is_left_alone(two_names):
    model, x = build(lambda: _SharedNorm(two_names)), images(6)
    network, whole = Network(model, images(1)), Network(model, images(1), graph=False)
    assert set(network.normalisation([x])) == set(whole.normalisation([x])) == {"own.running_mean", "own.running_var"}
    layers = {i: other_layer(network, i, activation=False) for i in range(3)}
    assert_same(network.logits(x, layers), expected_logits(network, layers, x))
    folded, fold = network.folded()
    assert_same(folded.logits(x, {i: fold(i, layer) for i, layer in layers.items()}), expected_logits(network, layers, x))
    state = network.state_dict(layers)
    assert torch.equal(state["norm.running_mean"], model.norm.running_mean)
    assert torch.equal(state["second.bias"], layers[1].bias)


@PATHS
@pytest.mark.parametrize("kind", [*ALL, Tokens])
def test_folded_networks_compute_the_same(kind, graph):
    network, x = network_of(kind, graph), images(3)
    folded, fold = network.folded()
    layers = {i: other_layer(network, i, activation=False, bias=graph) for i in range(len(network.layers))}
    assert_same(folded.logits(x), network.logits(x))
    fitting = {i: fold(i, layer) for i, layer in layers.items()}
    for i, layer in layers.items():
        assert_same(folded.logits(x, {i: fitting[i]}), network.logits(x, {i: layer}))
    assert_same(folded.logits(x, fitting), network.logits(x, layers))
    plain = {i: fold(i, QuantizedLayer(layer.weight)) for i, layer in layers.items()}
    assert_same(folded.logits(x, plain), network.logits(x, {i: layer.weight for i, layer in layers.items()}))
    assert [place.cut for place in folded.places] == [place.cut for place in network.places]


def test_every_batch_norm_behind_a_layer_is_folded():
    network = network_of(Normed)
    _, fold = network.folded()
    layers = [QuantizedLayer(weight) for weight in network.weights]
    assert [fold(i, layer) is not layer for i, layer in enumerate(layers)] == [True, True, True, True, False]


def test_a_batch_norm_over_tokens_is_not_that_of_the_layer_before_it():
    network = network_of(Tokens)
    assert [place.norm_mean for place in network.places] == [None, None, None]
    bias = torch.linspace(-1, 1, 8)
    state = network.state_dict({0: QuantizedLayer(network.weights[0], bias)})
    assert torch.equal(state["embed.bias"], bias)
    assert torch.equal(state["over_tokens.running_mean"], network.model.over_tokens.running_mean)


def test_a_run_does_not_go_back():
    network = network_of(Residual)
    state = network.advance(network.begin(images(2)), 2)
    with pytest.raises(ValueError, match="cannot go back"):
        network.advance(state, 1)


@NORMED
def test_folded_states_are_left_as_they_are(kind):
    """What follows a batch norm may run in place: not on a value that was kept."""
    folded, _ = network_of(kind).folded()
    for layer in range(len(folded.layers)):
        state = folded.advance(folded.begin(images(2)), layer)
        before = {slot: value.clone() for slot, value in state.values.items()}
        first = folded.finish(state)
        assert torch.equal(folded.finish(state), first)
        assert all(torch.equal(state.values[slot], value) for slot, value in before.items())
