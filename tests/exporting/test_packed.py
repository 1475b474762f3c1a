"""A packed file holds each weight in its bits and nothing more, loads as the network that was measured, or is refused."""

import copy
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import clado
from clado.errors import CladoError, ConfigurationError, NetworkError, StoreError
from clado.exporting import packed
from clado.exporting._torch_module import GRID_BUFFERS, OpenAttention, as_module, fake_quantize_by_tensors
from clado.exporting.packed import PackedSize, bits_of, export_packed, load_packed, pack, packed_size, unpack
from clado.grids import ActivationGrid, Codes, QuantizedLayer
from clado.network.network import Network
from clado.quantization.preparation import Prepared, Recipe, prepare
from clado.quantization.quantizers import WeightQuantizer
from clado.run.opened_run import open_run
from clado.settings.loading import parse_config
from clado.space import Assignment
from flows.commands.export import PACKED, check_format, export, export_as
from tests import tolerance
from tests.networks import Attention, Normed, Recurrent, Residual, Tied, Volume, build, images
from tests.running import config

KINDS = pytest.mark.parametrize("kind", [Residual, Attention, Tied, Recurrent, Volume, Normed])
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 11, 16)
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@cache
def network_of(kind: type[nn.Module], split: bool = False) -> Network:
    return Network(build(kind), images(1), split=["*in_proj_weight"] if split else [])


@cache
def prepared_of(
    kind: type[nn.Module], widths: tuple[int, ...] = (), split: bool = False, per_channel: bool = True, symmetric: bool = True
) -> Prepared:
    """With corrections, so that there are added biases and other statistics of batch norm."""
    network = network_of(kind, split)
    space = network.search_space(WIDTHS).with_activations(widths)
    recipe = Recipe(WeightQuantizer("minmax", per_channel, symmetric), "minmax", ("output_statistics", "batchnorm_reestimation"))
    return prepare(network, space, recipe, [images(40, seed=3)])


def drawn(prepared: Prepared, seed: int = 0) -> Assignment:
    generator = torch.Generator().manual_seed(seed)
    sizes = [len(prepared.space.candidates(i)) for i in range(prepared.space.num_layers)]
    picks = [int(torch.randint(size, (1,), generator=generator)) for size in sizes]
    return prepared.space.assignment([a + pick for a, pick in zip(prepared.space.offsets, picks, strict=False)])


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rewritten(source: Path, target: Path, **changes: str) -> Path:
    """A file with other metadata."""
    with safe_open(source, framework="pt") as file:
        save_file(load_file(source), target, {**file.metadata(), **changes})
    return target


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Network, dict[int, QuantizedLayer]]:
    """A packed file, its network and its layers."""
    prepared = prepared_of(Tied, (8,), symmetric=False)
    path = tmp_path_factory.mktemp("packed") / "small.safetensors"
    network, layers = prepared.deployed(drawn(prepared))
    export_packed(path, network, layers)
    return path, network, layers


