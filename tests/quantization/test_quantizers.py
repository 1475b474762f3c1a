"""Every quantizer keeps the contract; each does what its name says."""

import pytest
import torch

from clado.errors import ConfigurationError
from clado.grids import ActivationGrid, Codes
from clado.plugins import available
from clado.quantization.quantizers import WeightQuantizer, percentile, range_of
from tests.contracts.quantizer import MODES, QuantizerContract, weight
from tests.tolerance import eps, of_sum

pytestmark = pytest.mark.numeric


def half_a_step(bits: int) -> float:
    """In steps: what rounding to nearest may move a value by, whose position is a float32 of up to 2^bits."""
    return 0.5 + 2**bits * eps()


class TestMinMax(QuantizerContract):
    name = "minmax"

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_error_is_at_most_half_a_step(self, bits):
        grid = WeightQuantizer("minmax", True, True).grid(weight(), bits)
        assert bool(((grid.fake_quantize(weight()) - weight()).abs() <= grid.scale * half_a_step(bits)).all())


class TestMse(QuantizerContract):
    name = "mse"

    @MODES
    @pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
    def test_error_is_not_above_minmax(self, bits, per_channel, symmetric):
        errors = [
            float((WeightQuantizer(name, per_channel, symmetric).fake_quantize(weight(), bits) - weight()).square().sum())
            for name in ("mse", "minmax")
        ]
        # sums of float32 choose, of squares of errors that are off by eps · 2^bits of half a step
        assert errors[0] <= errors[1] * (1 + 2 * of_sum(weight().numel()) + 8 * 2**bits * eps())

    def test_range_is_near_the_best_of_a_fine_search(self):
        w = torch.randn(1, 400, generator=torch.Generator().manual_seed(3))
        scales = torch.linspace(0.05, 3, 3000)
        best = min(float(((w / s).round().clamp(-1, 1) * s - w).square().sum()) for s in scales)
        error = float((WeightQuantizer("mse").fake_quantize(w, 2) - w).square().sum())
        assert error <= best * 1.01


class TestPercentile(QuantizerContract):
    name = "percentile"

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize(("count", "beyond"), [(100, 0), (9_999, 0), (10_000, 1), (25_000, 2), (100_000, 10)])
    def test_the_range_ends_at_values_with_one_in_ten_thousand_beyond_each(self, count, beyond, symmetric):
        rows = torch.randn(3, count, generator=torch.Generator().manual_seed(count))
        low, high = percentile.fit_range(rows, Codes.of(8, symmetric), symmetric)
        assert low.shape == high.shape == (3, 1)
        for row, least, most in zip(rows, low[:, 0], high[:, 0], strict=True):
            assert int((row < least).sum()) == int((row > most).sum()) == beyond
            assert bool((row == least).any())
            assert bool((row == most).any())

    def test_a_few_values_have_the_range_of_minmax(self):
        grids = [WeightQuantizer(name, True, False).grid(weight(), 4) for name in ("percentile", "minmax")]
        assert torch.equal(grids[0].scale, grids[1].scale)
        assert torch.equal(grids[0].zero_point, grids[1].zero_point)

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_one_outlier_among_many_does_not_set_the_step(self, bits):
        w = torch.rand(1, 20_000, generator=torch.Generator().manual_seed(0))
        outlier = w.clone()
        outlier[0, 7] = 1e4
        step = WeightQuantizer("percentile").grid(outlier, bits).scale
        torch.testing.assert_close(step, WeightQuantizer("percentile").grid(w, bits).scale, rtol=1e-3, atol=0)
        assert float(WeightQuantizer("minmax").grid(outlier, bits).scale) > 1e3 * float(step)
        assert float(WeightQuantizer("percentile").fake_quantize(outlier, bits).max()) == pytest.approx(1.0, rel=0.01)


def test_every_quantizer_has_a_contract_class():
    tested = {test.name for test in QuantizerContract.__subclasses__()}
    assert tested == set(available("quantizers"))


def test_an_unknown_quantizer_lists_the_valid_ones():
    with pytest.raises(ConfigurationError, match="minmax, mse, percentile"):
        WeightQuantizer("mean")


# -- grids of activations --------------------------------------------------------------------------------------------------------

WIDTHS = pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
SPANS = pytest.mark.parametrize(
    "span", [(-1.0, 3.0), (0.0, 5.0), (-4.0, 0.0), (1.0, 5.0), (-5.0, -1.0), (-1e-6, 2e-6), (-3e5, 1e6)]
)


