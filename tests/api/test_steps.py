"""The README's Python path, on a small network: measure, solve, evaluate, in one process without an orchestrator."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import clado
from clado.criteria.cross_entropy import cross_entropy
from clado.criteria.kl_to_float import kl_to_float
from clado.errors import CladoError, ConfigurationError, DataError, InfeasibleError, NetworkError
from tests import tolerance
from tests.contracts.correction import STATISTICS
from tests.contracts.estimator import ENTRY
from tests.networks import Residual, build, images, labels, rebuilt, rematched, replaced_logits

NUM_IMAGES = 12


@pytest.fixture(scope="module")
def network() -> clado.Network:
    return clado.Network(build(Residual), images(2))


@pytest.fixture(scope="module")
def space(network) -> clado.SearchSpace:
    return network.search_space(bits=(2, 4, 8))


def batches(labelled: bool):
    x, y = images(NUM_IMAGES), labels(NUM_IMAGES)
    return [(x[k : k + 5], y[k : k + 5]) if labelled else x[k : k + 5] for k in range(0, NUM_IMAGES, 5)]


DATA = {
    "one tensor": lambda: images(NUM_IMAGES),
    "a pair": lambda: (images(NUM_IMAGES), labels(NUM_IMAGES)),
    "a list of batches": lambda: batches(False),
    "a list of labelled batches": lambda: batches(True),
    "a generator": lambda: (batch for batch in batches(True)),
    "a loader": lambda: DataLoader(TensorDataset(images(NUM_IMAGES), labels(NUM_IMAGES)), batch_size=5),
    "a loader without labels": lambda: DataLoader(TensorDataset(images(NUM_IMAGES)), batch_size=5),
}


def test_measure_solve_evaluate(network, space):
    data = (images(NUM_IMAGES), labels(NUM_IMAGES))
    matrix = clado.measure(network, space, images(NUM_IMAGES), estimator="gauss_newton", criterion="kl_to_float")
    solution = clado.solve(matrix, average_bits=3.0)
    report = clado.evaluate(network, solution.assignment, data)
    assert space.average_bits(solution.assignment) <= 3.0
    assert str(solution.status) == "optimal"
    assert solution.objective == pytest.approx(matrix.predicted_increase(solution.assignment))
    assert solution.bound <= solution.objective + 1e-9
    assert solution.gap <= 1e-4
    assert solution.seconds >= 0
    weights = {
        layer.name: clado.WeightQuantizer().fake_quantize(network.weights[i], bits, layer.channel_axis)
        for i, (layer, bits) in enumerate(zip(space.layers, solution.assignment.bits, strict=True))
    }
    z = replaced_logits(network.model, weights, data[0])
    assert report.top1 == float((z.argmax(1) == data[1]).double().mean())
    tolerance.assert_close_losses(report.loss, float(cross_entropy(z, data[1]).mean()))
    assert report.num_images == NUM_IMAGES


@pytest.mark.parametrize("data", DATA.values(), ids=list(DATA))
def test_the_form_of_the_data_changes_no_number(network, space, data):
    expected = clado.measure(network, space, images(NUM_IMAGES), "layerwise")
    assert clado.measure(network, space, data(), "layerwise").values.tobytes() == expected.values.tobytes()


@pytest.mark.parametrize("data", DATA.values(), ids=list(DATA))
def test_labels_give_accuracy_and_none_gives_kl(network, space, data):
    report = clado.evaluate(network, space.narrowest, data())
    labelled = data not in (DATA["one tensor"], DATA["a list of batches"], DATA["a loader without labels"])
    assert (report.top1 is not None) == (report.top5 is not None) == labelled
    assert report.num_images == NUM_IMAGES
    same = clado.evaluate(network, space.narrowest, DATA["a pair" if labelled else "one tensor"]())
    assert report.top1 == same.top1
    tolerance.assert_close_losses(report.loss, same.loss)


@pytest.mark.parametrize("estimator", ["pairwise", "layerwise", "gauss_newton"])
@pytest.mark.parametrize("criterion", ["kl_to_float", "cross_entropy"])
def test_every_estimator_and_criterion_measures(network, space, estimator, criterion):
    told = []
    matrix = clado.measure(
        network, space, DATA["a pair"](), estimator, criterion, num_blocks=4, progress=lambda *now: told.append(now)
    )
    assert matrix.values.shape == (space.num_options,) * 2
    assert (matrix.estimator, matrix.criterion, matrix.num_samples) == (estimator, criterion, NUM_IMAGES)
    total = told[0][1]
    assert told == [(k + 1, total) for k in range(total)]
    assert total % 4 == 0


@pytest.mark.parametrize("estimator", ["gauss_newton", "hawq", "fisher"])  # forwards; second and first derivatives
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_changes_no_number(network, space, estimator, mode):
    expected = clado.measure(network, space, images(6), estimator)
    with mode():
        actual = clado.measure(network, space, images(6), estimator)
    assert actual.values.tobytes() == expected.values.tobytes()


def test_the_blocks_change_a_matrix_by_rounding_only(network, space):
    few, many = (clado.measure(network, space, images(NUM_IMAGES), "pairwise", num_blocks=n) for n in (1, 12))
    tolerance.assert_close(few.values, many.values, ENTRY, least=0.0)
    assert clado.measure(network, space, images(NUM_IMAGES), "layerwise", num_blocks=99).num_samples == NUM_IMAGES


def test_the_network_is_left_as_it_was(space):
    model = build(Residual).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = clado.Network(model, images(1))
    matrix = clado.measure(network, network.search_space((2, 4)), images(4))
    clado.evaluate(network, clado.solve(matrix, average_bits=3).assignment, images(4))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_both_budgets_hold_together(network, space):
    matrix = clado.measure(network, space, images(4), "layerwise")
    limit = space.size_bytes(space.narrowest) + 20
    solution = clado.solve(matrix, average_bits=8.0, size_bytes=limit, solver="exhaustive")
    assert space.size_bytes(solution.assignment) <= limit


def none_finite():
    x = images(NUM_IMAGES)
    x[3, 0, 0, 0] = float("nan")
    return x


SHIPPED = 2**0.5 * 2 * STATISTICS  # a loss's slope in the logits is at most √2; they move with the statistics of batch norms
CORRECTIONS = ("output_statistics", "batchnorm_reestimation")


@pytest.fixture(scope="module")
def prepared(network, space):
    return clado.prepare(network, space, images(40, seed=3), corrections=CORRECTIONS)


def shipped_logits(prepared, assignment, x):
    """The reference: the module rebuilt with the assignment's layers, its batch norms matched on the calibration images."""
    space = prepared.space
    options = {space.layers[i].name: space.option(i, bits) for i, bits in enumerate(assignment.bits)}
    model = rebuilt(prepared.network.model, {name: prepared.layers[k] for name, k in options.items()})
    return replaced_logits(model, rematched(prepared.network.model, model, images(40, seed=3)), x)


