"""Laws of cross-layer equalisation: the float network stays, the ranges of channels become equal, every pair is accounted for."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clado.data.zoo.networks import MobileNetV2, ResNet20, VisionTransformer
from clado.network.network import Network
from clado.quantization.corrections import equalization
from clado.quantization.corrections._connections import HEADROOM, LIMIT
from clado.quantization.corrections.equalization import Equalization, Pair
from clado.quantization.quantizers import WeightQuantizer
from tests import tolerance
from tests.networks import Attention, Residual, Tied, Volume, build, calls_of, images, replaced_logits

pytestmark = pytest.mark.numeric

# pairs are scaled in turns until none moves by more than TOLERANCE; the rest adds up along a chain of pairs
STOPPED = 100 * equalization.TOLERANCE


class Plain(nn.Module):
    """No batch norm: every kind of convolution, every homogeneous activation, pooling, a flattened image, a linear pair."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.grouped = nn.Conv2d(12, 8, 3, padding=1, groups=2)
        self.prelu = nn.PReLU(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.narrow = nn.Conv2d(6, 5, 1, bias=False)
        self.wide = nn.Conv2d(5, 6, 3)
        self.hidden = nn.Linear(6 * 3 * 3, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.depthwise(F.relu(self.stem(x))), 0.1)
        x = F.max_pool2d(self.prelu(self.grouped(x)), 2)
        x = self.wide(self.narrow(F.relu(self.up(x))))
        x = F.avg_pool2d(F.pad(x.clamp(min=0), (0, 1, 1, 0)), 2)
        return self.head(F.relu(self.hidden(torch.flatten(x, 1))))


class Normed(nn.Module):
    """Expand, filter each channel, project, with batch norm behind each; a last convolution, pooled, before the head."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU, width: int = 6) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(1, width, 1), nn.BatchNorm2d(width), activation())
        self.depthwise = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm2d(width), activation()
        )
        self.project = nn.Sequential(nn.Conv2d(width, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.last = nn.Sequential(nn.Conv2d(8, 5, 3), nn.ReLU())
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.project(self.depthwise(self.expand(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).view(x.shape[0], -1))


class Between(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.between = between
        self.second = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x))).mean((2, 3))


class Chain(nn.Module):
    """Layers of four channels, one more than there are things to put between them."""

    def __init__(self, betweens) -> None:
        super().__init__()
        self.betweens = betweens
        self.modules_between = nn.ModuleList([module for module in betweens if isinstance(module, nn.Module)])
        self.layers = nn.ModuleList([nn.Conv2d(1, 4, 3, padding=1), *(nn.Conv2d(4, 4, 3, padding=1) for _ in betweens)])

    def forward(self, x: Tensor) -> Tensor:
        for layer, between in zip(self.layers, self.betweens, strict=False):
            x = between(layer(x))
        return self.layers[-1](x).mean((2, 3))


def unequal(model: nn.Module, spread: float = 1.5, seed: int = 3) -> nn.Module:
    """Output channels of every weight, and γ of every batch norm, times seeded factors far from 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d) and module.weight is not None:
                factor = (spread * torch.randn(len(module.weight), generator=generator)).exp()
                module.weight *= factor.to(module.weight).reshape(-1, *[1] * (module.weight.ndim - 1))
    return model


@dataclass(frozen=True)
class Case:
    """A float64 network, what equalisation makes of it, and the same network in float32."""

    model: nn.Module
    single: Network
    network: Network
    result: Equalization
    after: Network
    x: Tensor


KINDS = {
    "plain": Plain,
    "normed": Normed,
    "relu6": lambda: Normed(nn.ReLU6),
    "residual": Residual,
    "attention": Attention,
    "tied": Tied,
    "volume": Volume,
    "resnet": ResNet20,
    "mobilenet": MobileNetV2,
}
EVERY = pytest.mark.parametrize("kind", KINDS)
CHANGED = pytest.mark.parametrize("kind", ["plain", "normed", "relu6", "volume", "resnet", "mobilenet"])


@cache
def case(kind: str) -> Case:
    model = build(KINDS[kind])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    x = images(4, size=28 if kind in ("resnet", "mobilenet") else 8)
    single = Network(model.eval(), x[:1])
    network = single.updated({name: tensor.double() for name, tensor in state(model).items() if name in single.engine.named})
    network.example, x = network.example.double(), x.double()
    result = equalize(network, [x[:3], x[3:]])
    return Case(copy.deepcopy(model).double(), single, network, result, network.updated(result.tensors), x)


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def equalize(network: Network, batches: Sequence[Tensor]) -> Equalization:
    """What equalisation makes of a network. Each batch is a block."""
    return equalization.equalize(network, [equalization.observe(network, [batch]) for batch in batches])


