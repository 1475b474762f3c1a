"""Laws of what gradients say: explicit Hessians and explicit gradients of the module itself are the reference."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clado import criteria
from clado.errors import ConfigurationError
from clado.measuring.measurements import gradients, measure_tile, trace
from clado.measuring.plan import Plan, Tile, sample_blocks
from clado.measuring.workbench import Workbench
from clado.network.network import Network
from clado.quantization.preparation import Prepared, Recipe, prepare
from clado.quantization.quantizers import WeightQuantizer
from tests import tolerance
from tests.networks import Attention, Branching, Residual, Tied, build, images, labels, rebuilt

pytestmark = pytest.mark.numeric

SLOPE = 2 * tolerance.FORWARD  # forwards and backwards, as a share of a gradient's norm
NUM_IMAGES = 6
CRITERIA = pytest.mark.parametrize("criterion", ["kl_to_float", "cross_entropy"])
OTHERS = [(Residual, True), (Attention, True), (Tied, True), (Attention, False), (Branching, False)]


class Tiny(nn.Module):
    """Few enough weights for a whole Hessian, and second derivatives that are not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.first(x.flatten(1)).tanh())


@cache
def prepared_of(kind, graph=True, biases=True, size=8) -> Prepared:
    network = Network(build(kind), images(1, size=size), graph=graph)
    ready = prepare(network, network.search_space((2, 4)), Recipe(WeightQuantizer()))
    old_bias = network.biases
    layers = [
        layer if old_bias[option.layer] is None or not biases else replace(layer, bias=old_bias[option.layer] + 0.1 / option.bits)
        for option, layer in zip(ready.space.options, ready.layers, strict=True)
    ]
    return replace(ready, layers=tuple(layers))


def images_of(ready: Prepared) -> torch.Tensor:
    return images(NUM_IMAGES, size=ready.network.image_shape[1])


def bench_of(ready: Prepared, criterion="cross_entropy", num_blocks=2, seed=0, batch_images=None, num_vectors=2) -> Workbench:
    x, y = images_of(ready), labels(NUM_IMAGES, 2)
    blocks = sample_blocks(NUM_IMAGES, num_blocks)
    return Workbench(ready, criterion, blocks, lambda a, b: (x[a:b], y[a:b]), batch_images, num_vectors=num_vectors, seed=seed)


def changes(ready: Prepared, named: dict[str, torch.Tensor], option: int) -> dict[str, torch.Tensor]:
    """What an option adds to the parameters of the module, by name, in float64."""
    rounded, name = ready.layers[option], ready.space.layers[ready.space.options[option].layer].name
    differences = {name: rounded.weight.double() - named[name].detach()}
    if rounded.bias is not None:
        other = name.replace("weight", "bias")
        differences[other] = rounded.bias.double() - named[other].detach()
    return differences


def explicit_slopes(ready: Prepared, n: int, y: int) -> np.ndarray:
    """(3, K) of one image: ⟨Δ, g⟩², Σ Δ² g² over weights, and ‖Δ‖² ‖g‖², which neither exceeds.

    g = ∂ log p_y comes from a backward through the module in float64.
    """
    model = ready.network.model.eval()
    with torch.enable_grad():
        named = {key: p.detach().double().requires_grad_() for key, p in model.named_parameters()}
        buffers = {key: b.double() if b.is_floating_point() else b for key, b in model.named_buffers()}
        logits = torch.func.functional_call(model, {**named, **buffers}, (images_of(ready)[n : n + 1].double(),))
        slopes = torch.autograd.grad(
            logits.log_softmax(-1)[0, y], list(named.values()), allow_unused=True, materialize_grads=True
        )
    by_name = dict(zip(named, slopes, strict=True))
    result = np.zeros((3, ready.space.num_options))
    for k, option in enumerate(ready.space.options):
        delta, name = changes(ready, named, k), ready.space.layers[option.layer].name
        result[0, k] = float(sum((d * by_name[key]).sum() for key, d in delta.items())) ** 2
        result[1, k] = float((delta[name].square() * by_name[name].square()).sum())
        norms = (sum(part[key].square().sum() for key in delta) for part in (delta, by_name))
        result[2, k] = np.prod([float(norm) for norm in norms])
    return result


