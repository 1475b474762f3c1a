"""What every weight quantizer keeps. Subclass, set `name`, and the tests come with it."""

import pytest
import torch

from clado.grids import Codes
from clado.quantization.quantizers import WeightQuantizer

BITS = (1, 2, 3, 4, 8, 16)
AXES = pytest.mark.parametrize("axis", [0, 1])
MODES = pytest.mark.parametrize(("per_channel", "symmetric"), [(c, s) for c in (True, False) for s in (True, False)])


def weight(seed: int = 0) -> torch.Tensor:
    """A weight with channels of different spread, one of them all zero."""
    w = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-2, 1, 6)[:, None, None, None]
    w[2] = 0
    return w


class QuantizerContract:
    """Laws of fake quantization (features: method, section 7)."""

    name: str

    @MODES
    @pytest.mark.parametrize("bits", BITS)
    def test_at_most_2_to_the_b_values_a_channel(self, bits, per_channel, symmetric):
        out = WeightQuantizer(self.name, per_channel, symmetric).fake_quantize(weight(), bits)
        rows = out.reshape(6, -1) if per_channel else out.reshape(1, -1)
        limit = 2**bits if not symmetric or bits == 1 else 2**bits - 1
        assert all(len(row.unique()) <= limit for row in rows)

    @MODES
    @pytest.mark.parametrize("bits", BITS)
    def test_codes_lie_on_the_stated_integers(self, bits, per_channel, symmetric):
        grid = WeightQuantizer(self.name, per_channel, symmetric).grid(weight(), bits)
        codes = grid.quantize(weight())
        low, high = (0, 2**bits - 1) if not symmetric else (-1, 1) if bits == 1 else (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)
        assert (grid.codes.low, grid.codes.high) == (low, high)
        assert low <= int(codes.min()) <= int(codes.max()) <= high
        if symmetric and bits == 1:
            assert set(codes.unique().tolist()) <= {-1, 1}

    @MODES
    @pytest.mark.parametrize("bits", BITS)
    def test_values_on_the_grid_stay(self, bits, per_channel, symmetric):
        grid = WeightQuantizer(self.name, per_channel, symmetric).grid(weight(), bits)
        once = grid.fake_quantize(weight())
        assert torch.equal(grid.fake_quantize(once), once)

    @MODES
    def test_error_does_not_grow_with_bits(self, per_channel, symmetric):
        quantizer = WeightQuantizer(self.name, per_channel, symmetric)
        errors = [float((quantizer.fake_quantize(weight(), bits) - weight()).square().sum()) for bits in (2, 4, 8, 16)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-4 * errors[0]

    @MODES
    @pytest.mark.parametrize("bits", BITS)
    def test_an_all_zero_channel_survives(self, bits, per_channel, symmetric):
        out = WeightQuantizer(self.name, per_channel, symmetric).fake_quantize(weight(), bits)
        assert torch.isfinite(out).all()
        if per_channel:
            assert float(out[2].abs().max()) < 1e-30

    def test_shape_dtype_and_input_are_kept(self):
        w = weight().double()
        before = w.clone()
        out = WeightQuantizer(self.name).fake_quantize(w, 4)
        assert out.shape == w.shape
        assert out.dtype == w.dtype
        assert torch.equal(w, before)

    @AXES
    def test_per_channel_keeps_the_named_axis(self, axis):
        quantizer = WeightQuantizer(self.name)
        out = quantizer.fake_quantize(weight(), 3, axis)
        for k in range(weight().shape[axis]):
            alone = quantizer.fake_quantize(weight().select(axis, k).unsqueeze(axis), 3, axis)
            assert torch.equal(out.select(axis, k).unsqueeze(axis), alone)

    def test_per_channel_error_is_not_above_per_tensor(self):
        errors = [
            float((WeightQuantizer(self.name, per_channel).fake_quantize(weight(), 4) - weight()).square().sum())
            for per_channel in (True, False)
        ]
        assert errors[0] <= errors[1]

    def test_symmetric_codes_mirror(self):
        quantizer = WeightQuantizer(self.name)
        assert torch.equal(quantizer.fake_quantize(-weight(), 4), -quantizer.fake_quantize(weight(), 4))
        assert Codes.of(2, True) == Codes(-1, 1)
