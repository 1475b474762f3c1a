"""Laws of preparing: what each layer becomes at each candidate, whatever the order, and that it is read back as written."""

import copy
from dataclasses import replace
from functools import cache
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clado.errors import ConfigurationError, DataError, NetworkError, StoreError
from clado.grids import ActivationGrid, Codes, Grid, QuantizedLayer
from clado.network.network import Network
from clado.plugins import available
from clado.quantization import sweep
from clado.quantization.corrections import correction_of
from clado.quantization.preparation import (
    Prepared,
    Recipe,
    activation_grids,
    calibration_batches,
    layer_inputs,
    names_of,
    prepare,
    prepare_layer,
)
from clado.quantization.quantizers import WeightQuantizer
from clado.space import Assignment
from clado.storage.prepared_layers import PreparedLayers
from tests import tolerance
from tests.networks import Attention, Normed, Recurrent, Residual, Tied, Volume, build, calls_of, images

pytestmark = pytest.mark.numeric

KINDS = pytest.mark.parametrize("kind", [Residual, Attention, Tied, Recurrent, Volume, Normed])
RANGES = pytest.mark.parametrize("name", ["minmax", "mse", "percentile"])
MODES = pytest.mark.parametrize(("per_channel", "symmetric"), [(c, s) for c in (True, False) for s in (True, False)])
CALIBRATION = images(40, seed=3)
CPU = torch.device("cpu")


@cache
def network_of(kind) -> Network:
    return Network(build(kind), images(1))


def tensors_of(layer: QuantizedLayer) -> list[Tensor | None]:
    grid = layer.grid
    return [layer.weight, layer.bias, None if grid is None else grid.scale, None if grid is None else grid.zero_point]


def same_bits(a: QuantizedLayer, b: QuantizedLayer) -> bool:
    """Whether two layers are the same, bit for bit."""
    equal = all(
        (x is None and y is None) or (x is not None and y is not None and x.dtype == y.dtype and torch.equal(x, y))
        for x, y in zip(tensors_of(a), tensors_of(b), strict=True)
    )
    codes = [None if layer.grid is None else layer.grid.codes for layer in (a, b)]
    return equal and codes[0] == codes[1] and a.activation == b.activation


# -- rounding -------------------------------------------------------------------------------------------------------------------


@KINDS
@MODES
def test_without_corrections_every_weight_is_rounded_to_nearest(kind, per_channel, symmetric):
    network, quantizer = network_of(kind), WeightQuantizer("minmax", per_channel, symmetric)
    ready = prepare(network, network.search_space((1, 2, 8)), Recipe(quantizer))
    parameters = dict(network.model.named_parameters())
    assert len(ready.layers) == ready.space.num_options
    for (i, bits, _), layer in zip(ready.space.options, ready.layers, strict=True):
        weight, axis = parameters[network.layers[i].name].detach(), network.layers[i].channel_axis
        assert torch.equal(layer.weight, quantizer.fake_quantize(weight, bits, axis))
        assert torch.equal(layer.grid.fake_quantize(weight), layer.weight)
        assert layer.grid.codes == Codes.of(bits, symmetric)
        assert layer.bias is layer.activation is None
    assert ready.notes == ()
    assert not ready.has_final


@KINDS
def test_layers_made_one_by_one_in_any_order_are_those_made_together(kind):
    network, recipe = network_of(kind), Recipe(corrections=("output_statistics",))
    space = network.search_space((2, 4)).with_activations((4,))
    whole = prepare(network, space, recipe, [CALIBRATION])
    inputs = layer_inputs(network, space, recipe, [CALIBRATION])
    for i in reversed(range(space.num_layers)):
        alone, _ = prepare_layer(network, space, recipe, i, inputs[i])
        all_layers = whole.layers[space.offsets[i] : space.offsets[i + 1]]
        assert all(same_bits(a, b) for a, b in zip(alone, all_layers, strict=True))


