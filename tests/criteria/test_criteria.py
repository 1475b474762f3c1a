"""Every criterion keeps the contract; KL against float64 as a textbook has it: small losses, laws, and what is not finite."""

import re

import pytest
import torch

from clado import criteria
from clado.criteria import cross_entropy, kl_to_float
from clado.errors import ConfigurationError, DataError
from clado.network.outputs import Outputs
from clado.plugins import available
from tests import tolerance
from tests.contracts.criterion import LABELS, MASKS, NUM_CLASSES, NUM_SAMPLES, CriterionContract, dense, nested

pytestmark = pytest.mark.numeric


@pytest.fixture(autouse=True, params=["numpy", "torch"])
def expm1_of(request, monkeypatch) -> None:
    """Every law holds with either library's exponential, whichever is the faster one here."""
    monkeypatch.setattr(kl_to_float, "NUMPY_IS_FASTER", request.param == "numpy")


class TestKlToFloat(CriterionContract):
    name = "kl_to_float"
    forms = ("logits", "dense")


class TestCrossEntropy(CriterionContract):
    name = "cross_entropy"
    forms = ("logits", "dense")


class TestMseToFloat(CriterionContract):
    name = "mse_to_float"


class TestCosineToFloat(CriterionContract):
    name = "cosine_to_float"


def test_every_criterion_keeps_the_contract():
    assert {test.name for test in CriterionContract.__subclasses__()} == set(available("criteria"))


def test_a_wrong_name_is_answered_with_the_valid_ones():
    with pytest.raises(ConfigurationError, match=r"unknown criterion 'kl'; expected one of cosine_to_float, cross_entropy"):
        criteria.criterion_of("kl")