def test_prepare_measure_solve_evaluate(network, space, prepared):
    data = (images(NUM_IMAGES), labels(NUM_IMAGES))
    matrix = clado.measure(network, space, images(NUM_IMAGES), "pairwise", prepared=prepared)
    solution = clado.solve(matrix, average_bits=3.0)
    report = clado.evaluate(network, solution.assignment, data, prepared=prepared)
    z = shipped_logits(prepared, solution.assignment, data[0])
    assert report.top1 == float((z.argmax(1) == data[1]).double().mean())
    assert report.loss == pytest.approx(float(cross_entropy(z, data[1]).mean()), rel=0, abs=SHIPPED)
    plain = clado.evaluate(network, solution.assignment, data)
    assert plain.kl != pytest.approx(report.kl, rel=0.1)


def test_the_matrix_is_that_of_the_prepared_layers(network, space, prepared):
    x = images(NUM_IMAGES)
    matrix = clado.measure(network, space, x, "layerwise", prepared=prepared)
    floats = replaced_logits(network.model, {}, x)
    for k, (i, _, _) in enumerate(space.options):
        z = replaced_logits(rebuilt(network.model, {space.layers[i].name: prepared.layers[k]}), {}, x)
        loss = float(kl_to_float(z, floats).mean())  # of the probe: final corrections come with an assignment
        # the slope of a loss of ℓ is about √(2ℓ)
        assert matrix.values[k, k] == pytest.approx(2 * loss, rel=0, abs=4 * tolerance.FORWARD * (2 * loss) ** 0.5)
    plain = clado.measure(network, space, x, "layerwise")
    assert float(np.abs(matrix.values - plain.values).max()) > 0.1 * float(plain.values.max())