@pytest.mark.parametrize(("kind", "graph"), OTHERS)
def test_slopes_are_those_of_explicit_gradients_of_every_sample(kind, graph):
    ready = prepared_of(kind, graph, biases=kind is not Tied)
    y = labels(NUM_IMAGES, 2)
    sums = measure_tile(bench_of(ready, num_blocks=1), Tile("gradients", 0))
    expected = sum(explicit_slopes(ready, n, int(y[n])) for n in range(NUM_IMAGES))
    # a square moves by twice its root and by what that is off by
    off = 2 * SLOPE * np.sqrt(expected[:2] * expected[2]) + SLOPE**2 * expected[2]
    assert (np.abs(sums[:, 1:] - expected[:2]) <= off).all()
    with torch.no_grad():
        losses = [F.cross_entropy(ready.network.model(images_of(ready)[n : n + 1]), y[n : n + 1]) for n in range(NUM_IMAGES)]
    tolerance.assert_close_losses(sums[:, 0], [float(sum(losses))] * 2, NUM_IMAGES)


def test_under_kl_labels_are_drawn_from_the_float_softmax():
    ready = prepared_of(Tiny, size=2)
    p = ready.network.logits(images_of(ready)).double().softmax(-1)
    expected = sum(float(p[n, y]) * explicit_slopes(ready, n, y)[0] for n in range(NUM_IMAGES) for y in range(2))
    x, seeds = images_of(ready), range(30)
    draws = [gradients.squared_slopes(ready, "kl_to_float", x, None, np.random.default_rng(seed))[0, 1:] for seed in seeds]
    error = np.std(draws, axis=0, ddof=1) / np.sqrt(len(draws))
    assert (np.abs(np.mean(draws, axis=0) - expected) < 4 * error + 1e-3 * expected).all()
    assert (error < 0.3 * expected).all()


def hessian(ready: Prepared, criterion: str) -> np.ndarray:
    """The Hessian of the sum of losses in all weights, layer after layer, by torch.autograd.functional in float64."""
    model, y = rebuilt(ready.network.model, {}).double(), labels(NUM_IMAGES, 2)
    x = images(NUM_IMAGES, size=2).double()
    floats = model(x).detach()
    shapes = [layer.shape for layer in ready.space.layers]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([int(np.prod(shape)) for shape in shapes])
        named = {layer.name: part.reshape(layer.shape) for layer, part in zip(ready.space.layers, parts, strict=True)}
        return criteria.bind(criterion, floats, y)(torch.func.functional_call(model, named, (x,))).sum()

    flat = torch.cat([w.double().reshape(-1) for w in ready.network.weights])
    return np.asarray(torch.autograd.functional.hessian(loss, flat))


@CRITERIA
def test_traces_are_hutchinsons_estimate_of_the_exact_hessian_and_their_mean_is_its_trace(criterion):
    ready = prepared_of(Tiny, size=2)
    exact, weights = hessian(ready, criterion), ready.network.weights
    ends = np.cumsum([0, *(w.numel() for w in weights)])
    factors = np.array(
        [
            float((rounded.weight - weights[option.layer]).double().square().sum()) / weights[option.layer].numel()
            for option, rounded in zip(ready.space.options, ready.layers, strict=True)
        ]
    )
    owner = [option.layer for option in ready.space.options]

    def by_options(values: np.ndarray) -> np.ndarray:
        """Sums over the weights of each layer, as the options of the layer have them."""
        sums = [values[a:b].sum() for a, b in zip(ends[:-1], ends[1:], strict=True)]
        return np.array([sums[layer] for layer in owner]) * factors

    parts = [(images(NUM_IMAGES, size=2), labels(NUM_IMAGES, 2))]
    draws = []
    for seed in range(60):
        estimate = trace.average_traces(ready, criterion, parts, 1, np.random.default_rng(seed))
        random = np.random.default_rng(seed)
        v = np.concatenate([(random.integers(0, 2, tuple(w.shape)) * 2.0 - 1.0).reshape(-1) for w in weights])
        products = v * (exact @ v)
        # a second backward goes through both
        assert (np.abs(estimate[1:] - by_options(products)) <= 2 * SLOPE * by_options(np.abs(products))).all()
        draws.append(estimate[1:])
    traces = by_options(np.diag(exact))
    error = np.std(draws, axis=0, ddof=1) / np.sqrt(len(draws))
    assert (np.abs(np.mean(draws, axis=0) - traces) < 4 * error + 1e-3 * np.abs(traces)).all()