def of(model: nn.Module, x: Tensor | None = None, **settings) -> Equalization:
    """What equalisation makes of a model, with 8 x 8 images."""
    x = images(4) if x is None else x
    return equalize(Network(model.eval(), x[:1], **settings), [x])


def row(result: Equalization, first: str, second: str):
    """The one row of a pair."""
    (match,) = (pair for pair in result.report if (pair.first, pair.second) == (first, second))
    return match


def outputs(module: nn.Module, weight: Tensor) -> Tensor:
    """The reference: range of each output channel of a layer."""
    if "Transpose" in type(module).__name__:
        return torch.cat([part.transpose(0, 1).abs().flatten(1).amax(1) for part in weight.chunk(module.groups)])
    return weight.abs().flatten(1).amax(1)


def inputs(module: nn.Module, weight: Tensor, channels: int) -> Tensor:
    """The reference: range of each of `channels` input channels of a layer."""
    if isinstance(module, nn.Linear):
        return torch.stack([part.abs().max() for part in weight.chunk(channels, 1)])
    if "Transpose" in type(module).__name__:
        return weight.abs().flatten(1).amax(1)
    return torch.cat([part.transpose(0, 1).abs().flatten(1).amax(1) for part in weight.chunk(module.groups)])


def shares(example: Case, after: bool) -> dict[tuple[str, str], tuple[Tensor | None, Tensor | None]]:
    """Of every equalised pair, what its output and input channels use of their tensors' ranges."""
    modules, values = dict(example.model.named_modules()), state(example.model)
    values |= example.result.tensors if after else {}
    normed = {pair.first for pair in example.result.report if not pair.second.endswith(".weight")}
    pairs = {}
    for pair in example.result.report:
        if not pair.done:
            continue
        first = modules[pair.first.removesuffix(".weight")]
        rows = outputs(first, values[pair.first])
        columns = None
        if pair.second.endswith(".weight"):
            second = modules[pair.second.removesuffix(".weight")]
            columns = inputs(second, values[pair.second], len(rows))
            columns = columns / columns.max()
        pairs[pair.first, pair.second] = (None if columns is not None and pair.first in normed else rows / rows.max(), columns)
    return pairs


# -- the float network stays -----------------------------------------------------------------------------------------------


@EVERY
def test_float_outputs_are_those_of_before(kind):
    example = case(kind)
    before, after = example.network.logits(example.x), example.after.logits(example.x)
    tolerance.assert_close(after, before, tolerance.of_layers(example.network.layers, torch.float64), least=0.0)


@EVERY
def test_the_module_computes_the_same_with_the_new_tensors(kind):
    example = case(kind)
    before = replaced_logits(example.model, {}, example.x)
    after = replaced_logits(example.model, example.after.state_dict({}), example.x)
    tolerance.assert_close(after, before, tolerance.of_layers(example.network.layers, torch.float64), least=0.0)


@CHANGED
def test_float32_agrees_within_its_rounding(kind):
    example, x = case(kind), case(kind).x.float()
    before = example.single.logits(x)
    after = example.single.updated(equalize(example.single, [x]).tensors).logits(x)
    tolerance.assert_close(after, before, tolerance.of_layers(example.network.layers), least=0.0)


@CHANGED
def test_no_new_tensor_can_be_forgotten(kind):
    """The law above can fail: every tensor alone, such as one β, is needed."""
    example = case(kind)
    before = example.network.logits(example.x)
    originals = state(example.model)
    moved = [name for name, tensor in example.result.tensors.items() if not torch.allclose(tensor, originals[name], rtol=1e-2)]
    assert len(moved) >= 7
    for name in moved[:: 1 if len(moved) < 40 else 7]:
        rest = {key: tensor for key, tensor in example.result.tensors.items() if key != name}
        difference = (example.network.updated(rest).logits(example.x) - before).abs().max()
        assert float(difference) > 1e-6 * float(before.abs().max()), name