def test_a_layer_with_candidates_of_its_own_has_those():
    network = network_of(Residual)
    space = network.search_space((2, 4)).restricted({"stem.*": (8,), "head.*": (3, 5, 6)})
    ready = prepare(network, space)
    assert [layer.grid.codes for layer in ready.layers] == [Codes.of(bits, True) for _, bits, _ in space.options]
    chosen = ready.chosen(Assignment((8, None, 4, 2, 5)))
    assert {i: layer.grid.codes.high for i, layer in chosen.items()} == {0: 127, 2: 7, 3: 1, 4: 15}


def test_weights_keep_their_memory_format(tmp_path):
    model = build(Residual).to(memory_format=torch.channels_last)
    network = Network(model, images(1), channels_last=True)
    ready = prepare(network, network.search_space((2,)), Recipe(corrections=("output_statistics",)), [CALIBRATION])
    for layer, weight in zip(ready.layers, network.weights, strict=True):
        assert layer.weight.is_contiguous() == weight.is_contiguous()
        assert layer.weight.is_contiguous(memory_format=torch.channels_last) or weight.ndim != 4
    prepared_layers = PreparedLayers(tmp_path)
    for i, layer in enumerate(ready.layers):
        prepared_layers.write_layer(i, [layer], [])
        ((again,), _) = prepared_layers.read_layer(i, CPU)
        assert same_bits(again, layer)
        assert again.weight.is_contiguous() == layer.weight.is_contiguous()


# -- which corrections, and in which order --------------------------------------------------------------------------------------


def test_stages_come_in_order_whatever_order_the_settings_have():
    names = ("equalization", "gptq", "output_statistics", "batchnorm_reestimation")
    assert [correction_of(name).stage for name in names] == ["network", "rounding", "layer", "final"]
    network = network_of(Normed)
    space, batches = network.search_space((2,)), [CALIBRATION]
    first = prepare(network, space, Recipe(corrections=names), batches)
    finals = first.final(space.narrowest)
    for order in list(permutations(names))[5::7]:
        other = prepare(network, space, Recipe(corrections=order), batches)
        assert all(same_bits(a, b) for a, b in zip(first.layers, other.layers, strict=True))
        again = other.final(space.narrowest)
        assert again.keys() == finals.keys()
        assert all(torch.equal(tensor, again[name]) for name, tensor in finals.items())
        assert sorted(other.notes) == sorted(first.notes)
        assert names_of(order) == names_of(names) == " + ".join(names)
    plain = prepare(network, space, Recipe(corrections=names).plain)
    assert not any(same_bits(a, b) for a, b in zip(first.layers, plain.layers, strict=True))
    assert names_of(()) == "none"


def test_two_ways_of_rounding_are_refused():
    rounding = [name for name in available("corrections") if correction_of(name).stage == "rounding"]
    assert len(rounding) > 1
    with pytest.raises(ConfigurationError, match=f"names both {rounding[0]} and {rounding[1]}; expected one way of rounding"):
        Recipe(corrections=("equalization", *rounding))


def test_a_correction_named_twice_and_an_unknown_range_are_refused():
    with pytest.raises(ConfigurationError, match="name one twice; expected each once"):
        Recipe(corrections=("gptq", "output_statistics", "gptq"))
    with pytest.raises(ConfigurationError, match="unknown quantizer 'max'; expected one of minmax, mse, percentile"):
        Recipe(activation_range="max")


def test_an_equalized_network_is_the_one_that_is_prepared():
    network = network_of(Normed)
    ready = prepare(network, network.search_space((8,)), Recipe(corrections=("equalization",)), [CALIBRATION])
    assert not torch.equal(ready.network.weights[1], network.weights[1])
    tolerance.assert_close(ready.network.logits(images(4)), network.logits(images(4)))
    for layer, weight in zip(ready.layers, ready.network.weights, strict=True):
        assert torch.equal(layer.weight, layer.grid.fake_quantize(weight))
    assert any(note.startswith("equalization: stem.weight") for note in ready.notes)