def values(span: tuple[float, float], count: int = 1000) -> torch.Tensor:
    """Values in a range and to both sides of it."""
    low, high = span
    return torch.rand(2, count // 2, generator=torch.Generator().manual_seed(0)) * (high - low) * 2 + low - (high - low) / 2


@WIDTHS
@SPANS
def test_an_activation_becomes_the_nearest_value_on_its_grid(span, bits):
    x, grid = values(span), ActivationGrid.of_range(*span, bits)
    codes = (x.double() / grid.scale).round() + grid.zero_point
    expected = (codes.clamp(0, 2**bits - 1) - grid.zero_point) * grid.scale
    out = grid.fake_quantize(x)
    exact = ((out.double() - expected).abs() <= 2 * eps() * max(map(abs, span))).double().mean()
    assert float(exact) >= 1 - 4 * 2**bits * eps()  # a value half-way between two may go to either side
    steps = (grid.scale * (k - grid.zero_point) for k in (0, 2**bits - 1))
    inside = x.clamp(*steps)
    assert float((out - inside).abs().max()) <= grid.scale * half_a_step(bits)


@WIDTHS
@SPANS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_activations_become_what_torch_makes_of_them(span, bits, dtype):
    grid = ActivationGrid.of_range(*span, bits)
    halves = (torch.arange(-4, 2 ** min(bits, 10) + 4) + 0.5 - grid.zero_point) * grid.scale  # between two values
    x = torch.cat([values(span).flatten(), 3 * values(span).flatten(), halves]).to(dtype)
    expected = torch.fake_quantize_per_tensor_affine(x, grid.scale, grid.zero_point, 0, 2**bits - 1)
    assert torch.equal(grid.fake_quantize(x), expected)
    learning = x.clone().requires_grad_()
    grid.fake_quantize(learning).float().sum().backward()
    assert 0 < float(learning.grad.float().mean()) < 1  # straight through within the range, nothing beyond


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_activations_saturate_and_nan_stays_nan(dtype):
    grid = ActivationGrid.of_range(-1.0, 1.0, 4)
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0], dtype=dtype)
    out = grid.fake_quantize(x)
    assert out.isnan().tolist() == [True, False, False, False]
    assert out[1:].tolist() == pytest.approx([float(grid.fake_quantize(torch.tensor([v], dtype=dtype))) for v in (9, -9, 0)])


@WIDTHS
@SPANS
def test_zero_is_on_the_grid_and_the_range_to_half_a_step(span, bits):
    grid = ActivationGrid.of_range(*span, bits)
    assert grid.bits == bits
    assert grid.scale > 0
    assert 0 <= grid.zero_point <= 2**bits - 1
    assert torch.equal(grid.fake_quantize(torch.zeros(3)), torch.zeros(3))
    low, high = min(span[0], 0.0), max(span[1], 0.0)
    least, most = -grid.zero_point * grid.scale, (2**bits - 1 - grid.zero_point) * grid.scale
    assert abs(least - low) <= grid.scale * half_a_step(bits)
    assert abs(most - high) <= grid.scale * half_a_step(bits)
    assert grid.scale == pytest.approx((high - low) / (2**bits - 1), rel=2 * eps())


@WIDTHS
@SPANS
def test_values_on_an_activation_grid_are_few_and_stay(span, bits):
    grid = ActivationGrid.of_range(*span, bits)
    once = grid.fake_quantize(values(span))
    assert len(once.unique()) <= 2**bits
    assert torch.equal(grid.fake_quantize(once), once)
    ordered = values(span).flatten().sort().values
    assert bool((grid.fake_quantize(ordered).diff() >= 0).all())


@SPANS
def test_an_activations_error_does_not_grow_with_bits(span):
    x = values(span).clamp(*span)
    errors = [
        float((ActivationGrid.of_range(*span, bits).fake_quantize(x) - x).double().square().sum()) for bits in (1, 2, 4, 8, 16)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_an_activations_shape_dtype_and_input_are_kept(dtype):
    x = values((-1.0, 3.0)).to(dtype)
    before = x.clone()
    out = ActivationGrid.of_range(-1.0, 3.0, 4).fake_quantize(x)
    assert out.shape == x.shape
    assert out.dtype == dtype
    assert torch.equal(x, before)
    assert len(out.unique()) <= 16
    assert float((out - x.clamp(-1.07, 3.07)).abs().max()) <= 0.14


def test_an_empty_range_keeps_zeros():
    grid = ActivationGrid.of_range(0.0, 0.0, 8)
    assert torch.equal(grid.fake_quantize(torch.zeros(4)), torch.zeros(4))


@pytest.mark.parametrize("name", available("quantizers"))
def test_a_range_of_activations_is_the_quantizers_own_for_one_row(name):
    x = torch.randn(500, generator=torch.Generator().manual_seed(1)).relu()
    low, high = range_of(name, x, 4)
    grid = WeightQuantizer(name, per_channel=False, symmetric=False).grid(x[None], 4)
    actual = ActivationGrid.of_range(low, high, 4)
    assert actual.scale == pytest.approx(float(grid.scale), rel=4 * eps())
    assert actual.zero_point == int(grid.zero_point)
    torch.testing.assert_close(actual.fake_quantize(x[None]), grid.fake_quantize(x[None]), rtol=4 * eps(), atol=0)


@pytest.mark.parametrize("name", ["mse", "minmax"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 8, 16])
def test_a_channel_of_vanishing_weights_stays_finite(name, symmetric, bits):
    """As weight decay leaves them: the step between two codes is less than the least float."""
    weight = torch.tensor([[0.0, 1e-44, 3e-44], [1.0, 2.0, -1.0]])
    rounded = WeightQuantizer(name, True, symmetric).fake_quantize(weight, bits)
    assert torch.isfinite(rounded).all()
    assert rounded[0].abs().max() < 1e-37