@pytest.mark.parametrize("kind", ["plain", "relu6"])
def test_the_module_is_not_changed_and_tensors_are_ordinary(kind):
    network = case(kind).single
    before = copy.deepcopy(network.model.state_dict())
    with torch.inference_mode():
        tensors = equalize(network, [case(kind).x.float()]).tensors
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.model.state_dict().items())
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in tensors.values())
    assert all(tensor.dtype == before[name].dtype and tensor.shape == before[name].shape for name, tensor in tensors.items())


@CHANGED
def test_a_second_time_changes_nothing(kind):
    example = case(kind)
    again = equalize(example.after, [example.x])
    for name, tensor in again.tensors.items():
        expected = example.result.tensors.get(name, state(example.model)[name])
        torch.testing.assert_close(tensor, expected, rtol=STOPPED, atol=16 * tolerance.eps(torch.float64))


def test_the_same_twice():
    example = case("mobilenet")
    again = equalize(example.network, [example.x[:3], example.x[3:]])
    assert again.report == example.result.report
    assert all(torch.equal(tensor, example.result.tensors[name]) for name, tensor in again.tensors.items())


# -- ranges become equal ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "normed", "resnet", "mobilenet"])
def test_both_sides_of_a_pair_use_equal_shares_and_those_beside_a_batch_norm_all(kind):
    example = case(kind)
    frozen = {(pair.first, pair.second) for pair in example.result.report if "keep" in pair.note}
    for pair, (rows, columns) in shares(example, after=True).items():
        if rows is not None and columns is not None:
            torch.testing.assert_close(rows, columns, rtol=STOPPED, atol=0)
        elif pair not in frozen:
            used = rows if columns is None else columns
            torch.testing.assert_close(used, torch.ones_like(used), rtol=STOPPED, atol=0)


def product(rows: Tensor | None, columns: Tensor | None) -> float:
    """The papers' objective of one pair: mean over channels of the product of both shares."""
    used = [side / side.max() for side in (rows, columns) if side is not None]
    return float(torch.stack(used).prod(0).mean())


@CHANGED
def test_the_objective_of_the_papers_grows(kind):
    before, after = (sum(product(*sides) for sides in shares(case(kind), when).values()) for when in (False, True))
    assert after > before