def logits(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def textbook(z: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    p, q = f.double().log_softmax(-1), z.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def rounding(z: torch.Tensor, f: torch.Tensor) -> float:
    """Bound of a loss's error: the largest difference of logits is rounded four times."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    return 4 * tolerance.eps(dtype) * float((z.double() - f.double()).abs().max())


@pytest.mark.parametrize("shift", [0.0, 3.0, -40.0])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("scale", [1e-3, 1e-2, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_losses_have_their_digits_whatever_their_size(classes, scale, sharpness, shift):
    f = logits(6, classes, scale=sharpness)
    z = f + logits(5, 6, classes, scale=scale, seed=1) + shift
    actual, expected = criteria.bind("kl_to_float", f, None)(z), textbook(z, f)
    assert actual.dtype == torch.float64
    assert float((actual - expected).abs().max()) <= rounding(z, f)
    # gaps of about √(2 loss) are off by 2 eps (1 + |shift|): by less than a thousandth of a loss above this
    significant = expected > 8 * (1e3 * tolerance.eps() * (1 + abs(shift))) ** 2
    assert float(((actual - expected).abs() / expected)[significant].max() if significant.any() else 0.0) < 1e-3


def test_equal_logits_have_no_loss_and_no_loss_is_negative():
    f = logits(7, 100, scale=4.0)
    criterion = criteria.bind("kl_to_float", f, None)
    assert torch.equal(criterion(f), torch.zeros(7, dtype=torch.float64))
    for scale in (1e-8, 1e-6, 1e-4):
        assert bool((criterion(f + logits(3, 7, 100, scale=scale, seed=2)) >= 0).all())


def test_rows_have_the_losses_they_have_alone_and_again():
    f = logits(16, 1000)
    z = f + logits(40, 16, 1000, scale=0.1, seed=3)
    criterion = criteria.bind("kl_to_float", f, None)
    actual = criterion(z)
    assert torch.equal(actual, criterion(z))
    torch.testing.assert_close(actual, torch.stack([criterion(row) for row in z]), rtol=0, atol=rounding(z, f))


def test_gaps_that_overflow_are_computed_and_what_is_not_finite_stays_so():
    f = logits(4, 10)
    z = f.expand(6, 4, 10).clone()
    z[0, 0, 3] += 500.0
    z[1, 1] *= 1e4
    z[2, 2, 0] = torch.nan
    z[3, 3, 1] = torch.inf
    z[4, 0, 1] = -torch.inf
    actual, expected = criteria.bind("kl_to_float", f, None)(z), textbook(z, f)
    assert torch.equal(actual.isfinite(), expected.isfinite())
    # gaps whose exponential overflows are float64; other losses are zero
    off = tolerance.of_sum(10, torch.float64) * float(z.nan_to_num(posinf=0.0, neginf=0.0).abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=off, equal_nan=True)
    assert [int((~row.isfinite()).sum()) for row in actual] == [0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_of_logits_count_as_they_are(dtype):
    f, z = logits(3, 10).to(dtype), logits(2, 3, 10, seed=4).to(dtype)
    torch.testing.assert_close(criteria.bind("kl_to_float", f, None)(z), textbook(z, f), rtol=0, atol=rounding(z, f))


def test_gradients_are_those_of_the_textbook():
    f = logits(3, 10)
    z = logits(3, 10, seed=5).requires_grad_()
    actual, expected = (
        torch.autograd.grad(loss(z).sum(), z)[0] for loss in (criteria.bind("kl_to_float", f, None), lambda x: textbook(x, f))
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance.eps())  # within ±1, and cast to float32 once


@pytest.mark.parametrize("name", ["kl_to_float", "cross_entropy"])
def test_the_brier_score_is_least_where_the_criterion_is_and_bounded_where_that_is_not(name):
    f, labels = logits(50, 10, scale=3.0), torch.arange(50) % 10
    certain = 1e4 * torch.nn.functional.one_hot(labels, 10).double()
    ideal = f if name == "kl_to_float" else certain
    assert float(criteria.brier(name, ideal, f, labels).max()) == 0.0
    wrong = certain.roll(1, dims=-1)
    for z in (logits(50, 10, seed=1), 50 * logits(50, 10, seed=2), wrong):
        actual = criteria.brier(name, z, f, labels)
        p = f.double().softmax(-1) if name == "kl_to_float" else torch.nn.functional.one_hot(labels, 10)
        expected = ((z.double().softmax(-1) - p) ** 2).sum(-1)
        torch.testing.assert_close(actual, expected, rtol=0, atol=2 * tolerance.of_sum(10, torch.float64))
        assert 0 < float(actual.min()) <= float(actual.max()) <= 2 * (1 + tolerance.of_sum(10, torch.float64))
    assert float(criteria.bind(name, f, labels)(wrong).max()) > 1000


def test_hits_are_of_the_float_networks_class_or_the_label_and_none_where_logits_are_not_finite():
    z = torch.tensor([[1.0, 2.0], [2.0, 1.0], [torch.nan, 1.0], [torch.inf, 1.0]])
    f, labels = torch.tensor([[0.0, 1.0]] * 2 + [[1.0, 0.0]] * 2), torch.tensor([0, 0, 0, 0])
    assert criteria.hits("kl_to_float", z, f, None).tolist() == [True, False, False, False]
    assert criteria.hits("cross_entropy", z, f, labels).tolist() == [False, True, False, False]


@pytest.mark.parametrize("score", [criteria.brier, criteria.hits])
def test_scores_of_labels_need_labels(score):
    with pytest.raises(DataError, match="cross_entropy needs labels"):
        score("cross_entropy", logits(2, 3), logits(2, 3), None)


DENSE = Outputs.of(dense(), NUM_SAMPLES)
NESTED = Outputs.of(nested(), NUM_SAMPLES)


def test_dense_criteria_are_means_of_the_classifiers_over_positions_that_count():
    z, f = DENSE.packed(dense(seed=1)), DENSE.packed(dense())
    for name in ("kl_to_float", "cross_entropy"):
        losses = criteria.packed(name, DENSE).of(f, MASKS)(z)
        for n in range(NUM_SAMPLES):
            counted = MASKS[n].flatten() != -100
            columns, floats = (x[n].reshape(NUM_CLASSES, -1).T[counted] for x in (z, f))
            labels = MASKS[n].flatten()[counted]
            expected = float(criteria.bind(name, floats, labels)(columns).mean()) if len(labels) else 0.0
            assert abs(float(losses[n]) - expected) <= rounding(z, f)


def test_an_ignored_position_changes_nothing_whatever_is_there():
    f, targets = dense(), MASKS.clone().masked_fill(MASKS == -100, 255)
    z = dense(seed=1)
    other = z + 100 * (targets == 255).unsqueeze(1)
    for module in (kl_to_float, cross_entropy):
        criterion = module.over_classes(ignore_index=255)
        assert torch.equal(criterion.loss(z, f, targets), criterion.loss(other, f, targets))
        assert float(criterion.loss(z, f, targets)[0]) == 0.0  # all of the first sample is ignored
        root = criterion.curvature(f, targets)
        assert torch.equal(root(z)[targets.flatten(1) == 255], torch.zeros(7, NUM_CLASSES, dtype=torch.float64))


def test_kl_without_targets_counts_every_position():
    z, f = DENSE.packed(dense(seed=1)), DENSE.packed(dense())
    criterion = criteria.packed("kl_to_float", DENSE)
    assert torch.equal(criterion.of(f, None)(z), criterion.of(f, MASKS.clamp_min(0))(z))
    assert torch.equal(criterion.of(f, None)(z), criterion.of(f, torch.zeros(NUM_SAMPLES, 4))(z))  # targets of something else


@pytest.mark.parametrize(
    ("name", "outputs", "flat", "targets", "error", "words"),
    [
        ("kl_to_float", NESTED, NESTED.packed(nested()), None, ConfigurationError, "one tensor .N, C, ....* returns a dict"),
        ("cross_entropy", NESTED, NESTED.packed(nested()), MASKS, ConfigurationError, "one tensor .N, C, ....* returns a dict"),
        (
            "cross_entropy",
            DENSE,
            DENSE.packed(dense()),
            LABELS,
            DataError,
            r"targets \(6,\) .* class numbers \(6, 2, 3\)",
        ),
        ("cross_entropy", DENSE, DENSE.packed(dense()), MASKS + 1, DataError, "from -99 to 5; expected 0 to 4, or -100"),
    ],
)
def test_outputs_and_targets_that_do_not_fit_are_refused(name, outputs, flat, targets, error, words):
    with pytest.raises(error, match=words):
        criteria.packed(name, outputs).of(flat, targets)(flat)


def off(outputs, float_outputs, targets):
    """A user-defined loss: it grows with each part of nested outputs."""
    parts = [(outputs["maps"] - float_outputs["maps"]).abs().flatten(1).sum(1)]
    return parts[0] + (outputs["rest"][1] - float_outputs["rest"][1]).square()


def test_a_loss_of_ones_own_gets_outputs_in_the_networks_form_and_float64():
    flat, floats = NESTED.packed(nested(seed=1)), NESTED.packed(nested())
    calls = []

    def loss(*arguments):
        calls.append(arguments)
        return off(*arguments)

    losses = criteria.packed(loss, NESTED).of(floats, MASKS)(torch.stack([flat, floats]))
    expected = off(nested(seed=1), nested(), None)
    torch.testing.assert_close(losses[0], expected.double(), rtol=0, atol=tolerance.of_sum(7) * 20)
    assert losses[1].tolist() == [0.0] * NUM_SAMPLES
    for outputs, float_outputs, targets in calls:
        assert outputs.keys() == float_outputs.keys() == nested().keys()
        assert outputs["rest"][0].shape == (NUM_SAMPLES, 4)
        assert outputs["maps"].dtype == float_outputs["maps"].dtype == torch.float64
        assert targets is MASKS
    assert torch.equal(calls[0][0]["maps"].float(), nested(seed=1)["maps"])


FAULTS = {
    "a number": (
        lambda z, f, y: z["maps"].sum(),
        "gives a tensor () of torch.float64 for 6 images; expected one number",
    ),
    "nothing": (lambda z, f, y: None, "gives None for 6 images"),
    "a key error": (lambda z, f, y: z["mask"], "failed: KeyError: 'mask'; outputs have the form {'maps': ('N', 2, 3)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_loss_of_ones_own_that_fails_is_named_with_what_it_was_given(fault):
    loss, words = FAULTS[fault]
    flat = NESTED.packed(nested())
    with pytest.raises(ConfigurationError, match=re.escape(f"criterion <lambda> {words}")):
        criteria.packed(loss, NESTED).refuse_unfit(flat, None)


@pytest.mark.parametrize("curvature", [lambda f, y: lambda u: 1.0, lambda f, y: lambda u: u["maps"].sum(0), lambda f: None])
def test_a_curvature_that_fails_is_named_as_well(curvature):
    flat = NESTED.packed(nested())
    with pytest.raises(ConfigurationError, match="the curvature of criterion off"):
        criteria.packed(criteria.Criterion(off, curvature), NESTED).refuse_unfit(flat, None)


@pytest.mark.parametrize("wrong", [3, None, [off], criteria.Criterion])
def test_what_is_no_criterion_is_refused(wrong):
    with pytest.raises(ConfigurationError, match="expected a name, a callable"):
        criteria.criterion_of(wrong)
