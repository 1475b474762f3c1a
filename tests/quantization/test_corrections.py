"""Static and final corrections: each keeps the contract, and does to the module itself what its name says."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from clado.errors import ConfigurationError, DataError, NetworkError
from clado.grids import Codes, Grid, QuantizedLayer
from clado.network.network import Network
from clado.network.normalisation import NormStatistics
from clado.plugins import available
from clado.quantization import sweep
from clado.quantization.corrections import batchnorm_reestimation, correction_of, output_statistics
from clado.quantization.preparation import Prepared, Recipe, prepare
from clado.quantization.quantizers import WeightQuantizer
from tests import tolerance
from tests.contracts.correction import (
    NUM_IMAGES,
    SPLIT,
    STATISTICS,
    CorrectionContract,
    calibration,
    corrected,
    network_of,
    sample_at,
)
from tests.contracts.rounding import sample_of
from tests.networks import (
    Attention,
    Normed,
    Recurrent,
    Residual,
    Tied,
    Volume,
    build,
    images,
    owner_of,
    rebuilt,
    replaced_logits,
)

pytestmark = pytest.mark.numeric


@pytest.fixture(autouse=True)
def every_row(monkeypatch):
    """Moments of all positions, so that what is matched is matched up to rounding."""
    monkeypatch.setattr(sweep, "FEWEST_ROWS", 2**20)


class TestOutputStatistics(CorrectionContract):
    name = "output_statistics"


class TestBatchNormReestimation(CorrectionContract):
    name = "batchnorm_reestimation"


def test_every_static_or_final_correction_has_a_contract_class():
    tested = {test.name for test in CorrectionContract.__subclasses__()}
    assert tested == {name for name in available("corrections") if correction_of(name).stage in ("layer", "final")}


def test_an_unknown_correction_lists_the_valid_ones():
    with pytest.raises(
        ConfigurationError, match=r"unknown correction 'bias'; expected one of .*batchnorm_reestimation.*output_sta"
    ):
        Recipe(corrections=("bias",))


# -- output statistics -----------------------------------------------------------------------------------------------------------


def matched(
    kind, widths: tuple[int, ...] = (), per_channel: bool = True, names: tuple[str, ...] = ("output_statistics",)
) -> Prepared:
    """The network at 2 and 4 bits, from calibration images in two batches, whose moments are used as they are measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "MOST_BLOCKS", 1)  # one block does not tell the noise of its covariances
        return corrected(kind, *names, per_channel=per_channel, sizes=(20, 28), widths=widths)