@pytest.mark.parametrize("seed", range(3))
def test_no_other_scale_of_a_lone_pair_has_a_larger_objective(seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = {"first.weight": torch.randn(4, 1, 3, 3, generator=generator)}
    drawn["second.weight"] = torch.randn(4, 4, 3, 3, generator=generator).exp()
    network = relu6().updated(drawn)
    first, second = network.updated(equalize(network, [images(4) * 1e-3]).tensors).weights
    rows, columns = first.abs().amax((1, 2, 3)), second.abs().amax((0, 2, 3))
    for spread in (0.01, 0.1, 1.0):
        other = (spread * torch.randn(50, 4, generator=generator)).exp()
        assert max(product(rows / s, columns * s) for s in other) <= product(rows, columns) * (1 + 16 * tolerance.eps())


def scrambled(kind: str, seed: int) -> Network:
    """The same function with channels made unequal by seeded factors; written for each network by hand."""
    example = case(kind)
    generator = torch.Generator().manual_seed(seed)
    new = state(example.model)

    def factor(count: int, *divided: str) -> Tensor:
        drawn = torch.randn(count, generator=generator, dtype=torch.float64).exp()
        for name in divided:
            new[name] = new[name] / drawn.reshape(-1, *[1] * (new[name].ndim - 1))
        return drawn

    if kind == "plain":
        new["depthwise.weight"] = new["depthwise.weight"] * factor(6, "stem.weight", "stem.bias").repeat_interleave(2).reshape(
            -1, 1, 1, 1
        )
        new["wide.weight"] = new["wide.weight"] * factor(5, "narrow.weight").reshape(1, -1, 1, 1)
        new["head.weight"] = new["head.weight"] * factor(8, "hidden.weight", "hidden.bias")
    else:
        new["depthwise.0.weight"] = new["depthwise.0.weight"] * factor(6, "expand.1.weight", "expand.1.bias").reshape(-1, 1, 1, 1)
        new["project.0.weight"] = new["project.0.weight"] * factor(6, "depthwise.1.weight", "depthwise.1.bias").reshape(
            1, -1, 1, 1
        )
        new["head.weight"] = new["head.weight"] * factor(5, "last.0.weight", "last.0.bias")
        for block, count, more in (("expand", 6, ["expand.0.bias"]), ("depthwise", 6, []), ("project", 8, [])):
            drawn = factor(count, f"{block}.0.weight", f"{block}.1.running_mean", *more)
            new[f"{block}.1.running_var"] = (new[f"{block}.1.running_var"] + 1e-5) / drawn.square() - 1e-5
    return example.network.updated({name: tensor for name, tensor in new.items() if name in example.network.engine.named})


@pytest.mark.parametrize("quantizer", ["minmax", "mse"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["plain", "normed"])
def test_quantization_errors_of_outputs_shrink_where_channels_are_unequal(kind, bits, quantizer):
    grid = WeightQuantizer(quantizer, per_channel=False)
    x = case(kind).x
    reference = case(kind).network.logits(x)

    def error(network: Network) -> float:
        tolerance.assert_close(network.logits(x), reference, tolerance.of_layers(network.layers, torch.float64))
        replaced = {i: grid.fake_quantize(weight, bits) for i, weight in enumerate(network.weights)}
        return float((network.logits(x, replaced) - reference).square().mean())

    unequal_ones = [scrambled(kind, seed) for seed in range(4)]
    equal_ones = [network.updated(equalize(network, [x]).tensors) for network in unequal_ones]
    assert sum(map(error, equal_ones)) < 0.5 * sum(map(error, unequal_ones))


def test_channels_without_weights_keep_their_scale():
    network = case("plain").single
    old = state(case("plain").single.model)
    old["stem.weight"] = old["stem.weight"].index_fill(0, torch.tensor([2]), 0)
    old["grouped.weight"] = old["grouped.weight"].index_fill(1, torch.tensor([1]), 0)  # of each of its two groups
    network = network.updated({name: old[name] for name in ("stem.weight", "grouped.weight")})
    new = {**old, **equalize(network, [images(4)]).tensors}
    assert torch.equal(new["stem.weight"][2], old["stem.weight"][2])
    assert torch.equal(new["stem.bias"][2], old["stem.bias"][2])
    assert torch.equal(new["depthwise.bias"][[1, 7]], old["depthwise.bias"][[1, 7]])
    assert not torch.equal(new["depthwise.bias"][[0, 6]], old["depthwise.bias"][[0, 6]])


def test_scales_are_limited():
    model = build(lambda: Between(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())))
    with torch.no_grad():
        model.first.weight[1] *= 1e-20
        model.second.weight[:, 2] *= 1e-20
    result = of(model)
    new = {**model.state_dict(), **result.tensors}
    exact = {"rtol": 4 * tolerance.eps(), "atol": 0}
    torch.testing.assert_close(new["first.weight"][1], model.first.weight[1] * LIMIT, **exact)
    torch.testing.assert_close(new["second.weight"][:, 2], model.second.weight[:, 2] * LIMIT, **exact)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in new.values())


# -- clips -----------------------------------------------------------------------------------------------------------------

CLIPS = {
    "ReLU6": nn.ReLU6(),
    "relu6": F.relu6,
    "hardtanh": nn.Hardtanh(0.0, 6.0),
    "clamp": lambda x: x.clamp(0, 6),
    "two clamps": lambda x: torch.clamp_max(torch.clamp_min(x, 0), 6),
    "behind a pooling": lambda x: F.relu(F.max_pool2d(x, 3, 1, 1)).clamp(max=6.0),
}


def test_every_form_of_relu6_is_a_connection_below_its_clip_only():
    model = build(lambda: Chain(list(CLIPS.values()))).eval()
    below = Network(model, images(1))
    above = below.updated({f"layers.{k}.bias": torch.full((4,), 50.0) for k in range(len(CLIPS))})
    for network in (below, above):
        result = equalize(network, [images(4)])
        assert len(result.report) == len(CLIPS)
        for name, pair in zip(CLIPS, result.report, strict=True):
            assert pair.done == (network is below), name
            assert pair.done or pair.note == "the measured maximum of every channel reaches the clip at 6", name
        assert bool(result.tensors) == (network is below)
        after = network.updated(result.tensors).logits(images(4))
        tolerance.assert_close(after, network.logits(images(4)), least=0.0)


@cache
def relu6() -> Network:
    return Network(build(lambda: Between(nn.ReLU6())).eval(), images(1))