@pytest.mark.parametrize(
    ("corrections", "widths", "says"),
    [
        (("output_statistics", "gptq"), (), "output_statistics, gptq need calibration images and there are none"),
        ((), (8,), "activations need calibration images"),
        (("equalization",), (4, 8), "equalization, activations need calibration images"),
    ],
)
@pytest.mark.parametrize("calibration", [[], [images(0), images(0)]], ids=["no batches", "empty batches"])
def test_what_needs_calibration_images_says_so(corrections, widths, says, calibration):
    network = network_of(Residual)
    with pytest.raises(DataError, match=f"{says}.*expected 256 or more"):
        prepare(network, network.search_space((2,)).with_activations(widths), Recipe(corrections=corrections), calibration)


def test_an_empty_batch_among_others_does_no_harm():
    network = network_of(Residual)
    space, recipe = network.search_space((2,)).with_activations((8,)), Recipe(corrections=("output_statistics",))
    first = prepare(network, space, recipe, [CALIBRATION])
    second = prepare(network, space, recipe, [images(0), CALIBRATION, images(0)])
    assert all(same_bits(a, b) for a, b in zip(first.layers, second.layers, strict=True))


@pytest.mark.parametrize("kind", [Residual, Normed, Attention])
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "whole"])
def test_networks_run_in_bfloat16_are_prepared_in_float32(kind, graph):
    recipe = Recipe(corrections=("output_statistics", "batchnorm_reestimation"))
    logits = []
    for numeric in ("float32", "bfloat16"):
        network = Network(build(kind), images(1), graph=graph, numeric=numeric)
        space = network.search_space((4,)).with_activations((8,) if graph else ())
        ready = prepare(network, space, recipe, [CALIBRATION])
        shipped, chosen = ready.deployed(space.narrowest)
        assert {layer.weight.dtype for layer in chosen.values()} == {torch.float32}
        assert {tensor.dtype for tensor in ready.final(space.narrowest).values()} <= {torch.float32}
        logits.append(shipped.logits(images(4), chosen).float())
    # sums are float32: each of up to ten operators rounds its result
    tolerance.assert_close(logits[1], logits[0], tolerance.of_forward(10, 1, torch.bfloat16))
    assert not torch.equal(logits[1], logits[0])


# -- activations ----------------------------------------------------------------------------------------------------------------


def inputs_of(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """All values that a layer reads, in all places where its weight is used, by hooks on the module."""
    model = copy.deepcopy(model).eval()
    weight = model.get_submodule(name.removesuffix(".weight")).weight
    inputs: list[Tensor] = []
    for module in model.modules():
        if getattr(module, "weight", None) is weight:
            module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].clone()))
    with torch.no_grad():
        model(x)
    return torch.cat([part.flatten() for part in inputs])


def grids_of(network: Network, batches: list[Tensor], name: str, *widths: int) -> list[dict[int, ActivationGrid]]:
    """The grids of every layer's input, by width."""
    space, recipe = network.search_space((2,)).with_activations(widths), Recipe(activation_range=name)
    inputs = layer_inputs(network, space, recipe, batches)
    return [activation_grids(network, space, recipe, i, inputs[i]) for i in range(space.num_layers)]


def error(grid: ActivationGrid, values: Tensor) -> float:
    return float((grid.fake_quantize(values) - values).double().square().mean())


def span(grid: ActivationGrid) -> tuple[float, float]:
    return -grid.zero_point * grid.scale, (2**grid.bits - 1 - grid.zero_point) * grid.scale