def outputs(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """What a layer gives, (channels, observations), by a hook on the module that has its weight."""
    owner, rows = owner_of(model, name)
    values = []
    hook = owner.register_forward_hook(lambda _, arguments, output: values.append(output.clone()))
    with torch.no_grad():
        model(x)
    hook.remove()
    (output,) = values
    return output.movedim(-1 if isinstance(owner, nn.Linear) else 1, 0)[rows].flatten(1).double()


def check_moments(ready: Prepared, option: int, deviation: bool = True) -> None:
    """The law: on the calibration images a channel's mean, and deviation, with this layer in place are the float layer's."""
    model, x = ready.network.model, torch.cat(calibration())
    name = ready.space.layers[ready.space.options[option].layer].name
    floats, ours = (outputs(rebuilt(model, layers), name, x) for layers in ({}, {name: ready.layers[option]}))
    # observations are added up in float32
    share = tolerance.FORWARD + tolerance.of_forward(1, floats.shape[1])
    tolerance.assert_close(ours.mean(1), floats.mean(1), share)
    if deviation:
        tolerance.assert_close(ours.std(1), floats.std(1), share)


@pytest.mark.parametrize("kind", [Residual, Attention, Volume, Normed, SPLIT])
@pytest.mark.parametrize("widths", [(), (8,)], ids=["float inputs", "inputs on a grid"])
def test_mean_and_deviation_of_every_channel_become_those_of_the_float_layer(kind, widths):
    ready = matched(kind, widths)
    plain = matched(kind, widths, names=())
    for option, (i, bits, _) in enumerate(ready.space.options):
        # channels of a grouped transposed convolution share the scales of their group
        own_scale = ready.space.layers[i].name != "grown.weight"
        check_moments(ready, option, deviation=own_scale)
        if bits == 2:
            with pytest.raises(AssertionError):
                check_moments(plain, option)
        if not own_scale:
            assert torch.equal(ready.layers[option].weight, plain.layers[option].weight)
    assert ready.notes == ()


@pytest.mark.parametrize("kind", [Residual, Attention, Normed])
@pytest.mark.parametrize("widths", [(), (8,)], ids=["float inputs", "inputs on a grid"])
def test_a_per_tensor_scale_stays_and_only_the_mean_is_matched(kind, widths):
    ready, plain = matched(kind, widths, per_channel=False), matched(kind, widths, per_channel=False, names=())
    for option, (layer, before) in enumerate(zip(ready.layers, plain.layers, strict=True)):
        check_moments(ready, option, deviation=False)
        assert layer.grid.scale.numel() == 1
        assert torch.equal(layer.weight, before.weight)


@pytest.mark.parametrize("kind", [Residual, Normed, SPLIT])
def test_corrected_layers_together_ship_as_the_state_of_the_module(kind):
    ready = matched(kind)
    network, chosen = ready.deployed(ready.space.narrowest)
    model = build(Attention if kind == SPLIT else kind).eval()
    state = network.state_dict(chosen)
    for name in set(state) - set(model.state_dict()):
        model.get_submodule(name.removesuffix(".bias")).bias = nn.Parameter(torch.zeros_like(state[name]))
    model.load_state_dict(state)
    with torch.inference_mode():
        tolerance.assert_close(model(images(4)), network.logits(images(4), chosen))


@pytest.mark.parametrize(("kind", "name"), [(Tied, "second.weight"), (Recurrent, "again.weight")])
def test_a_layer_whose_bias_is_not_its_own_is_left_with_a_note(kind, name):
    ready, plain = matched(kind), matched(kind, names=())
    assert ready.notes == (f"output_statistics leaves {name} as it is: it has no bias that can be changed for it alone",)
    for option, (rounded, before) in enumerate(zip(ready.layers, plain.layers, strict=True)):
        if ready.space.layers[ready.space.options[option].layer].name == name:
            assert rounded.bias is None
            assert torch.equal(rounded.weight, before.weight)
        else:
            check_moments(ready, option)


def test_whole_forwards_correct_what_can_be_seen_and_note_the_rest(monkeypatch):
    network = Network(build(Attention), images(1), graph=False)
    monkeypatch.setattr(sweep, "MOST_BLOCKS", 1)
    ready = prepare(network, network.search_space((2, 4)), Recipe(corrections=("output_statistics",)), calibration())
    assert ready.notes == tuple(
        f"output_statistics leaves attention.{name} as it is: no run of it can be observed"
        for name in ("in_proj_weight", "out_proj.weight")
    )
    for option, (i, _, _) in enumerate(ready.space.options):
        if "attention" in network.layers[i].name:
            assert ready.layers[option].bias is None
        else:
            check_moments(ready, option)


def plain_layer(weight: Tensor, bits: int = 2) -> QuantizedLayer:
    grid = WeightQuantizer().grid(weight, bits)
    return QuantizedLayer(grid.fake_quantize(weight), None, None, grid)


def test_a_channel_that_is_always_zero_keeps_its_scale_and_its_bias():
    weight, bias = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, -1.0, 0.25, 2.0])
    weight[2] = 0
    before = plain_layer(weight)
    (layer,) = output_statistics.correct(replace(sample_of(weight, torch.randn(40, 6)), bias=bias), [before])
    assert torch.equal(layer.grid.scale[2], before.grid.scale[2])
    assert float(layer.bias[2]) == pytest.approx(0.25, rel=tolerance.of_sum(40))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in (layer.weight, layer.bias, layer.grid.scale))


@pytest.mark.parametrize("value", [0.0, 0.37, 1e4])
def test_inputs_that_never_vary_change_no_scale(value):
    """What products of equal rows differ by is rounding, and says nothing about a deviation."""
    weight = torch.randn(10, 67, generator=torch.Generator().manual_seed(0))
    before = plain_layer(weight)
    sample = replace(sample_of(weight, torch.full((100, 67), value)), bias=torch.arange(10.0))
    (layer,) = output_statistics.correct(sample, [before])
    assert torch.equal(layer.grid.scale, before.grid.scale)
    x = torch.full((1, 67), value)
    expected = F.linear(x, weight, torch.arange(10.0))
    # two sums of 67 products of about `value`, and a mean over 100
    share = tolerance.of_forward(2, 67) + tolerance.of_forward(1, 100)
    tolerance.assert_close(F.linear(x, layer.weight, layer.bias), expected, share, least=max(1.0, value * 67**0.5))