def clipped(*highest: float) -> tuple[Network, Tensor]:
    """A network with a ReLU6 between two layers, and images on which the channels before it reach these maxima."""
    x = images(6)
    first, second = relu6().weights
    bias = torch.zeros(4)
    before = F.conv2d(x, first, padding=1).amax((0, 2, 3))
    weight = first * (torch.tensor(highest) / before).reshape(-1, 1, 1, 1)
    second = second * torch.tensor([1.0, 0.1, 0.02, 10.0]).reshape(1, -1, 1, 1)
    return relu6().updated({"first.weight": weight, "first.bias": bias, "second.weight": second}), x


def test_channels_below_the_clip_are_scaled_and_stay_below_it():
    network, x = clipped(5.9, 3.0, 0.5, 0.01)
    result = equalize(network, x.split(2))
    assert row(result, "first.weight", "second.weight").done
    after = network.updated(result.tensors)
    tolerance.assert_close(after.logits(x), network.logits(x), least=0.0)
    top = calls_of(after, x, 1)[0].input.amax((0, 2, 3))
    assert float(top.max()) < 6
    assert not torch.allclose(top, torch.tensor([5.9, 3.0, 0.5, 0.01]), rtol=0.1)


def test_channels_that_reach_the_clip_keep_their_scale():
    network, x = clipped(6.5, 3.0, 9.0, 0.01)
    result = equalize(network, [x])
    match = row(result, "first.weight", "second.weight")
    assert match.done
    assert "2 keep their scale" in match.note
    before, after = network.weights, network.updated(result.tensors).weights
    assert torch.equal(after[0][[0, 2]], before[0][[0, 2]])
    assert torch.equal(after[1][:, [0, 2]], before[1][:, [0, 2]])
    assert not torch.equal(after[0][[1, 3]], before[0][[1, 3]])
    tolerance.assert_close(network.updated(result.tensors).logits(x), network.logits(x), least=0.0)


def test_a_pair_is_skipped_where_every_channel_reaches_the_clip():
    network, x = clipped(6.5, 7.0, 9.0, 6.01)
    result = equalize(network, [x])
    assert not result.tensors
    assert not row(result, "first.weight", "second.weight").done
    assert "reaches the clip at 6" in row(result, "first.weight", "second.weight").note


def test_scaling_brings_activations_no_nearer_to_a_clip_than_its_headroom():
    network, x = clipped(1.0, 0.8, 0.8, 0.8)
    # weak rows before strong columns want small scales, hence large activations
    strong = torch.tensor([0.01, 0.01, 1.0, 1.0])
    first, second = network.weights
    bias = torch.tensor([3.0, 5.8, 3.0, -1.0])
    network = network.updated(
        {
            "first.weight": first * strong.reshape(-1, 1, 1, 1),
            "first.bias": bias,
            "second.weight": second / strong.reshape(1, -1, 1, 1),
        }
    )
    before = F.conv2d(x, network.weights[0], bias, padding=1).amax((0, 2, 3))
    result = equalize(network, [x])
    after = calls_of(network.updated(result.tensors), x, 1)[0].input.amax((0, 2, 3))
    share = tolerance.of_forward(4, 9)
    assert float(after[0]) == pytest.approx(HEADROOM * 6, rel=share)
    assert float(after[1]) == pytest.approx(float(before[1]), rel=share)
    tolerance.assert_close(network.updated(result.tensors).logits(x), network.logits(x), least=0.0)


def test_only_the_images_given_decide_and_without_any_a_clip_is_no_connection():
    network, x = clipped(6.5, 7.0, 9.0, 6.5)
    assert equalize(network, [x * 0.1]).tensors
    result = equalize(network, [])
    assert not result.tensors
    assert "no images" in result.report[0].note
    plain = case("plain")
    assert equalize(plain.network, []).tensors.keys() == plain.result.tensors.keys()


# -- what is no connection -------------------------------------------------------------------------------------------------

OTHERS = {
    **{name: getattr(nn, name)() for name in ("SiLU", "GELU", "Hardswish", "Sigmoid", "Hardsigmoid", "ELU", "Tanh", "Softplus")},
    "Hardtanh": nn.Hardtanh(-1.0, 1.0),
    "clamp": lambda x: x.clamp(min=0.1),
    "shift": lambda x: F.relu(x + 0.5),
    "bounds": lambda x: torch.clamp(x, min=torch.tensor(0.0)),
    "softmax": lambda x: x.softmax(1),
    "norm": nn.GroupNorm(2, 4),
    "batch norm behind": nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)),
    "padding": nn.ConstantPad2d(1, 1.0),
    "shuffle": lambda x: x.flip(1),
    "across": lambda x: x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2),
    "channels": lambda x: F.pad(x[:, :3], (0, 0, 0, 0, 1, 0)),
    "attention": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "shortcut": lambda x: x + F.relu(x),
}