@pytest.mark.parametrize("kind", [Residual, Recurrent, Tied, Volume, Normed])
@RANGES
def test_ranges_of_activations_are_those_of_what_layers_read(kind, name):
    network = network_of(kind)
    for layer, grids in zip(network.layers, grids_of(network, list(CALIBRATION.split(13)), name, 2, 4, 8), strict=True):
        values = inputs_of(network.model, layer.name, CALIBRATION)
        low, high = float(values.min().clamp(max=0)), float(values.max().clamp(min=0))
        for grid in grids.values():
            least, most = span(grid)
            assert float(grid.fake_quantize(torch.zeros(1))) == 0.0
            assert low - grid.scale <= least <= 0 <= most <= high + grid.scale
            if name == "minmax":  # to half a step, since zero is on the grid
                off = tolerance.FORWARD * max(1.0, high - low)
                assert float((grid.fake_quantize(values) - values).abs().max()) <= grid.scale + off
                assert most - least == pytest.approx(high - low, rel=0, abs=off)
            if name == "percentile":
                assert float(((values < least - grid.scale) | (values > most + grid.scale)).double().mean()) <= 4e-4
        errors = [error(grids[bits], values) for bits in (2, 4, 8)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.01 * errors[0] or errors[0] == 0.0


@pytest.mark.parametrize("kind", [Residual, Normed])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_range_of_least_error_has_no_more_than_that_of_extremes(kind, bits):
    network = network_of(kind)
    least, whole = (grids_of(network, [CALIBRATION], name, bits) for name in ("mse", "minmax"))
    for layer, (fitted,), (extremes,) in zip(network.layers, map(dict.values, least), map(dict.values, whole), strict=True):
        values = inputs_of(network.model, layer.name, CALIBRATION)
        # sums of float32 choose, of squares of errors that are off by eps · 2^bits of half a step
        slack = tolerance.of_forward(2, len(values)) + 8 * 2**bits * tolerance.eps()
        assert error(fitted, values) <= error(extremes, values) * (1 + slack)


@RANGES
def test_a_sample_of_the_values_has_the_exact_extremes(name, monkeypatch):
    network = network_of(Residual)
    exact = [grids[8] for grids in grids_of(network, [CALIBRATION], name, 8)]
    monkeypatch.setattr(sweep, "SAMPLED_VALUES", 2**9)
    sampled = [grids[8] for grids in grids_of(network, [CALIBRATION], name, 8)]
    if name == "minmax":
        assert sampled == exact
    for few, all_of_them in zip(sampled, exact, strict=True):
        assert few.scale == pytest.approx(all_of_them.scale, rel=0.2)


def test_a_weight_that_is_used_twice_has_one_grid_for_both_inputs():
    network = network_of(Recurrent)
    (least, most), grid = (0.0, 0.0), grids_of(network, [CALIBRATION], "minmax", 8)[1][8]
    for call in calls_of(network, CALIBRATION, 1):
        low, high = (float(value) for value in call.input.aminmax())
        least, most = min(low, least), max(high, most)
        alone = ActivationGrid.of_range(low, high, 8)
        assert alone.scale <= grid.scale
    assert span(grid) == tuple(pytest.approx(end, rel=0, abs=tolerance.FORWARD * max(1.0, most)) for end in (least, most))


def test_activation_widths_share_a_layers_weight_and_layers_a_widths_grid():
    network = network_of(Residual)
    space = network.search_space((2, 4)).with_activations((4, 8))
    ready, plain = prepare(network, space, Recipe(), [CALIBRATION]), prepare(network, network.search_space((2, 4)))
    for k, (i, bits, width) in enumerate(space.options):
        same_bits_other_width = ready.layers[space.option(i, bits, 12 - width)]
        other_bits_same_width = ready.layers[space.option(i, 6 - bits, width)]
        assert ready.layers[k].weight.data_ptr() == same_bits_other_width.weight.data_ptr()
        assert ready.layers[k].activation == other_bits_same_width.activation
        assert ready.layers[k].activation.bits == width
        assert torch.equal(ready.layers[k].weight, plain.layers[plain.space.option(i, bits)].weight)


def test_parts_of_a_split_weight_read_one_input_and_cannot_choose_its_width():
    network = Network(build(Attention), images(1), split=("*.in_proj_weight",))
    space = network.search_space((2, 8))
    assert prepare(network, space.with_activations((8,)), images=[images(4)]).layers
    with pytest.raises(ConfigurationError, match=r"activations of \[4, 8\] bits where a weight is split"):
        prepare(network, space.with_activations((4, 8)), images=[images(4)])


def test_inputs_that_whole_forwards_do_not_see_are_refused():
    network = Network(build(Attention), images(1), graph=False)
    space = network.search_space((2,)).with_activations((8,))
    with pytest.raises(NetworkError, match=r"input of attention\.in_proj_weight cannot be observed; leave activations in float"):
        prepare(network, space, Recipe(), [CALIBRATION])


@pytest.mark.parametrize("kind", [Residual, Recurrent, Volume])
def test_whole_forwards_prepare_the_same_layers(kind):
    recipe = Recipe(corrections=("output_statistics",))
    ready = []
    for graph in (True, False):
        network = Network(build(kind), images(1), graph=graph)
        space = network.search_space((2, 4)).with_activations((8,))
        ready.append(prepare(network, space, recipe, list(CALIBRATION.split(13))))
    biases = {
        layer.name for layer, bias_of in zip(ready[1].space.layers, ready[1].network.biases, strict=True) if bias_of is not None
    }
    for (i, _, _), one, other in zip(ready[0].space.options, ready[0].layers, ready[1].layers, strict=True):
        assert one.activation.scale == pytest.approx(other.activation.scale, rel=tolerance.FORWARD)
        if ready[0].space.layers[i].name in biases:  # whole forwards give no layer a bias that has none
            share = tolerance.FORWARD + tolerance.of_forward(1, len(CALIBRATION) * 256)  # images and positions
            tolerance.assert_close(one.weight, other.weight, share)
            if one.bias is not None:
                tolerance.assert_close(one.bias, other.bias, share)


def test_calibration_batches_are_all_images_in_order():
    batches = calibration_batches(CALIBRATION, 16)
    assert [len(batch) for batch in batches] == [16, 16, 8]
    assert torch.equal(torch.cat(batches), CALIBRATION)
    assert calibration_batches(images(0)) == []


# -- on disk --------------------------------------------------------------------------------------------------------------------


@cache
def prepared(kind) -> Prepared:
    network = network_of(kind)
    space = network.search_space((1, 2, 4)).with_activations((3, 8))
    names = ("output_statistics", "batchnorm_reestimation")
    return prepare(network, space, Recipe(WeightQuantizer(symmetric=False), corrections=names), [CALIBRATION])


@KINDS
def test_layers_are_read_back_bit_for_bit(kind, tmp_path):
    ready, prepared_layers = prepared(kind), PreparedLayers(tmp_path / "key")
    space = ready.space
    assert prepared_layers.missing(space.num_layers) == list(range(space.num_layers))
    for i in (*range(1, space.num_layers), 0):
        prepared_layers.write_layer(i, ready.layers[space.offsets[i] : space.offsets[i + 1]], [f"layer {i}", "α → β"])
        assert i not in prepared_layers.missing(space.num_layers)
    again: list[QuantizedLayer] = []
    for i in range(space.num_layers):
        read_back, notes = prepared_layers.read_layer(i, CPU)
        assert notes == [f"layer {i}", "α → β"]
        again += read_back
    assert all(same_bits(a, b) for a, b in zip(again, ready.layers, strict=True))
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]
    stored = replace(ready, layers=tuple(again))
    chosen = [one.chosen(space.narrowest) for one in (ready, stored)]
    assert torch.equal(ready.network.logits(images(3), chosen[0]), ready.network.logits(images(3), chosen[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_any_float_type_and_layers_without_a_grid_are_kept(dtype, tmp_path):
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    odd = ActivationGrid(5, 0.1 + 1e-17 + 2**-60, 7)
    layers = [
        QuantizedLayer(weight),
        QuantizedLayer(weight.T, torch.tensor([0.1, -0.0, 3e-30, 1.0]).to(dtype), odd),
        QuantizedLayer(weight, None, None, Grid(torch.rand(3, 1), torch.zeros(3, 1), Codes.of(1, True))),
    ]
    prepared_layers = PreparedLayers(tmp_path)
    prepared_layers.write_layer(12, layers, [])
    again, notes = prepared_layers.read_layer(12, CPU)
    assert notes == []
    assert all(same_bits(a, b) for a, b in zip(again, layers, strict=True))
    assert prepared_layers.missing(14) == [*range(12), 13]


def test_networks_and_finals_are_read_back_and_one_of_another_assignment_is_not_taken(tmp_path):
    ready, prepared_layers = prepared(Normed), PreparedLayers(tmp_path)
    narrow, wide = ready.space.narrowest, ready.space.widest
    assert prepared_layers.read_final(narrow, CPU) is None
    changed = ready.final(narrow)
    prepared_layers.write_final(narrow, changed)
    again = prepared_layers.read_final(narrow, CPU)
    assert again.keys() == changed.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in changed.items())
    assert prepared_layers.read_final(wide, CPU) is None
    prepared_layers.final_file(wide).write_bytes(prepared_layers.final_file(narrow).read_bytes())
    assert prepared_layers.read_final(wide, CPU) is None
    prepared_layers.write_final(wide, {})
    assert prepared_layers.read_final(wide, CPU) == {}
    prepared_layers.write_network({"stem.weight": ready.network.weights[0]}, ["one", "two"])
    tensors, notes = prepared_layers.read_network(CPU)
    assert torch.equal(tensors["stem.weight"], ready.network.weights[0])
    assert notes == ["one", "two"]


def readers(prepared_layers: PreparedLayers, assignment: Assignment):
    return {
        prepared_layers.layer_file(0): lambda: prepared_layers.read_layer(0, CPU),
        prepared_layers.network_file: lambda: prepared_layers.read_network(CPU),
        prepared_layers.final_file(assignment): lambda: prepared_layers.read_final(assignment, CPU),
    }


@pytest.fixture
def written(tmp_path) -> PreparedLayers:
    prepared_layers, ready = PreparedLayers(tmp_path / "key"), prepared(Residual)
    prepared_layers.write_layer(0, ready.layers[:6], ["a note"])
    prepared_layers.write_network({"stem.weight": torch.ones(2)}, ["a note"])
    prepared_layers.write_final(ready.space.narrowest, {"norm.running_mean": torch.ones(2)})
    return prepared_layers


DAMAGES = {
    "empty": lambda good: b"",
    "cut in its header": lambda good: good[:40],
    "cut in its last tensor": lambda good: good[:-3],
    "longer than it says": lambda good: good + b"more",
    "not ours at all": lambda good: b"PK\x03\x04" * 40,
    "a length beyond its end": lambda good: b"\xff" * 8 + good[8:],
    "no text in its header": lambda good: good[:8] + b"\xff" * 60 + good[68:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_file_is_refused_by_name(written, damage):
    for path, read in readers(written, prepared(Residual).space.narrowest).items():
        good = path.read_bytes()
        read()
        path.write_bytes(damage(good))
        with pytest.raises(StoreError, match=f"{path}.* absent or damaged .*; delete it and run again"):
            read()


def test_an_absent_file_is_refused_by_name(tmp_path):
    prepared_layers = PreparedLayers(tmp_path)
    with pytest.raises(StoreError, match=r"0003\.safetensors is absent or damaged"):
        prepared_layers.read_layer(3, CPU)
    with pytest.raises(StoreError, match=r"network\.safetensors is absent or damaged"):
        prepared_layers.read_network(CPU)


def test_a_file_of_another_kind_is_refused_by_name(written, tmp_path):
    from safetensors.torch import save_file

    foreign = tmp_path / "foreign"
    save_file({"a": torch.ones(1)}, foreign)
    for path, read in readers(written, prepared(Residual).space.narrowest).items():
        path.write_bytes(foreign.read_bytes())
        with pytest.raises(StoreError, match=f"{path} is not a file of quantized layers"):
            read()
    written.write_network({}, [])
    written.network_file.replace(written.layer_file(0))  # ours, and in another's place
    with pytest.raises(StoreError, match=r"0000\.safetensors is absent or damaged"):
        written.read_layer(0, CPU)


def test_a_write_that_fails_leaves_the_old_file_and_no_new_one(written, monkeypatch):
    def broken(tensors, path, header):
        path.write_bytes(b"half a fi")
        raise OSError("no space left on device")

    monkeypatch.setattr("clado.storage.tensor_files.save_file", broken)
    for layer in (0, 1):
        with pytest.raises(OSError, match="no space left"):
            written.write_layer(layer, prepared(Residual).layers[6:12], [])
    assert written.read_layer(0, CPU)[1] == ["a note"]
    assert written.missing(2) == [1]


def test_a_second_write_takes_the_place_of_the_first(written):
    ready = prepared(Residual)
    written.write_layer(0, ready.layers[6:12], ["another note"])
    stored, notes = written.read_layer(0, CPU)
    assert notes == ["another note"]
    assert all(same_bits(a, b) for a, b in zip(stored, ready.layers[6:12], strict=True))
    files = {path.name for path in written.folder.rglob("*.*")}
    assert files == {"0000.safetensors", "network.safetensors", written.final_file(ready.space.narrowest).name}


class Written(nn.Module):
    """Functions called with keywords, and weights that reach their operators through views."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.keywords = nn.Conv2d(8, 8, 3, groups=groups)
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2)
        self.pointwise = nn.Linear(4, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(
            F.conv2d(x, bias=self.keywords.bias, weight=self.keywords.weight, padding=1, stride=2, groups=self.keywords.groups)
        )
        x = F.relu(F.conv_transpose2d(x, self.up.weight, self.up.bias, output_padding=1, stride=2, dilation=1))
        x = F.relu(F.conv2d(x, self.pointwise.weight[:, :, None, None], self.pointwise.bias))
        return F.linear(input=x.mean((2, 3)), weight=self.head.weight, bias=self.head.bias)


@pytest.mark.parametrize("correction", ["gptq", "adaround", "output_statistics"])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_call_is_corrected_alike_however_it_is_written_and_by_whole_forwards(correction, groups):
    torch.manual_seed(0)
    model, x = Written(groups).eval(), images(64)
    results = []
    for graph in (True, False):
        network = Network(model, x[:2], graph=graph)
        recipe = Recipe(corrections=(correction,), adaround_steps=20)
        results.append(prepare(network, network.search_space((2,)), recipe, [x]))
    for one, other in zip(results[0].layers, results[1].layers, strict=True):
        tolerance.assert_close(one.weight, other.weight, tolerance.FORWARD + tolerance.of_forward(1, 64 * 64))
    for prepared in results:
        (note,) = [note for note in prepared.notes if "pointwise" in note]
        assert "no run of it can be observed" in note


def test_an_assignment_is_deployed_with_the_corrections_it_names():
    network = Network(build(Residual), images(1))
    space = network.search_space((2, 4))
    names = ("output_statistics", "batchnorm_reestimation")
    ready, plain = (
        prepare(network, space, Recipe(corrections=chosen_names), calibration_batches(CALIBRATION))
        for chosen_names in (names, ())
    )
    whole, layers = ready.deployed(space.narrowest)
    static, same = ready.deployed(space.narrowest.with_corrections("static"))
    assert whole.changed
    assert static is ready.network
    assert same == layers
    with pytest.raises(ConfigurationError, match="deployed without corrections, and these layers have output_statistics"):
        ready.deployed(space.narrowest.with_corrections("none"))
    network, rounded = plain.deployed(space.narrowest.with_corrections("none"))
    assert all(torch.equal(rounded[i].weight, plain.layers[space.offsets[i]].weight) for i in rounded)
    with pytest.raises(ConfigurationError, match="corrected is 'some'; expected one of all, static, none"):
        space.narrowest.with_corrections("some")