def test_a_channel_that_rounds_to_zero_gets_the_mean_and_keeps_its_scale():
    weight = torch.tensor([[0.1, 0.1, -0.05], [1.0, -2.0, 3.0]])
    grid = Grid(torch.ones(2, 1), torch.zeros(2, 1), Codes.of(4, True))
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) + 1
    (layer,) = output_statistics.correct(sample_of(weight, x), [QuantizedLayer(grid.fake_quantize(weight), None, None, grid)])
    assert torch.equal(layer.weight[0], torch.zeros(3))
    share = tolerance.of_forward(2, 3) + tolerance.of_forward(2, 40)
    tolerance.assert_close(F.linear(x, layer.weight, layer.bias).mean(0), F.linear(x, weight).mean(0), share)
    assert float(layer.grid.scale[0]) == 1.0


def test_too_few_images_are_refused_with_the_number_that_is_enough():
    network = network_of(Residual)
    space, recipe = network.search_space((2,)), Recipe(corrections=("output_statistics",))
    with pytest.raises(
        DataError, match=r"32 .* head\.weight.* 12 calibration images give 12; expected .*calibration_images: 32 or"
    ):
        prepare(network, space, recipe, [images(5), images(7)])
    assert prepare(network, space, recipe, [images(5), images(27)]).layers[-1].bias is not None
    sample = sample_at(network_of(Attention), 1, [images(3)])  # five tokens an image
    with pytest.raises(DataError, match=r"3 calibration images give 15; expected data\.calibration_images: 7 or more"):
        output_statistics.correct(sample, [])


# -- batch norm ------------------------------------------------------------------------------------------------------------------

NORMED = pytest.mark.parametrize("kind", [Residual, Normed])


def with_statistics(model: nn.Module, statistics: dict[str, Tensor]) -> nn.Module:
    """A copy of a module with other buffers."""
    model = copy.deepcopy(model)
    for name, tensor in statistics.items():
        model.get_buffer(name).copy_(tensor)
    return model