SAID = {"norm": "group_norm", "padding": "pad", "shift": "add", "shuffle": "flip", "bounds": "clamp", "channels": "slice"}
SAID |= {
    "attention": "readers: mean, mul",
    "shortcut": "readers: relu, add",
    "across": "reshape",
    "batch norm behind": "not directly after",
}


def test_what_is_not_homogeneous_in_each_channel_is_skipped_with_a_reason():
    result = of(build(lambda: Chain(list(OTHERS.values()))))
    assert not any(name.startswith("layers") for name in result.tensors)
    assert len(result.report) == len(OTHERS)
    for k, (name, pair) in enumerate(zip(OTHERS, result.report, strict=True)):
        assert pair == Pair(f"layers.{k}.weight", f"layers.{k + 1}.weight", False, pair.note)
        assert SAID.get(name, name.lower()) in pair.note, name


HOMOGENEOUS = {
    "nothing": nn.Identity(),
    "PReLU of one slope": nn.PReLU(),
    "negative slope": nn.LeakyReLU(-0.5),
    "no floor": lambda x: F.relu(x).clamp(max=1e6),
    "upsampled": lambda x: F.max_pool2d(F.interpolate(x, scale_factor=2, mode="bilinear"), 2),
    "adaptive": lambda x: F.adaptive_max_pool2d(F.relu(x), 4),
    "indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "reflected": nn.ReflectionPad2d(1),
    "dropout": nn.Dropout(0.5),
    "reshaped": lambda x: F.relu(x.flatten(2)).unsqueeze(1).reshape(x.shape[0], 4, x.shape[2], x.shape[3]),
    "reduced": lambda x: x.unsqueeze(2).amax(2),
}


def test_what_is_homogeneous_in_each_channel_is_a_connection():
    model = unequal(build(lambda: Chain(list(HOMOGENEOUS.values()))), 0.7)
    result = of(model, images(4, size=32))
    assert len(result.report) == len(HOMOGENEOUS)
    for name, pair in zip(HOMOGENEOUS, result.report, strict=True):
        assert pair.done, name
    assert set(result.tensors) == {name for name in model.state_dict() if name.startswith("layers")} - {
        f"layers.{len(HOMOGENEOUS)}.bias"
    }
    x = images(4, size=32)
    # twelve layers, and what is between them
    share = tolerance.of_forward(24, 36)
    tolerance.assert_close(replaced_logits(model, result.tensors, x), replaced_logits(model, {}, x), share, least=0.0)


def test_values_with_other_readers_are_skipped_and_say_who_reads():
    result = case("residual").result
    assert not {name.split(".")[0] for name in result.tensors} & {"up", "head"}
    assert row(result, "stem.weight", "norm").done
    assert row(result, "stem.weight", "depthwise.weight").note == (
        "a value between them has other readers: depthwise.weight, add"
    )
    assert row(result, "depthwise.weight", "grouped.weight").done
    assert row(result, "grouped.weight", "up.weight").note == "add joins it with other values"
    assert "hardswish" in row(result, "up.weight", "head.weight").note


def test_tied_split_and_fixed_weights_are_left_alone():
    result = case("tied").result
    assert not result.tensors
    assert len(result.report) == 3
    assert all("second.weight is tied: it is used 2 times" in pair.note for pair in result.report)

    split = of(build(Attention), split=["*in_proj_weight"])
    assert {pair.note for pair in split.report if pair.first.startswith("attention.in")} == {"attention.in_proj_weight is split"}
    fixed = of(build(Plain), fixed=["grouped.weight"])
    assert row(fixed, "depthwise.weight", "grouped.weight").note == "grouped.weight is not searched"
    assert not any(pair.first == "grouped.weight" for pair in fixed.report)
    assert not any(name.startswith("grouped") for name in fixed.tensors)
    assert row(fixed, "up.weight", "narrow.weight").done


