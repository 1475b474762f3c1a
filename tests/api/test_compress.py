"""From a module to a quantized module in one call: disjoint sets, a choice that does no harm, figures of other images."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import clado
from clado.api.compression import LEAST_IMAGES, SETS, split
from clado.criteria.kl_to_float import kl_to_float
from clado.data.images import MemorySlice
from clado.errors import ConfigurationError, DataError, InfeasibleError, NetworkError
from clado.records.results import CHOSEN
from tests import tolerance
from tests.networks import Residual, build, images, labels

NUM_IMAGES = 160
X, Y = images(NUM_IMAGES), labels(NUM_IMAGES)


def trained() -> nn.Module:
    """Random weights, but logits that differ: labels are the network's own classes, some of them wrong."""
    model = build(Residual)
    with torch.no_grad():
        model.head.weight *= 20
    return model


MODEL = trained()
with torch.no_grad():
    CLASSES = MODEL.eval()(X).argmax(1)
LABELS = torch.where(torch.arange(NUM_IMAGES) % 5 == 0, Y, CLASSES)


@pytest.fixture(scope="module")
def steps() -> list[tuple[int, int]]:
    return []


@pytest.fixture(scope="module")
def result(steps) -> clado.Compressed:
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=50)
    return clado.compress(MODEL, loader, average_bits=2.3, progress=lambda *now: steps.append(now))


def validation(result: clado.Compressed) -> tuple[torch.Tensor, torch.Tensor]:
    slices = split(MemorySlice(X, LABELS), (None,) * 4, result.seed)
    return slices.validation.load(0, len(slices.validation))


def test_the_module_keeps_the_budget_and_is_what_was_measured(result):
    assert result.average_bits <= 2.3
    assert result.size_bytes == result.space.size_bytes(result.assignment)
    x, y = validation(result)
    with torch.no_grad():
        logits, floats = result.module(x), MODEL(x)
    assert result.accuracy.num_images == len(x)
    assert result.accuracy.top1 == pytest.approx(float((logits.argmax(1) == y).double().mean()))
    assert result.float_accuracy.top1 == pytest.approx(float((floats.argmax(1) == y).double().mean()))
    assert result.agreement == pytest.approx(float((logits.argmax(1) == floats.argmax(1)).double().mean()))
    tolerance.assert_close_losses(result.accuracy.loss, float(nn.functional.cross_entropy(logits.double(), y)))
    tolerance.assert_close_losses(result.loss_measured, float(kl_to_float(logits, floats).mean()))
    moved = (logits.argmax(1) == y).double() - (floats.argmax(1) == y).double()
    assert result.drop_interval == pytest.approx(1.96 * float(moved.std()) / len(x) ** 0.5, rel=1e-4)


def test_nothing_measured_to_decide_is_better(result):
    """The chosen answer loses no more than uniform bits and layerwise, with and without corrections, on the selection images."""
    chosen = next(row for row in result.results if row.method == CHOSEN)
    assert chosen.assignment == result.assignment
    assert all(chosen.loss_deployed <= row.loss_deployed for row in result.results if row.method in ("uniform", "layerwise"))
    plain = result.assignment.with_corrections("none")
    if result.assignment.corrected == "all":
        slices = split(MemorySlice(X, LABELS), (None,) * 4, result.seed)
        x, _ = slices.selection.load(0, len(slices.selection))
        assert chosen.loss_deployed <= clado.evaluate(clado.Network(MODEL, X[:1]), plain, x).loss


def test_progress_counts_each_phase_to_its_end(result, steps):
    begins = [k for k, step in enumerate(steps) if k == 0 or step[0] <= steps[k - 1][0] or step[1] != steps[k - 1][1]]
    phases = [steps[a:b] for a, b in zip(begins, [*begins[1:], len(steps)], strict=True)]
    assert len(phases) == 4
    assert all(phase[-1][0] == phase[-1][1] for phase in phases)
    assert [done for done, _ in phases[0]] == [1, 2, 3, 4, 5]  # layers


def test_the_module_given_is_not_changed(result):
    fresh = trained()
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in MODEL.state_dict().items())
    assert all(module.training is False for module in result.module.modules())


def test_it_says_what_it_is(result):
    text = repr(result)
    assert f"{100 * result.accuracy.top1:.1f} %" in text
    assert f"± {100 * result.drop_interval:.1f} points" in text
    assert "40 images" in text
    for shown in (str(result), result._repr_html_()):
        assert all(f"{result.num_images[name]} {name}" in shown for name in SETS)
    assert list(result.to_frame()["bits"]) == list(result.assignment.bits)