def test_without_labels_what_ships_is_compared_with_the_float_network(network, space, prepared):
    x = images(NUM_IMAGES)
    report = clado.evaluate(network, space.narrowest, x, prepared=prepared)
    z, floats = shipped_logits(prepared, space.narrowest, x), replaced_logits(network.model, {}, x)
    assert report.loss == pytest.approx(float(kl_to_float(z, floats).mean()), rel=0, abs=SHIPPED)


def test_without_corrections_preparing_changes_no_number(network, space):
    prepared, x = clado.prepare(network, space), images(NUM_IMAGES)
    for estimator in ("pairwise", "gauss_newton"):
        matrices = [clado.measure(network, space, x, estimator, prepared=ready) for ready in (None, prepared)]
        assert matrices[0].values.tobytes() == matrices[1].values.tobytes()
    assert clado.evaluate(network, space.widest, x) == clado.evaluate(network, space.widest, x, prepared=prepared)


@pytest.mark.parametrize("data", [data for name, data in DATA.items() if "label" in name or name == "a pair"])
def test_labels_and_form_of_the_calibration_data_do_not_matter(network, space, data):
    both = [clado.prepare(network, space, d(), corrections=("batchnorm_reestimation",)) for d in (DATA["one tensor"], data)]
    assert all(torch.equal(torch.cat(ready.images), images(NUM_IMAGES)) for ready in both)


def test_activations_are_part_of_what_ships(network):
    space = network.search_space((4, 8)).with_activations((4, 8))
    prepared = clado.prepare(network, space, images(40, seed=3), activation_range="percentile")
    x = images(NUM_IMAGES)
    matrix = clado.measure(network, space, x, "gauss_newton", prepared=prepared)
    assert matrix.values.shape == (20, 20)
    assignment = clado.solve(matrix, average_bits=6.0).assignment
    assert set(assignment.activation_bits) <= {4, 8}
    layers = {
        layer.name: prepared.layers[space.option(i, *pair)]
        for i, (layer, pair) in enumerate(zip(space.layers, assignment.pairs, strict=True))
    }
    expected = kl_to_float(replaced_logits(rebuilt(network.model, layers), {}, x), replaced_logits(network.model, {}, x)).mean()
    assert clado.evaluate(network, assignment, x, prepared=prepared).loss == pytest.approx(float(expected), rel=1e-3)


