"""Measuring with a user-defined loss: numbers are those of whole runs of the module, and curvatures those of its outputs."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from clado import paper
from clado.criteria import Criterion
from clado.errors import ConfigurationError
from clado.interaction import estimators
from clado.measuring.kinds.gram import TEMPERATURES
from clado.measuring.measurements import gram, measure_tile
from clado.measuring.plan import Plan, Tile, sample_blocks
from clado.measuring.scores import scores
from clado.measuring.workbench import Workbench
from clado.network.network import Network
from clado.quantization.preparation import Prepared, Recipe, prepare
from clado.quantization.quantizers import WeightQuantizer
from tests import tolerance

pytestmark = pytest.mark.numeric

NUM_IMAGES = 6
PATHS = pytest.mark.parametrize("graph", [True, False], ids=["graph", "whole"])


class Segmenting(nn.Module):
    """A map of classes at half the resolution, with a shortcut: (N, 3, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(torch.cat([F.relu(self.down(x)), F.max_pool2d(x, 2)], 1))


class Several(Segmenting):
    """The map, and a vector and a number of each image."""

    def forward(self, x: Tensor) -> Any:
        z = super().forward(x)
        return {"maps": z, "rest": (z.mean((2, 3)), z.amax((1, 2, 3)))}


def off(outputs: Any, float_outputs: Any, targets: Any) -> Tensor:
    """A user-defined loss on `Several`, which reads targets (N, 2)."""
    far = (outputs["maps"] - float_outputs["maps"]).abs().flatten(1).mean(1)
    return far + (outputs["rest"][0][:, :2] - targets).square().sum(1) + outputs["rest"][1].tanh()


def squared(outputs: Any, float_outputs: Any, targets: Any) -> Tensor:
    """Half the squared distance of all values: its Hessian is the identity."""
    pairs = zip(tree_leaves(outputs), tree_leaves(float_outputs), strict=True)
    return torch.stack([(z - f).square().reshape(len(z), -1).sum(1) for z, f in pairs]).sum(0) / 2


SQUARED = Criterion(squared, curvature=lambda float_outputs, targets: lambda change: change)


@cache
def prepared_of(kind: type[nn.Module], graph: bool) -> Prepared:
    torch.manual_seed(3)
    network = Network(kind().eval(), torch.zeros(1, 1, 8, 8), graph=graph)
    return prepare(network, network.search_space((2, 4)), Recipe(WeightQuantizer()))


def images() -> Tensor:
    return torch.randn(NUM_IMAGES, 1, 8, 8, generator=torch.Generator().manual_seed(4))


def targets() -> Tensor:
    return torch.randn(NUM_IMAGES, 2, generator=torch.Generator().manual_seed(5))


def bench_of(criterion: Any, kind: type[nn.Module] = Several, graph: bool = True, batch_images: int = 16) -> Workbench:
    x, y = images(), targets()
    blocks = sample_blocks(NUM_IMAGES, 2)
    return Workbench(prepared_of(kind, graph), criterion, blocks, lambda a, b: (x[a:b], y[a:b]), batch_images)


def outputs_of(bench: Workbench, *options: int) -> Any:
    """Outputs of the module itself with these options in place, for all images."""
    space, prepared = bench.space, bench.prepared
    weights = {space.layers[space.options[k].layer].name: prepared.layers[k].weight for k in options}
    with torch.no_grad():
        return paper.replaced(prepared.network.model, weights)(images())


def reference(bench: Workbench, loss: Callable[..., Tensor], *options: int) -> np.ndarray:
    """Losses (N,) by the module itself."""
    return loss(outputs_of(bench, *options), outputs_of(bench), targets()).double().numpy()


@PATHS
def test_singles_and_pairs_are_the_losses_of_whole_runs(graph):
    bench = bench_of(off, graph=graph)
    space = bench.space
    allowed = tolerance.LOSS * max(1.0, reference(bench, off).max())
    plan = Plan(space, bench.sample_blocks, ("singles", "pairs"), space.num_options)
    for tile in plan.tiles:
        result, block = measure_tile(bench, tile), slice(*bench.sample_blocks[tile.sample_block])
        if tile.kind == "singles":
            expected = [reference(bench, off, *chosen)[block].sum() for chosen in [(), *((k,) for k in range(space.num_options))]]
            np.testing.assert_allclose(result, expected, rtol=0, atol=NUM_IMAGES * allowed)
            continue
        for k, m in np.ndindex(result.shape):
            if space.options[k].layer < space.options[m].layer:
                assert abs(result[k, m] - reference(bench, off, k, m)[block].sum()) <= NUM_IMAGES * allowed
            else:
                assert np.isnan(result[k, m])


def test_scores_have_the_loss_alone():
    bench = bench_of(off)
    result = scores(bench, bench.space.narrowest, 1)
    chosen = bench.space.chosen_options(bench.space.narrowest)
    np.testing.assert_allclose(result.losses, reference(bench, off, *chosen)[3:], rtol=0, atol=10 * tolerance.LOSS)
    assert (result.briers, result.hits) == (None, None)


def changes_of(bench: Workbench, block: int) -> Tensor:
    """What each option changes in the outputs (K, n, M), float64."""

    def flat(value: Any) -> Tensor:
        return torch.cat([leaf.double().reshape(NUM_IMAGES, -1) for leaf in tree_leaves(value)], 1)

    part = slice(*bench.sample_blocks[block])
    return torch.stack([flat(outputs_of(bench, k)) - flat(outputs_of(bench)) for k in range(bench.space.num_options)])[:, part]


@PATHS
def test_gauss_newton_of_squares_is_the_gram_matrix_of_the_changes(graph):
    bench = bench_of(SQUARED, graph=graph)
    k = bench.space.num_options
    sums = measure_tile(bench, Tile("gram", 1))
    u = changes_of(bench, 1).flatten(1)
    expected, scale = (u @ u.T).numpy(), float(u.abs().max()) * u.shape[1]
    for t in range(len(TEMPERATURES)):
        rows = slice(2 + t * k, 2 + (t + 1) * k)
        np.testing.assert_allclose(sums[rows, 1:], expected, rtol=0, atol=2 * tolerance.FORWARD * scale)
    np.testing.assert_array_equal(sums[1], 0)
    np.testing.assert_allclose(2 * sums[0, 1:], np.diag(expected), rtol=0, atol=2 * tolerance.FORWARD * scale)


def test_gauss_newton_of_dense_kl_is_the_mean_of_softmax_curvatures_over_positions():
    bench = bench_of("kl_to_float", Segmenting)
    k = bench.space.num_options
    sums = measure_tile(bench, Tile("gram", 0))[2 : 2 + k, 1:]
    u = changes_of(bench, 0).reshape(k, 3, 3, 16)  # options, images, classes, positions
    p = outputs_of(bench)[:3].double().flatten(2).softmax(1)
    expected = np.zeros((k, k))
    for n, i in np.ndindex(3, 16):
        fisher = torch.diag(p[n, :, i]) - torch.outer(p[n, :, i], p[n, :, i])
        expected += (u[:, n, :, i] @ fisher @ u[:, n, :, i].T).numpy() / 16
    np.testing.assert_allclose(sums, expected, rtol=0, atol=2 * tolerance.FORWARD * float(u.abs().max()) * 9)


def test_the_first_order_is_the_gradient_of_the_loss_times_the_changes():
    bench = bench_of(Criterion(off, curvature=lambda float_outputs, targets: lambda change: change))
    result = measure_tile(bench, Tile("gram", 0))[1, 1:]
    floats = {"maps": outputs_of(bench)["maps"].double(), "rest": [z.double() for z in outputs_of(bench)["rest"]]}
    # by hand: |z − f| has no slope at f, (z − y)² has 2 (z − y), tanh has 1 − tanh²
    u, slope = changes_of(bench, 0), torch.zeros(3, 48 + 3 + 1, dtype=torch.float64)
    slope[:, 48:50] = 2 * (floats["rest"][0][:3, :2] - targets()[:3])
    slope[:, 51] = 1 - floats["rest"][1][:3].tanh().square()
    expected = (u * slope).sum((1, 2))
    np.testing.assert_allclose(result, expected, rtol=0, atol=2 * tolerance.FORWARD * float(slope.abs().sum()))


def sampled(monkeypatch: pytest.MonkeyPatch, values: int, batch_images: int = 16) -> np.ndarray:
    monkeypatch.setattr(gram, "SAMPLED_VALUES", values)
    gram._drawn.cache_clear()
    bench = bench_of(SQUARED, batch_images=batch_images)
    result: np.ndarray = measure_tile(bench, Tile("gram", 0))[2 : 2 + bench.space.num_options, 1:]
    return result


def test_large_outputs_are_sampled_within_the_error_of_the_draw(monkeypatch):
    """Against the exact form, whose values it draws without repetition: five standard errors hold all entries."""
    exact, drawn = sampled(monkeypatch, 10_000), sampled(monkeypatch, 13)
    u = changes_of(bench_of(SQUARED), 0)  # (K, n, M)
    num_values = u.shape[2]
    parts = torch.einsum("knm,lnm->klm", u, u)  # what each value adds to each entry
    error = num_values * ((1 - 13 / num_values) * parts.var(2) / 13).sqrt().numpy()
    assert (np.abs(drawn - exact) <= 5 * error).all()
    assert not np.allclose(drawn, exact, rtol=1e-3)
    assert np.linalg.eigvalsh((drawn + drawn.T) / 2).min() >= -tolerance.eps() * np.abs(drawn).max() * len(drawn)


def test_the_sample_is_the_same_whatever_the_batches_and_again(monkeypatch):
    one, other, again = (sampled(monkeypatch, 13, batch_images) for batch_images in (16, 3, 16))
    np.testing.assert_allclose(one, other, rtol=0, atol=4 * tolerance.FORWARD * np.abs(one).max())
    assert np.array_equal(one, again)


@pytest.mark.parametrize("estimator", ["gauss_newton", "tempered2", "fisher", "mpqco"])
def test_an_estimator_that_needs_more_than_the_loss_is_refused_at_once(estimator):
    with pytest.raises(ConfigurationError, match=f"estimator {estimator} needs .*; expected layerwise"):
        estimators.check_criterion([estimator], "off", frozenset())


def test_estimators_that_need_the_loss_alone_take_any():
    estimators.check_criterion(["layerwise", "pairwise", "blockwise", "hawq"], "off", frozenset())
    estimators.check_criterion(["gauss_newton"], "off", frozenset({"curvature"}))