def test_the_packed_file_is_the_module(result, tmp_path):
    size = result.save(str(tmp_path / "network.safetensors"))
    assert size.weight_bytes == result.size_bytes
    loaded, x = clado.load_packed(tmp_path / "network.safetensors", MODEL), images(4, seed=9)
    with torch.no_grad():
        tolerance.assert_close(loaded(x), result.module(x))  # the layout of the weights may be another


def test_it_works_without_labels_and_quantizes_inputs():
    result = clado.compress(MODEL, X, size_bytes=200, activation_bits=(8,), corrections=(), estimator="layerwise")
    assert result.size_bytes <= 200
    assert result.accuracy.top1 is None
    assert result.drop_interval is None
    # the same divergence in two ways: a sum of two products for each of four classes
    assert result.loss_measured == pytest.approx(result.accuracy.loss, rel=0, abs=tolerance.of_sum(2 * 4))
    assert result.loss_predicted >= 0
    assert "same top class as the float network on" in repr(result)
    assert set(result.assignment.activation_bits) == {8}


def test_several_limits_hold_together():
    network = clado.Network(MODEL, X[:1])
    macs = sum(layer.macs for layer in network.layers)
    result = clado.compress(network, X, average_bits=4, bops=macs * 8 * 3, corrections=(), estimator="layerwise")
    assert result.average_bits <= 4
    operations = sum(layer.macs * bits * 8 for layer, bits in zip(network.layers, result.assignment.bits, strict=True))
    assert operations <= macs * 8 * 3


@pytest.mark.parametrize("counts", [(None,) * 4, (40, None, None, None), (33, 34, 35, 36), (1, 1, 1, 1)])
def test_the_sets_are_disjoint_and_drawn_by_the_seed(counts):
    numbered = MemorySlice(torch.arange(200.0).reshape(200, 1, 1, 1))

    def drawn(seed: int) -> list[list[float]]:
        slices = split(numbered, counts, seed)
        return [getattr(slices, name).load(0, 200)[0].flatten().tolist() for name in SETS]

    sets = drawn(0)
    all_numbers = [number for numbers in sets for number in numbers]
    assert len(set(all_numbers)) == len(all_numbers)
    assert all(count is None or len(numbers) == count for count, numbers in zip(counts, sets, strict=True))
    assert counts[-1] is not None or len(all_numbers) == 200
    assert drawn(0) == sets
    assert drawn(1) != sets
    assert all_numbers != sorted(all_numbers)


@pytest.mark.parametrize(
    ("num_images", "counts", "needed"),
    [(127, (None,) * 4, 128), (0, (None,) * 4, 128), (100, (64, None, 4, 4), 104), (10, (4, 4, 4, 4), 16)],
)
def test_too_few_images_are_refused_with_the_number_needed(num_images, counts, needed):
    with pytest.raises(DataError, match=rf"has {num_images} images; expected {needed} or more.* for calibration"):
        split(MemorySlice(torch.zeros(num_images, 1, 1, 1)), counts, 0)
    split(MemorySlice(torch.zeros(needed, 1, 1, 1)), counts, 0)


def test_large_data_leave_all_other_images_to_validation():
    slices = split(MemorySlice(torch.zeros(5000, 1, 1, 1)), (None,) * 4, 0)
    assert [len(getattr(slices, name)) for name in SETS] == [256, 256, 256, 5000 - 3 * 256]
    assert np.gcd(LEAST_IMAGES, 4) == 4


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: clado.compress(clado.Network(MODEL, X[:1]), X, average_bits=3, fixed=["head.*"]),
            ConfigurationError, "which has its fixed layers",
        ),
        (lambda: clado.compress(MODEL, X), ConfigurationError, "there is no limit.*average_bits=3.0"),
        (lambda: clado.compress(MODEL, X, average_bits="3"), ConfigurationError, "'3' of type str; expected a number"),
        (lambda: clado.compress(MODEL, X, average_bits=1), InfeasibleError, "reaches from"),
        (lambda: clado.compress(MODEL, X[:100], average_bits=3), DataError, "expected 128 or more"),
        (lambda: clado.compress("resnet18", X, average_bits=3), NetworkError, "model is a str; expected a torch.nn.Module"),
        (lambda: clado.compress(MODEL, X, average_bits=3, validation_images=0), ConfigurationError, "validation_images is 0"),
        (
            lambda: clado.compress(MODEL, X, average_bits=3, criterion="cross_entropy", corrections=()),
            DataError, "cross_entropy needs labels",
        ),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