class Shared(nn.Module):
    """A bias that two layers have, one that is computed, a weight that is, and batch norms that share a variance or have no γ."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(1, 4, 1), *(nn.Conv2d(4, 4, 1) for _ in range(6))])
        self.layers[1].bias = self.layers[0].bias
        self.plain = nn.BatchNorm2d(4, affine=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.norms[1].running_var = self.norms[0].running_var

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, fourth, fifth, sixth, last = self.layers
        x = F.relu(second(F.relu(first(x))))
        x = F.relu(F.conv2d(x, third.weight, third.bias * 2))
        x = F.relu(F.conv2d(x, fourth.weight.unsqueeze(0).squeeze(0), fourth.bias))
        x = F.relu(self.norms[1](sixth(F.relu(self.norms[0](fifth(x))))))
        return self.plain(last(x)).relu().mean((2, 3))


def test_tensors_that_cannot_be_given_another_value_are_left_alone():
    model = build(Shared)
    result = of(model)
    notes = {(pair.first[7:-7], pair.second.removeprefix("layers.")): pair.note for pair in result.report}
    assert "layers.0.bias is tied" in notes["0", "1.weight"]
    assert "layers.0.bias is tied" in notes["1", "2.weight"]
    assert notes["2", "3.weight"] == "a bias or a scale cannot get another value"
    assert notes["3", "4.weight"] == "layers.3.weight passes through other operators before it is used"
    assert (
        notes["4", "5.weight"]
        == notes["5", "6.weight"]
        == "a batch norm lies between them whose statistics cannot be changed for it alone"
    )
    assert row(result, "layers.6.weight", "plain").done
    before = replaced_logits(model, {}, images(4))
    tolerance.assert_close(replaced_logits(model, result.tensors, images(4)), before)


def test_a_batch_norm_without_a_scale_ends_a_connection():
    result = of(build(lambda: Between(nn.BatchNorm2d(4, affine=False))))
    assert row(result, "first.weight", "between").done
    assert row(result, "first.weight", "second.weight").note == "the batch norm between them has no scale"
    assert set(result.tensors) == {"first.weight", "first.bias", "between.running_mean", "between.running_var"}


def test_batch_statistics_are_no_batch_norm_to_scale():
    network = case("normed").single.with_batch_statistics()
    result = equalize(network, [images(4)])
    assert not any("running" in name for name in result.tensors)
    after = network.updated(result.tensors).logits(images(4))
    tolerance.assert_close(after, network.logits(images(4)))


def test_whole_forwards_have_no_connections_and_say_so():
    result = of(build(Plain), graph=False)
    assert not result.tensors
    (only,) = result.report
    assert not only.done
    assert "whole forward passes" in only.note


# -- the report ------------------------------------------------------------------------------------------------------------


def test_every_layer_of_the_mobilenet_has_its_rows():
    result = case("mobilenet").result
    layers = [layer.name for layer in case("mobilenet").network.layers]
    assert [pair.first for pair in result.report if pair.second.endswith("weight")] == layers[:-1]
    assert [pair.first for pair in result.report if not pair.second.endswith("weight")] == layers[:-1]
    for block in range(4, 10):
        expand, depthwise, project = (f"features.{block}.body.{k}.weight" for k in (0, 3, 6))
        assert row(result, expand, depthwise).done
        assert row(result, depthwise, project).done
        assert row(result, project, f"features.{block}.body.7").done
    skipped = [pair for pair in result.report if not pair.done]
    # projections end in a shortcut or before one, and so does the stem
    assert {pair.first for pair in skipped} == {
        "features.0.weight",
        "features.3.body.3.weight",
        *(f"features.{block}.body.6.weight" for block in (4, 5, 6, 7, 8, 9)),
    }
    assert row(result, "features.10.weight", "classifier.weight").done


def test_every_layer_of_the_resnet_has_its_rows():
    result = case("resnet").result
    blocks = [f"layer{stage}.{k}" for stage in (1, 2, 3) for k in range(3)]
    done = {(pair.first, pair.second) for pair in result.report if pair.done and pair.second.endswith("weight")}
    assert done == {(f"{block}.conv1.weight", f"{block}.conv2.weight") for block in blocks}
    assert all(pair.done for pair in result.report if not pair.second.endswith("weight"))
    assert len(result.report) == 21 + 21


def test_the_transformer_has_no_pair_to_equalise():
    result = of(build(VisionTransformer), images(2, size=28))
    assert not result.tensors
    assert len(result.report) == 25
    assert {pair.note.split()[0] for pair in result.report if "mlp.0" in pair.first} == {"gelu"}
    assert str(result.report[0]).startswith("patches.weight -> blocks.0.attention.in_proj_weight: skipped, transpose is not")