def normalised(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of each channel of what each batch norm makes, before its own scale and shift.

    The variance has ε's share, ε / (σ² + ε), beside that of the observations: it is the batch norm's own deviation.
    """
    norms = {name: part for name, part in model.named_modules() if isinstance(part, _BatchNorm)}
    inputs: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[name] = arguments[0].movedim(1, 0).flatten(1).double()

        return hook

    hooks = [part.register_forward_pre_hook(keep(name)) for name, part in norms.items()]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    statistics = {}
    for name, part in norms.items():
        deviation = (part.running_var.double() + part.eps).sqrt()
        z = (inputs[name] - part.running_mean.double()[:, None]) / deviation[:, None]
        statistics[name] = z.mean(1), z.var(1) + part.eps / deviation.square()
    return statistics


@NORMED
@pytest.mark.parametrize("widths", [(), (4,)], ids=["float inputs", "inputs on a grid"])
@pytest.mark.parametrize("names", [(), ("output_statistics",)], ids=["alone", "behind output statistics"])
def test_what_every_batch_norm_makes_has_the_float_networks_mean_and_deviation(kind, widths, names):
    ready = matched(kind, widths, names=(*names, "batchnorm_reestimation"))
    x, source = torch.cat(calibration()), ready.network.model.eval()
    # a value between two codes goes to either: four of thousands in a channel, by a step of about a third
    share = STATISTICS + (4 / 3 / (NUM_IMAGES * 64) if widths else 0)
    expected = normalised(source, x)
    for assignment in (ready.space.narrowest, ready.space.widest, ready.space.assignment([0, 4])):
        layers = {ready.space.layers[i].name: layer for i, layer in ready.chosen(assignment).items()}
        quantized, actual = rebuilt(source, layers), ready.final(assignment)
        assert actual.keys() == {name for name, _ in source.named_buffers() if "running" in name}
        for name, (mean, variance) in normalised(with_statistics(quantized, actual), x).items():
            tolerance.assert_close(mean, expected[name][0], share)
            tolerance.assert_close(variance, expected[name][1], share)
        network, chosen = ready.deployed(assignment)
        shipped = replaced_logits(quantized, actual, images(4))
        tolerance.assert_close_but_for_ties(network.logits(images(4), chosen), shipped)
    if not names:  # else the layers before some batch norms have these already
        narrowest = {ready.space.layers[i].name: layer for i, layer in ready.chosen(ready.space.narrowest).items()}
        uncorrected = normalised(rebuilt(source, narrowest), x)
        assert max(float((uncorrected[name][1] - variance).abs().max()) for name, (_, variance) in expected.items()) > 5 * share


@NORMED
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "whole"])
def test_where_nothing_is_quantized_the_trained_statistics_stay(kind, graph):
    """Not those of the calibration images, which differ by sampling and by how images were augmented in training."""
    network, batches = Network(build(kind), images(1), graph=graph), calibration(20, 28)
    trained = {name: tensor for name, tensor in network.model.named_buffers() if "running" in name}
    actual = batchnorm_reestimation.reestimate(network, {}, batches, batchnorm_reestimation.reference(network, batches))
    assert actual.keys() == trained.keys()
    for name, tensor in trained.items():
        tolerance.assert_close(actual[name], tensor, tolerance.eps())
    measured = network.normalisation(batches)
    assert max(float((measured[name] - tensor).abs().max()) for name, tensor in trained.items()) > 1e-2


@pytest.mark.parametrize("sizes", [(150,), (100, 50), (64, 64, 22), (128, 22)])
def test_statistics_are_those_of_the_first_128_images(sizes):
    network = network_of(Normed)
    batches = list(images(150).split(sizes))
    expected = batchnorm_reestimation.reference(network, [torch.cat(batches)[:128]])
    actual = batchnorm_reestimation.reference(network, batches)
    for name, moments in expected.items():
        for one, other in zip(actual[name], moments, strict=True):
            tolerance.assert_close(one, other, STATISTICS)


def test_a_channel_that_never_varies_keeps_finite_statistics():
    norm = NormStatistics("m", "v", 1e-5, (torch.tensor([0.5]), torch.tensor([2.0])), (torch.tensor([0.1]), torch.tensor([0.0])))
    mean, variance = batchnorm_reestimation.matched(norm, (torch.tensor([0.3]), torch.tensor([0.0])))
    assert float(mean) == pytest.approx(0.5 + 0.1 - 0.3)
    assert float(variance) == pytest.approx(2.0)


def test_fewer_than_sixteen_images_are_refused():
    network = network_of(Normed)
    with pytest.raises(
        DataError, match=r"batchnorm_reestimation has 15 calibration images; expected .*calibration_images: 16 or"
    ):
        batchnorm_reestimation.reference(network, [images(8), images(7)])
    assert len(batchnorm_reestimation.reference(network, [images(8), images(8)])) == 4


def test_batch_norms_without_a_place_of_their_own_are_refused():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x):
            return self.second(self.norm(self.first(self.norm(x.squeeze(1).mean(1)))))

    network = Network(build(Shared), images(1))
    ready = prepare(network, network.search_space((2,)), Recipe(corrections=("batchnorm_reestimation",)), calibration())
    with pytest.raises(NetworkError, match="finds no batch norm that it can stop at, but the network has statistics"):
        ready.deployed(ready.space.narrowest)


@NORMED
def test_whole_forwards_give_the_same_statistics(kind):
    names = ("batchnorm_reestimation",)
    whole = Network(build(kind), images(1), graph=False)
    other = prepare(whole, whole.search_space((2, 4)), Recipe(corrections=names), calibration(20, 28))
    expected = matched(kind, names=names).final(other.space.narrowest)
    actual = other.final(other.space.narrowest)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        tolerance.assert_close(actual[name], tensor, STATISTICS)


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "whole"])
@pytest.mark.parametrize("kind", [Attention, Tied])
def test_a_network_without_batch_norm_ships_as_it_is(kind, graph):
    network = Network(build(kind), images(1), graph=graph)
    ready = prepare(network, network.search_space((2,)), Recipe(corrections=("batchnorm_reestimation",)), [images(1)])
    assert ready.has_final
    shipped, chosen = ready.deployed(ready.space.narrowest)
    assert shipped is network
    assert ready.final(ready.space.narrowest) == {}
    assert chosen.keys() == set(range(ready.space.num_layers))


@NORMED
def test_what_ships_after_all_of_it_is_the_state_of_the_module(kind):
    ready = matched(kind, names=("output_statistics", "batchnorm_reestimation"))
    network, chosen = ready.deployed(ready.space.narrowest)
    model = build(kind).eval()
    state = network.state_dict(chosen)
    for name in set(state) - set(model.state_dict()):
        model.get_submodule(name.removesuffix(".bias")).bias = nn.Parameter(torch.zeros_like(state[name]))
    model.load_state_dict(state)
    with torch.inference_mode():
        tolerance.assert_close(model(images(4)), network.logits(images(4), chosen))
    assert sum(len(batch) for batch in ready.images) == NUM_IMAGES
