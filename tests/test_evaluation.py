"""Laws of evaluation: counts add up over any cut of the images, and are those of a plain computation."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from clado.data.images import MemorySlice
from clado.evaluation import Counts, count, count_each, evaluate_weights, evaluation_batches, per_image
from clado.network.network import Network
from clado.quantization.quantizers import WeightQuantizer
from clado.records.results import Accuracy, wilson
from tests.networks import Residual, build, images, labels, replaced_logits
from tests.tolerance import LOSS, assert_close_losses, of_no_change

pytestmark = pytest.mark.numeric

NUM_IMAGES, CLASSES = 45, 9


class Nine(Residual):
    """Nine classes, so that top-5 is not all of them."""

    def __init__(self) -> None:
        super().__init__(classes=CLASSES)


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(build(Nine), images(2))


@pytest.fixture(scope="module")
def weights(network) -> dict[int, torch.Tensor]:
    return {i: WeightQuantizer().fake_quantize(network.weights[i], 2) for i in (0, 2, 4)}


def slice_of(labelled: bool = True) -> MemorySlice:
    return MemorySlice(images(NUM_IMAGES), labels(NUM_IMAGES, CLASSES) if labelled else None, CLASSES)


def plain(network, weights) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the quantized and of the float module, in float64."""
    named = {network.layers[i].name: weight for i, weight in weights.items()}
    x = images(NUM_IMAGES)
    return tuple(replaced_logits(network.model, named_tensors, x).double().numpy() for named_tensors in (named, {}))


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def test_counts_are_those_of_a_plain_computation(network, weights):
    z, _ = plain(network, weights)
    y = labels(NUM_IMAGES, CLASSES).numpy()
    ranks = (z > z[np.arange(NUM_IMAGES), y][:, None]).sum(1)
    counts = count(network, weights, slice_of(), 0, NUM_IMAGES)
    assert (counts.num_images, counts.top1, counts.top5) == (NUM_IMAGES, int((ranks == 0).sum()), int((ranks < 5).sum()))
    assert 0 < counts.top1 < counts.top5 < NUM_IMAGES  # else the test could not fail
    assert_close_losses(counts.loss, -log_softmax(z)[np.arange(NUM_IMAGES), y].sum(), NUM_IMAGES)


def test_without_labels_the_loss_is_kl_to_the_float_network(network, weights):
    z, reference = plain(network, weights)
    p, q = log_softmax(reference), log_softmax(z)
    counts = count(network, weights, slice_of(labelled=False), 0, NUM_IMAGES)
    assert (counts.top1, counts.top5) == (None, None)
    assert_close_losses(counts.loss, (np.exp(p) * (p - q)).sum(), NUM_IMAGES)
    none = count(network, {}, slice_of(labelled=False), 0, NUM_IMAGES).loss
    assert none == pytest.approx(0, abs=NUM_IMAGES * of_no_change())


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("size", [1, 7, 44, 45, 1000])
@pytest.mark.parametrize("batch", [3, 128])
def test_counts_add_up_over_shards(network, weights, labelled, size, batch):
    data = slice_of(labelled)
    whole = count(network, weights, data, 0, NUM_IMAGES)
    parts = [count(network, weights, data, *part, batch_images=batch) for part in evaluation_batches(NUM_IMAGES, size)]
    total = sum(parts, Counts())
    assert (total.num_images, total.top1, total.top5) == (whole.num_images, whole.top1, whole.top5)
    assert_close_losses(total.loss, whole.loss, NUM_IMAGES)
    mean = whole.loss / NUM_IMAGES
    assert evaluate_weights(network, weights, data, batch).loss == pytest.approx(mean, rel=0, abs=LOSS * max(1, mean))


@pytest.mark.parametrize(("images", "size"), [(10, 3), (9, 3), (1, 5), (2500, 2500), (10_000, 2500)])
def test_shards_cover_every_image_once(images, size):
    assert [i for start, stop in evaluation_batches(images, size) for i in range(start, stop)] == list(range(images))
    assert all(0 < stop - start <= size for start, stop in evaluation_batches(images, size))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_hit_nothing(network, value):
    broken = {4: torch.full_like(network.weights[4], value)}
    data = MemorySlice(images(6), torch.zeros(6, dtype=torch.int64), CLASSES)
    assert count(network, broken, data, 0, 6).accuracy().top1 == 0.0
    assert count(network, broken, data, 0, 6).top5 == 0
    assert not per_image(network, broken, data)[1].any()


def test_accuracy_is_the_mean_and_nothing_is_made_up():
    accuracy = Counts(8, 2.0, 6, 7).accuracy()
    assert (accuracy.num_images, accuracy.loss, accuracy.top1, accuracy.top5) == (8, 0.25, 0.75, 0.875)
    assert Counts(8, 2.0).accuracy().top1 is None
    mixed = Counts(1, 1.0, 1, 1) + Counts(1, 1.0)
    assert (mixed.top1, mixed.top5, mixed.num_images) == (None, None, 2)


@pytest.mark.parametrize("classes", [2, 4])
def test_with_fewer_than_five_classes_every_image_is_a_top5_hit(classes):
    class Few(Residual):
        def __init__(self) -> None:
            super().__init__(classes=classes)

    few = Network(build(Few), images(2))
    data = MemorySlice(images(6), labels(6, classes), classes)
    assert count(few, {}, data, 0, 6).top5 == 6


def test_a_sum_of_no_shards_has_no_accuracy():
    assert sum([], Counts()) == Counts()
    assert Counts() + Counts(2, 1.0, 1, 2) == Counts(2, 1.0, 1, 2)


class Counted(MemorySlice):
    """Remembers which images were asked for."""

    def load(self, start, stop):
        self.requested = [*getattr(self, "requested", []), *range(start, stop)]
        return super().load(start, stop)


@pytest.mark.parametrize("labelled", [True, False])
def test_many_assignments_take_one_pass_and_count_the_same_bit_for_bit(network, weights, labelled):
    data = Counted(images(NUM_IMAGES), labels(NUM_IMAGES, CLASSES) if labelled else None, CLASSES)
    variants = [(network, weights), (network, {}), (network, {0: weights[0]})]
    each = count_each(variants, data, 3, NUM_IMAGES, batch_images=10)
    assert data.requested == list(range(3, NUM_IMAGES))
    assert each == [count(*variant, slice_of(labelled), 3, NUM_IMAGES, batch_images=10) for variant in variants]
    assert len({counts.loss for counts in each}) == 3


@pytest.mark.parametrize("size", [1, 7, 45])
def test_classes_add_up_to_the_whole(network, weights, size):
    y = labels(NUM_IMAGES, CLASSES).numpy()
    right = plain(network, weights)[0].argmax(1) == y
    expected = tuple((int(c), int((y == c).sum()), int(right[y == c].sum())) for c in np.unique(y))
    total = sum((count(network, weights, slice_of(), *part) for part in evaluation_batches(NUM_IMAGES, size)), Counts())
    assert total.classes == expected
    assert sum(hits for _, _, hits in expected) == total.top1
    assert count(network, weights, slice_of(labelled=False), 0, size).classes == ()


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (5, 5), (17, 20), (1, 1), (9431, 10_000), (38_075, 50_000)])
def test_the_interval_is_wilsons(hits, count):
    reference = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert wilson(hits / count, count) == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert Accuracy(count, 1.0, hits / count).top1_interval == wilson(hits / count, count)
    assert Accuracy(count, 1.0).top1_interval is None
