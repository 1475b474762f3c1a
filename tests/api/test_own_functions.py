"""A user-defined loss and metric, from Python: any network, any targets, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import clado
from clado import paper
from clado.criteria import Criterion, cross_entropy
from clado.errors import ConfigurationError, DataError
from tests import tolerance
from tests.networks import Residual, build, images, labels

NUM_IMAGES = 12


class Keypoints(nn.Module):
    """Two heat maps and a visibility of each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.maps = nn.Conv2d(6, 2, 3, padding=1)
        self.visible = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.stem(x))
        return {"maps": self.maps(x), "visible": self.visible(x.mean((2, 3)))}


def distance(outputs: Any, float_outputs: Any, targets: Tensor) -> Tensor:
    """Heat maps against those of the float network, visibility against targets (N, 2)."""
    near = (outputs["maps"] - float_outputs["maps"]).square().flatten(1).mean(1)
    return near + F.binary_cross_entropy_with_logits(outputs["visible"], targets, reduction="none").mean(1)


def visibility(outputs: Any, targets: Tensor) -> Tensor:
    """Fraction of the two that are told right."""
    return ((outputs["visible"] > 0) == targets.bool()).double().mean(1)


@pytest.fixture(scope="module")
def network() -> clado.Network:
    torch.manual_seed(0)
    return clado.Network(Keypoints().eval(), torch.zeros(1, 1, 8, 8))


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_IMAGES, 1, 8, 8, generator=random)
    return x, torch.randint(0, 2, (NUM_IMAGES, 2), generator=random).float()


def test_pairwise_of_ones_own_loss_is_the_method_in_its_plainest_form(network, data):
    x, y = data
    space = network.search_space(bits=(2, 4))
    prepared = clado.prepare(network, space)
    options = [(space.layers[o.layer].name, q.weight) for o, q in zip(space.options, prepared.layers, strict=True)]
    floats = paper.forward(network.model, x)
    floats = {name: value.double() for name, value in floats.items()}

    def loss(model: nn.Module) -> float:
        outputs = {name: value.double() for name, value in paper.forward(model, x).items()}
        return float(distance(outputs, floats, y.double()).mean())

    expected = paper.interaction_matrix(network.model, options, loss)
    result = clado.measure(network, space, data, estimator="pairwise", criterion=distance, prepared=prepared)
    np.testing.assert_allclose(result.values, expected, rtol=0, atol=8 * tolerance.LOSS)
    assert result.criterion == "distance"
    assert result.baseline == pytest.approx(loss(network.model), abs=tolerance.LOSS)
    layerwise = clado.measure(network, space, data, estimator="layerwise", criterion=distance, prepared=prepared)
    np.testing.assert_allclose(np.diag(layerwise.values), np.diag(expected), rtol=0, atol=8 * tolerance.LOSS)


def test_a_name_of_a_module_stands_for_its_function(network, data):
    space, here = network.search_space(bits=(2, 4)), "tests.api.test_own_functions"
    one, other = (
        clado.measure(network, space, data, estimator="layerwise", criterion=criterion)
        for criterion in (distance, f"{here}:distance")
    )
    assert np.array_equal(one.values, other.values)
    given, named = (
        clado.evaluate(network, space.narrowest, data, criterion=distance, metric=metric)
        for metric in (visibility, f"{here}:visibility")
    )
    assert given == named


@pytest.mark.parametrize("criterion", ["mse_to_float", "cosine_to_float"])
def test_shipped_losses_to_the_float_network_take_any_outputs_and_no_targets(network, data, criterion):
    space = network.search_space(bits=(2, 4, 8))
    matrix = clado.measure(network, space, data[0], criterion=criterion)  # gauss_newton
    assert np.linalg.eigvalsh(matrix.values).min() >= -tolerance.LOSS
    solution = clado.solve(matrix, average_bits=4)
    singles = clado.measure(network, space, data[0], estimator="layerwise", criterion=criterion)
    # the widest options change little, so that the second order is nearly all of it
    wide = [k for k, option in enumerate(space.options) if option.bits == 8]
    np.testing.assert_allclose(np.diag(matrix.values)[wide], np.diag(singles.values)[wide], rtol=0.05, atol=tolerance.LOSS)
    assert clado.evaluate(network, solution.assignment, data[0]).loss >= 0


def test_evaluate_gives_the_mean_of_a_metric_and_of_ones_own_loss(network, data):
    x, y = data
    space = network.search_space(bits=(2, 4))
    result = clado.evaluate(network, space.narrowest, data, metric=visibility, criterion=distance)
    with torch.no_grad():
        outputs, floats = clado.quantize(network, space.narrowest)(x), network.model(x)
    assert result.num_images == NUM_IMAGES
    assert result.metric == pytest.approx(float(visibility(outputs, y).mean()))
    assert result.metric_name == "visibility"
    assert result.loss == pytest.approx(float(distance(outputs, floats, y).mean()), abs=8 * tolerance.LOSS)
    assert (result.top1, result.kl, result.agreement) == (None, None, None)