@pytest.mark.parametrize(("kind", "graph"), OTHERS[1:])
def test_second_derivatives_exist_for_networks_of_other_kinds(kind, graph):
    sums = measure_tile(bench_of(prepared_of(kind, graph, biases=kind is not Tied), "kl_to_float"), Tile("trace", 1))
    assert np.isfinite(sums).all()
    assert np.abs(sums[1:]).max() > 0


@CRITERIA
@pytest.mark.parametrize("kind", ["gradients", "trace"])
def test_what_is_drawn_depends_on_seed_and_block_alone(kind, criterion):
    ready = prepared_of(Tiny, size=2)
    first, again, other = (bench_of(ready, criterion, seed=seed) for seed in (3, 3, 5))
    measure_tile(again, Tile(kind, 0))  # a worker that has drawn before draws the same
    sums = [measure_tile(bench, Tile(kind, 1)) for bench in (first, again, other)]
    assert sums[0].tobytes() == sums[1].tobytes()
    drawn = kind == "trace" or criterion == "kl_to_float"
    assert np.array_equal(sums[0], sums[2]) != drawn
    small = measure_tile(bench_of(ready, criterion, seed=3, batch_images=1), Tile(kind, 1))
    np.testing.assert_allclose(small, sums[0], rtol=0, atol=2 * SLOPE * np.abs(sums[0]).max())


@pytest.mark.parametrize("kind", ["gradients", "trace"])
def test_images_forward_and_backward_are_those_of_the_plan(kind, monkeypatch):
    bench = bench_of(prepared_of(Tiny, size=2), "kl_to_float", num_vectors=3)
    plan = Plan(bench.space, tuple(bench.sample_blocks), (kind,), 1, num_vectors=3)
    counted = {"forward": 0, "backward": 0, "images": 0}
    forward, backward = Network.recorded_logits, torch.autograd.grad

    def counted_forward(self, x, replaced):
        counted["images"] = len(x)
        counted["forward"] += len(x)
        return forward(self, x, replaced)

    def counted_backward(*arguments, **settings):
        counted["backward"] += counted["images"]
        return backward(*arguments, **settings)

    monkeypatch.setattr(Network, "recorded_logits", counted_forward)
    monkeypatch.setattr(torch.autograd, "grad", counted_backward)
    for tile in plan.tiles:
        measure_tile(bench, tile)
    assert counted["forward"] == plan.forward_images(plan.tiles) == NUM_IMAGES
    assert counted["backward"] == plan.backward_images(plan.tiles) == NUM_IMAGES * (4 if kind == "trace" else 1)


def test_gradients_of_single_samples_are_refused_on_batch_statistics():
    ready = prepared_of(Tiny, size=2)
    x = images_of(ready)
    bench = Workbench(ready, "kl_to_float", ((0, 6),), lambda a, b: (x[a:b], None), batch_statistics=True)
    with pytest.raises(ConfigurationError, match="single samples"):
        measure_tile(bench, Tile("gradients", 0))
    assert np.isfinite(measure_tile(bench, Tile("trace", 0))).all()