# -- the bit stream ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 16).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=70))))
@settings(max_examples=300, deadline=None)
def test_codes_are_one_stream_of_bits_and_come_back(drawn):
    bits, values = drawn
    stream = pack(torch.tensor(values, dtype=torch.int32), bits)
    assert stream.dtype == torch.uint8
    assert len(stream) == -(-len(values) * bits // 8)
    # the stream is one number, written from its lowest byte
    assert int.from_bytes(bytes(stream.tolist()), "little") == sum(value << k * bits for k, value in enumerate(values))
    assert unpack(stream, bits, len(values)).tolist() == values


@pytest.mark.parametrize("bits", range(1, 17))
def test_parts_of_a_long_stream_meet_on_a_byte(bits, monkeypatch):
    values = torch.randint(2**bits, (13, 3), generator=torch.Generator().manual_seed(bits)).to(torch.int32)
    whole = pack(values, bits)
    monkeypatch.setattr(packed, "CHUNK", 8)
    assert torch.equal(pack(values, bits), whole)
    assert torch.equal(unpack(whole, bits, 39), values.flatten())


def test_a_stream_of_another_length_is_no_stream_of_these_codes():
    with pytest.raises(ValueError, match="2 bytes are not 5 codes of 4 bits"):
        unpack(torch.zeros(2, dtype=torch.uint8), 4, 5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(1, 17))
def test_codes_tell_their_bits_and_fit_into_them(bits, symmetric):
    codes = Codes.of(bits, symmetric)
    assert bits_of(codes) == bits
    assert (codes.high - codes.low) // codes.step < 2**bits


# -- the network -------------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("widths", [(), (4, 8)], ids=["weights", "inputs"])
@pytest.mark.parametrize(("per_channel", "symmetric"), [(True, True), (True, False), (False, False)])
def test_a_loaded_network_computes_what_was_measured(kind, widths, per_channel, symmetric, tmp_path):
    prepared = prepared_of(kind, widths, False, per_channel, symmetric)
    assignment = drawn(prepared)
    network, layers = prepared.deployed(assignment)
    path, before = tmp_path / "network.safetensors", state_of(network.model)
    size = export_packed(path, network, layers)
    assert size.file_bytes == path.stat().st_size
    assert size.weight_bytes == prepared.space.size_bytes(assignment)
    other = build(kind, seed=9)
    untouched = state_of(other)
    loaded = load_packed(path, other)
    x = images(6, seed=5)
    with torch.no_grad():
        tolerance.assert_close_but_for_ties(loaded(x), network.logits(x, layers), images=1 if widths else 0)
    state, grids = state_of(loaded), {name for name in state_of(loaded) if name.rpartition(".")[2] in GRID_BUFFERS}
    assert bool(grids) == bool(widths)
    assert same({name: state[name] for name in state.keys() - grids}, network.state_dict(layers))  # added biases included
    assert same(state_of(other), untouched)
    assert same(state_of(network.model), before)
    assert type(loaded) is kind
    assert not loaded.training


@pytest.mark.parametrize("widths", [(), (8,)])
def test_a_split_weight_is_whole_again(widths, tmp_path):
    prepared = prepared_of(Attention, widths, split=True)
    network, layers = prepared.deployed(drawn(prepared))
    export_packed(tmp_path / "n", network, layers)
    x = images(6, seed=5)
    with torch.no_grad():
        actual = load_packed(tmp_path / "n", network.model)(x)
    tolerance.assert_close_but_for_ties(actual, network.logits(x, layers), images=1 if widths else 0)
    assert (
        len({bits_of(layer.grid.codes) for i, layer in layers.items() if network.layers[i].name[-2:] in (".q", ".k", ".v")}) > 1
    )


@pytest.mark.parametrize("fixed", range(5))
def test_layers_that_are_not_quantized_stay_floats(fixed, tmp_path):
    prepared = prepared_of(Attention, split=True)
    network, layers = prepared.deployed(drawn(prepared))
    layers = {i: layer for i, layer in layers.items() if i != fixed}
    size = export_packed(tmp_path / "n", network, layers)
    bits = {i: bits_of(layer.grid.codes) for i, layer in layers.items()}
    assert size.weight_bytes == sum(layer.weight_bytes(bits.get(i)) for i, layer in enumerate(network.layers))
    assert same(state_of(load_packed(tmp_path / "n", network.model)), network.state_dict(layers))


def test_a_float_network_is_packed_too(tmp_path):
    network = network_of(Residual)
    size = export_packed(tmp_path / "n", network, {})
    state = network.model.state_dict()
    weights = sum(layer.weight_bytes(None) for layer in network.layers)
    assert size == PackedSize(sum(tensor.nbytes for tensor in state.values()), weights, size.header_bytes)
    assert same(state_of(load_packed(tmp_path / "n", build(Residual, 4))), state)


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_byte_is_accounted_for(symmetric, tmp_path):
    prepared = prepared_of(Tied, (8,), symmetric=symmetric)
    assignment = drawn(prepared)
    network, layers = prepared.deployed(assignment)
    size = export_packed(tmp_path / "n", network, layers)
    zero_points = sum(
        (1 if bits <= 8 else 4) * layer.num_channels for bits, layer in zip(assignment.bits, network.layers, strict=True)
    )
    expected = prepared.space.size_bytes(assignment)
    expected += 4 * sum(layer.num_channels for layer in network.layers) + (0 if symmetric else zero_points)
    expected += 4 * 2 * len(layers)  # grids of inputs
    expected += 4 * (4 + 4 + 4 + 4)  # biases; the weight that two layers share is there once
    assert size.total_bytes == expected == sum(tensor.nbytes for tensor in load_file(tmp_path / "n").values())
    assert packed_size(tmp_path / "n") == size
    raw = (tmp_path / "n").read_bytes()
    assert size.header_bytes == 8 + int.from_bytes(raw[:8], "little")


def test_the_header_says_what_each_layer_is(small):
    path, network, layers = small
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header["format"] == "clado-packed/1"
    rows = json.loads(header["document"])["layers"]
    assert [row["name"] for row in rows] == [layer.name for layer in network.layers]
    for row, layer, spec in zip(rows, layers.values(), network.layers, strict=True):
        codes = layer.grid.codes
        assert row == {
            "name": spec.name, "shape": list(spec.shape), "bits": bits_of(codes), "codes": [codes.low, codes.high, codes.step],
            "channel_axis": spec.channel_axis, "input_bits": 8,
        }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_keep_their_type(dtype, tmp_path):
    model = build(Residual).to(dtype)
    network = Network(model, images(1).to(dtype), graph=False)
    layers = {}
    for i, spec in enumerate(network.layers):
        grid = WeightQuantizer().grid(network.weights[i], 5, spec.channel_axis)
        layers[i] = QuantizedLayer(grid.fake_quantize(network.weights[i].float()).to(dtype), grid=grid)
    export_packed(tmp_path / "n", network, layers)
    assert same(state_of(load_packed(tmp_path / "n", build(Residual, 2).to(dtype))), network.state_dict(layers))


# -- the module ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Residual, Attention])
def test_a_loaded_network_can_be_exported(kind, tmp_path):
    prepared = prepared_of(kind, (8,))
    network, layers = prepared.deployed(drawn(prepared))
    export_packed(tmp_path / "n", network, layers)
    loaded = load_packed(tmp_path / "n", network.model)
    program = torch.export.export(loaded, (images(2),), dynamic_shapes=({0: Dim("batch", max=64)},))
    x = images(5, seed=8)
    with torch.no_grad():
        tolerance.assert_close_but_for_ties(program.module()(x), loaded(x))
        torch.testing.assert_close(copy.deepcopy(loaded)(x), loaded(x), rtol=0, atol=0)  # hooks and all
    assert not any("clado" in str(node.target) for node in program.graph.nodes)  # runs without this package


@given(
    st.sampled_from([1, 2, 4, 8, 16]),
    st.floats(2**-13, 8, width=32),
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
    st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_rounding_of_inputs_is_that_of_fake_quantization(bits, scale, values, share):
    grid = ActivationGrid(bits, scale, round(share * (2**bits - 1)))
    steps = (torch.arange(-4, 2**bits + 4, 0.5) - grid.zero_point) * torch.tensor(scale)  # ends and ties
    x = torch.cat([torch.tensor(values), steps[:: max(1, len(steps) // 500)]])
    tensors = torch.tensor(scale, dtype=torch.float32), torch.tensor(grid.zero_point), torch.tensor(2**bits - 1)
    assert torch.equal(fake_quantize_by_tensors(x, *tensors), grid.fake_quantize(x))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_open_attention_is_attention(batch_first, bias, need_weights):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, bias=bias, batch_first=batch_first).eval()
    opened = copy.deepcopy(attention)
    opened.__class__ = OpenAttention
    x, y, z = torch.randn(3, 4, 5, 12).unbind()
    with torch.no_grad():
        for sources in ((x, x, x), (x, y, z)):
            for average in (True, False):
                expected = attention(*sources, need_weights=need_weights, average_attn_weights=average)
                actual = opened(*sources, need_weights=need_weights, average_attn_weights=average)
                tolerance.assert_close(actual[0], expected[0])
                assert (actual[1] is None) == (expected[1] is None) == (not need_weights)
                if need_weights:
                    tolerance.assert_close(actual[1], expected[1])
    with pytest.raises(NetworkError, match="with a mask"):
        opened(x, x, x, attn_mask=torch.zeros(5, 5))


class Functional(nn.Module):
    """Reads the weight of a module that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(64, 8, bias=False), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.linear(x.flatten(1), self.hidden.weight)))


class Bare(nn.Module):
    """Reads a weight that belongs to no module, with its own bias."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.head = nn.Parameter(torch.randn(8, 64)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.linear(x.flatten(1), self.kernel)))


@pytest.mark.parametrize(("kind", "name"), [(Functional, "hidden.weight"), (Bare, "kernel")])
def test_an_input_out_of_reach_is_refused_by_name(kind, name, tmp_path):
    network = Network(build(kind), images(1))
    space = network.search_space((4,)).with_activations((8,))
    prepared = prepare(network, space, Recipe(), [images(8)])
    with pytest.raises(NetworkError, match=rf"the input of {name} cannot be quantized"):
        export_packed(tmp_path / "n", *prepared.deployed(space.widest))
    assert list(tmp_path.iterdir()) == []
    weights_alone = {i: QuantizedLayer(layer.weight, grid=layer.grid) for i, layer in prepared.chosen(space.widest).items()}
    export_packed(tmp_path / "n", network, weights_alone)
    x = images(3)
    with torch.no_grad():
        tolerance.assert_close(load_packed(tmp_path / "n", network.model)(x), network.logits(x, weights_alone))


def test_a_bias_that_no_module_takes_is_refused(tmp_path):
    network = Network(build(Bare), images(1))
    prepared = prepare(network, network.search_space((4,)), Recipe(corrections=("output_statistics",)), [images(40)])
    with pytest.raises(NetworkError, match=r"the network \(Bare\) takes no added bias"):
        export_packed(tmp_path / "n", *prepared.deployed(prepared.space.widest))


def test_a_weight_off_its_grid_or_not_finite_is_refused_by_name(tmp_path):
    prepared = prepared_of(Tied)
    network, layers = prepared.deployed(drawn(prepared))
    for shift in (0.5, float("nan")):
        moved = QuantizedLayer(layers[1].weight + shift * layers[1].grid.scale, None, None, layers[1].grid)
        with pytest.raises(NetworkError, match=r"second\.weight does not lie on its grid"):
            export_packed(tmp_path / "n", network, {**layers, 1: moved})
    other = network.updated({"head.bias": torch.full((4,), float("nan"))})
    with pytest.raises(NetworkError, match=r"a NaN or an infinity: head\.bias"):
        export_packed(tmp_path / "n", other, {i: layer for i, layer in layers.items() if layer.bias is None})
    assert list(tmp_path.iterdir()) == []


# -- what is refused -----------------------------------------------------------------------------------------------------------


def narrower() -> nn.Module:
    model = build(Tied)
    model.head = nn.Linear(4, 5)
    return model


def longer() -> nn.Module:
    model = build(Tied)
    model.further = nn.Linear(2, 2)
    return model


def tied_otherwise() -> nn.Module:
    model = build(Tied)
    model.first.bias = model.second.bias
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (narrower, r"head\.weight \(\(4, 4\) float32 in the file, \(5, 4\) float32 in the network\)"),
        (longer, r"the file lacks further\.bias, further\.weight"),
        (lambda: build(Recurrent), r"the network has no second\.bias"),
        (lambda: build(Tied).half(), "float32 in the file"),
        (tied_otherwise, r"one tensor for second\.bias and first\.bias, and the file has two"),
    ],
)
def test_another_network_is_refused_and_left_alone(small, make, message):
    model = make()
    before = state_of(model)
    with pytest.raises(NetworkError, match=message):
        load_packed(small[0], model)
    assert same(state_of(model), before)


def test_names_of_one_tensor_are_one_tensor_again(small):
    loaded = load_packed(small[0], build(Tied, 3))
    assert loaded.third.weight is loaded.second.weight
    assert "third.weight" not in load_file(small[0])


@given(st.data())
@FEW
def test_a_changed_byte_is_noticed_or_changes_nothing(small, tmp_path, data):
    path, network, _ = small
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    (tmp_path / "changed").write_bytes(raw)
    try:
        loaded = load_packed(tmp_path / "changed", network.model)
    except StoreError:
        return
    assert same(state_of(loaded), state_of(load_packed(path, network.model)))  # padding of the header


@given(st.data())
@FEW
def test_a_truncated_file_is_refused(small, tmp_path, data):
    raw = small[0].read_bytes()
    (tmp_path / "short").write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    with pytest.raises(StoreError, match="absent or damaged"):
        load_packed(tmp_path / "short", small[1].model)


def test_other_formats_and_versions_are_refused(small, tmp_path):
    path, network, _ = small
    later = rewritten(path, tmp_path / "later", format="clado-packed/2")
    with pytest.raises(StoreError, match="of format clado-packed/2; this clado reads clado-packed/1"):
        load_packed(later, network.model)
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    for file, message in ((tmp_path / "other", "not a packed network"), (tmp_path / "none", "absent"), (tmp_path, "absent")):
        with pytest.raises(StoreError, match=message):
            load_packed(file, network.model)
    with pytest.raises(StoreError, match="damaged: its hash differs"):
        load_packed(rewritten(path, tmp_path / "renamed", document="{}"), network.model)


def test_a_failed_write_leaves_the_earlier_file(small, tmp_path, monkeypatch):
    path, network, layers = small
    target = tmp_path / "n"
    target.write_bytes(path.read_bytes())

    def full_disk(tensors: object, filename: Path, metadata: object) -> None:
        filename.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(packed, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        export_packed(target, network, {i: layers[i] for i in (0,)})
    assert [file.name for file in tmp_path.iterdir()] == ["n"]
    assert target.read_bytes() == path.read_bytes()


class Around(nn.Linear):
    """A linear layer whose own forward reads neither its bias nor its argument as the weight's input."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.normalize(input) * 8, self.weight)


class Beside(nn.Module):
    """A weight that is read once by its module and once by another operator."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8, bias=False), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(F.linear(F.relu(self.first(x.flatten(1))), self.first.weight)))


@pytest.mark.parametrize(
    ("model", "widths", "corrections"),
    [
        (lambda: nn.Sequential(nn.Flatten(), Around(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4)), (), ("output_statistics",)),
        (lambda: nn.Sequential(nn.Flatten(), Around(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4)), (4,), ()),
        (Beside, (4,), ()),
    ],
)
def test_a_module_that_would_compute_another_function_is_refused(model, widths, corrections, tmp_path):
    torch.manual_seed(0)
    network, batch = Network(model(), torch.randn(1, 2, 2, 2)), torch.randn(64, 2, 2, 2)
    space = network.search_space((2, 8)).with_activations(widths)
    prepared = prepare(network, space, Recipe(WeightQuantizer(), "minmax", corrections), [batch])
    with pytest.raises(NetworkError, match="computes another function than was measured"):
        export_packed(tmp_path / "n.safetensors", *prepared.deployed(space.narrowest))
    assert not list(tmp_path.iterdir())


def test_a_small_bias_that_a_module_does_not_read_is_refused():
    torch.manual_seed(0)
    network = Network(nn.Sequential(nn.Flatten(), Around(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4)), torch.ones(1, 2, 2, 2))
    layers = {0: QuantizedLayer(network.weights[0], torch.full((8,), 0.01))}
    without, biased = network.logits(network.example), network.logits(network.example, layers)
    assert 1e-3 < float((biased - without).abs().max() / biased.abs().max()) < 1e-2
    with pytest.raises(NetworkError, match="computes another function than was measured"):
        as_module(network, layers)


@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_weights_that_are_computed_by_hooks_are_refused_with_what_to_use():
    with pytest.warns(FutureWarning, match="weight_norm"):
        normed = nn.utils.weight_norm(nn.Linear(8, 8))
    network = Network(nn.Sequential(nn.Flatten(), normed, nn.ReLU(), nn.Linear(8, 4)), torch.randn(1, 2, 2, 2))
    images = torch.randn(2, 2, 2, 2)
    assert torch.equal(as_module(network, {})(images), network.logits(images))
    network.model(images)  # with gradients: the weight is now part of their graph
    with pytest.raises(NetworkError, match=r"cannot be copied .*torch\.nn\.utils\.parametrizations\.weight_norm"):
        as_module(network, {})


# -- from a run ----------------------------------------------------------------------------------------------------------------


def test_a_run_exports_it_and_the_package_loads_it(tmp_path, monkeypatch):
    run = open_run(parse_config(config(tmp_path / "run", corrections=["output_statistics"])))
    assignment = drawn(run.preparation.corrected)
    path, told = export_as("packed", run, assignment, tmp_path / "out")
    size = packed_size(path)
    assert path == tmp_path / "out" / PACKED
    assert f"{size.total_bytes:,} bytes of tensors, {run.space.size_bytes(assignment):,} of them weights" in told
    assert run.space.from_json(json.loads((tmp_path / "out" / "assignment.json").read_text())) == assignment
    network, layers = run.preparation.deployed(assignment)
    x, _ = run.slices.validation.load(0, 100)
    with torch.no_grad():
        actual = clado.load_packed(path, network.model)(x)
    tolerance.assert_close(actual, network.logits(x, layers), tolerance.of_layers(network.layers))
    assert isinstance(as_module(network, layers), nn.Module)
    with pytest.raises(StoreError, match="another assignment"):
        export_as("packed", run, run.space.narrowest, tmp_path / "out")
    monkeypatch.setattr(packed, "export_packed", refuse)
    with pytest.raises(NetworkError, match="no"):
        export_as("packed", run, assignment, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    export(run, assignment, tmp_path / "out")
    (tmp_path / "out" / "weights.safetensors").unlink()
    with pytest.raises(StoreError, match="not an export"):
        export(run, run.space.narrowest, tmp_path / "out")
    assert path.exists()
    assert run.space.from_json(json.loads((tmp_path / "out" / "assignment.json").read_text())) == assignment


def refuse(*_: object) -> None:
    raise NetworkError("no")


def test_an_unknown_format_is_refused():
    with pytest.raises(
        ConfigurationError, match="unknown format 'paked'; expected safetensors, packed, onnx, mct, modelopt or torchao"
    ):
        check_format("paked")
    assert issubclass(ConfigurationError, CladoError)