def test_a_metric_stands_beside_a_classifiers_figures_and_changes_none():
    network = clado.Network(build(Residual), images(2))
    space, data = network.search_space(bits=(2, 4)), (images(NUM_IMAGES), labels(NUM_IMAGES))

    def second(outputs: Tensor, targets: Tensor) -> Tensor:
        """Whether the second class is the label."""
        return (outputs.topk(2).indices[:, 1] == targets).double()

    plain = clado.evaluate(network, space.narrowest, data)
    result = clado.evaluate(network, space.narrowest, data, metric=second)
    assert (result.loss, result.top1, result.top5, result.kl) == (plain.loss, plain.top1, plain.top5, plain.kl)
    with torch.no_grad():
        assert result.metric == float(second(clado.quantize(network, space.narrowest)(data[0]), data[1]).mean())
    assert (plain.metric, plain.metric_name) == (None, None)
    judged = clado.evaluate(network, space.narrowest, data, criterion="mse_to_float")
    assert (judged.top1, judged.top5) == (plain.top1, plain.top5)
    assert judged.loss != plain.loss


def test_compress_takes_both_and_says_the_metric(network):
    random = torch.Generator().manual_seed(3)
    x, y = torch.randn(140, 1, 8, 8, generator=random), torch.randint(0, 2, (140, 2), generator=random).float()
    result = clado.compress(
        network,
        (x, y),
        average_bits=4,
        estimator="pairwise",
        criterion=distance,
        metric=visibility,
        corrections=(),
        calibration_images=32,
        sensitivity_images=32,
        selection_images=32,
    )
    assert result.average_bits <= 4
    assert f"visibility {result.float_accuracy.metric:.4g} → {result.accuracy.metric:.4g}" in result.summary()
    assert f"{result.num_images['validation']} images" in result.summary()
    assert (result.agreement, result.accuracy.top1) == (None, None)
    with torch.no_grad():
        outputs = result.module(x)
    assert outputs.keys() == {"maps", "visible"}
    assert min(row.loss_deployed for row in result.results) == next(
        row.loss_deployed for row in result.results if row.method == "chosen"
    )


REFUSED = {
    "a loss without curvature": ({"criterion": distance}, ConfigurationError, "gauss_newton needs the curvature .* layerwise or"),
    "fisher": ({"criterion": "mse_to_float", "estimator": "fisher"}, ConfigurationError, "fisher needs logits"),
    "a loss that fails": (
        {"criterion": lambda outputs, floats, targets: outputs["mask"], "estimator": "layerwise"},
        ConfigurationError,
        r"failed: KeyError: 'mask'; outputs have the form \{'maps'",
    ),
    "a mean": ({"criterion": lambda z, f, y: z["maps"].mean(), "estimator": "layerwise"}, ConfigurationError, "for 1 images"),
    "no callable": ({"criterion": 3}, ConfigurationError, "criterion 3 is an object of type int; expected a name, a callable"),
    "kl of a dictionary": (
        {"criterion": "kl_to_float"},
        ConfigurationError,
        "returns a dict; expected mse_to_float, or",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused_before_anything_is(network, data, case, monkeypatch):
    arguments, error, words = REFUSED[case]
    monkeypatch.setattr("clado.api.steps.measure_tile", lambda bench, tile: pytest.fail("it was measured"))
    with pytest.raises(error, match=words):
        clado.measure(network, network.search_space(bits=(2, 4)), data, **arguments)


def test_targets_are_one_tensor_with_the_images_first(network, data):
    space = network.search_space(bits=(2, 4))
    for targets, words in ((data[1][:5], "shape .5, 2. for 12 images"), (None, "failed: ")):
        batch = data[0] if targets is None else (data[0], targets)
        with pytest.raises((DataError, ConfigurationError), match=words):
            clado.measure(network, space, batch, estimator="layerwise", criterion=distance)
    with pytest.raises(DataError, match="needs labels and the images have none"):
        clado.measure(network, space, data[0], estimator="layerwise", criterion=Criterion(distance, needs_targets=True))


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (lambda outputs, targets: 0.5, "metric <lambda> gives an object of type float for 12 images"),
        (lambda outputs: outputs, "metric <lambda> failed: TypeError"),
        (0.5, "metric 0.5 cannot be called"),
        ("no_such_package:iou", "metric 'no_such_package:iou': no module"),
    ],
)
def test_a_metric_that_fails_is_refused(network, data, metric, words):
    with pytest.raises(ConfigurationError, match=words):
        clado.evaluate(network, network.search_space(bits=(2, 4)).narrowest, data, metric=metric)


def test_an_ignored_class_of_dense_outputs_is_left_out_of_the_measurement():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()
    network = clado.Network(model, torch.zeros(1, 1, 6, 6))
    x, masks = torch.randn(8, 1, 6, 6), torch.randint(0, 3, (8, 6, 6), dtype=torch.uint8)
    masks[:, :2] = 255
    criterion, space = cross_entropy.over_classes(ignore_index=255), network.search_space(bits=(2, 4))
    result = clado.measure(network, space, (x, masks), estimator="layerwise", criterion=criterion)
    with torch.no_grad():
        expected = float(F.cross_entropy(network.model(x).double(), masks.long(), ignore_index=255))
    assert result.baseline == pytest.approx(expected, abs=tolerance.LOSS)
    with pytest.raises(DataError, match="targets from 0 to 255; expected 0 to 2, or -100 for what is ignored"):
        clado.measure(network, space, (x, masks), estimator="layerwise", criterion="cross_entropy")