A8 = (8,)
NETWORK_ERRORS = {
    "empty data": (lambda n, s: clado.measure(n, s, []), DataError, "empty"),
    "a read iterator": (lambda n, s: clado.measure(n, s, iter(())), DataError, "empty"),
    "wrong shape": (lambda n, s: clado.measure(n, s, images(4, size=6)), DataError, r"\(1, 6, 6\); expected \(1, 8, 8\)"),
    "a NaN": (lambda n, s: clado.measure(n, s, none_finite()), DataError, "first at index 3"),
    "labels too high": (lambda n, s: clado.evaluate(n, s.widest, (images(4), labels(4) + 4)), DataError, r"0\.\.3"),
    "labels below 0": (lambda n, s: clado.measure(n, s, (images(4), labels(4) - 4), "layerwise"), DataError, "at least 0"),
    "no labels": (lambda n, s: clado.measure(n, s, images(4), criterion="cross_entropy"), DataError, "kl_to_float"),
    "criterion": (lambda n, s: clado.measure(n, s, images(4), criterion="kl"), ConfigurationError, "one of cosine_to"),
    "estimator": (lambda n, s: clado.measure(n, s, images(4), "pair_wise"), ConfigurationError, "did you mean 'pairwise'"),
    "quantizer": (lambda n, s: clado.WeightQuantizer("max"), ConfigurationError, "minmax"),
    "bits": (lambda n, s: n.search_space((4, 2)), ConfigurationError, "ascending"),
    "wide bits": (lambda n, s: n.search_space((2, 17)), ConfigurationError, "16"),
    "another network's": (lambda n, s: clado.evaluate(n, clado.Assignment((2, 4)), images(4)), NetworkError, "2 layers"),
    "bits of nothing": (lambda n, s: clado.evaluate(n, clado.Assignment((0,) * 5), images(4)), ConfigurationError, "holds 0"),
    "no images at once": (lambda n, s: clado.measure(n, s, images(4), batch_images=0), ConfigurationError, "at least 1"),
    "prepared for other bits": (
        lambda n, s: clado.measure(n, n.search_space((3, 5)), images(4), prepared=clado.prepare(n, s)),
        ConfigurationError, "prepared belongs to another space"
    ),
    "prepared of another network": (
        lambda n, s: clado.measure(n, s, images(4), prepared=clado.prepare(clado.Network(build(Residual), images(2)), s)),
        ConfigurationError, "prepared belongs to another network"
    ),
    "a quantizer beside what is prepared": (
        lambda n, s: clado.evaluate(n, s.widest, images(4), prepared=clado.prepare(n, s), quantizer=clado.WeightQuantizer()),
        ConfigurationError, "prepared has a quantizer already"
    ),
    "an unknown correction": (
        lambda n, s: clado.prepare(n, s, images(4), corrections=("bias",)), ConfigurationError, "expected one of .*gptq"
    ),
    "an unknown range": (
        lambda n, s: clado.prepare(n, s, images(4), activation_range="max"), ConfigurationError, "expected one of minmax"
    ),
    "no calibration": (lambda n, s: clado.prepare(n, s, corrections=("gptq",)), DataError, "gptq need calibration images"),
    "too little calibration": (
        lambda n, s: clado.prepare(n, s, images(4), corrections=("output_statistics",)), DataError, "calibration_images: 32"
    ),
    "calibration of another shape": (lambda n, s: clado.prepare(n, s, images(4, size=6)), DataError, r"expected \(1, 8, 8\)"),
    "the space of another network": (
        lambda n, s: clado.measure(n, clado.Network(n.model, images(2), fixed=["head.*"]).search_space(), images(4)),
        ConfigurationError, "another network; they differ in head.weight"
    ),
    "activations without calibration": (
        lambda n, s: clado.measure(n, s.with_activations(A8), images(4)), DataError, "activations need calibration images"
    ),
    "activation bits without their grids": (
        lambda n, s: clado.evaluate(n, s.with_activations(A8).widest, images(4)), ConfigurationError, "expected prepared="
    ),
    "too small a budget": (
        lambda n, s: clado.solve(clado.measure(n, s, images(4), "layerwise"), average_bits=1.5), InfeasibleError, "2"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), NETWORK_ERRORS.values(), ids=list(NETWORK_ERRORS))
def test_errors_say_what_is_wrong(network, space, call, kind, message):
    with pytest.raises(kind, match=message) as caught:
        call(network, space)
    assert isinstance(caught.value, CladoError)


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(6, 10)),
        (nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 4)), torch.randn(6, 1, 3, 3, 3)),
    ],
    ids=["features", "volumes"],
)
def test_images_may_be_vectors_or_volumes(model, example):
    network = clado.Network(model.eval(), example[:2])
    space = network.search_space((2, 8))
    for data in (example, (example, labels(6)), [(example[:3], labels(3)), (example[3:], labels(3))]):
        solution = clado.solve(clado.measure(network, space, data), average_bits=4)
        assert clado.evaluate(network, solution.assignment, data).num_images == 6
    with pytest.raises(DataError, match=r"expected .*\(N, "):
        clado.measure(network, space, example[0, 0])


def test_names_are_loaded_when_they_are_used():
    assert set(clado.__all__) <= set(dir(clado))
    assert all(getattr(clado, name) is not None for name in clado.__all__)
    from clado.measuring.measurements import measure_tile

    assert callable(measure_tile)
    assert clado.measure.__name__ == "measure"
    with pytest.raises(AttributeError, match="no attribute 'mesure'"):
        clado.mesure  # noqa: B018
    script = "import clado, sys; print(sorted({'torch', 'numpy', 'yaml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"
