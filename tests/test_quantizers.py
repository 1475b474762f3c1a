"""Every quantizer keeps the contract; each does what its name says."""

import pytest
import torch

from clado.errors import ConfigurationError
from clado.plugins import available
from clado.quantizers import WeightQuantizer
from tests.contracts.quantizer import MODES, QuantizerContract, weight


class TestMinMax(QuantizerContract):
    name = "minmax"

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_error_is_at_most_half_a_step(self, bits):
        grid = WeightQuantizer("minmax", True, True).grid(weight(), bits)
        assert bool(((grid.fake_quantize(weight()) - weight()).abs() <= grid.scale * 0.500001).all())


class TestMse(QuantizerContract):
    name = "mse"

    @MODES
    @pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
    def test_error_is_not_above_minmax(self, bits, per_channel, symmetric):
        errors = [
            float((WeightQuantizer(name, per_channel, symmetric).fake_quantize(weight(), bits) - weight()).square().sum())
            for name in ("mse", "minmax")
        ]
        assert errors[0] <= errors[1] * (1 + 1e-6)

    def test_range_is_near_the_best_of_a_fine_search(self):
        w = torch.randn(1, 400, generator=torch.Generator().manual_seed(3))
        scales = torch.linspace(0.05, 3, 3000)
        best = min(float(((w / s).round().clamp(-1, 1) * s - w).square().sum()) for s in scales)
        found = float((WeightQuantizer("mse").fake_quantize(w, 2) - w).square().sum())
        assert found <= best * 1.01


def test_every_quantizer_has_a_contract_class():
    tested = {test.name for test in QuantizerContract.__subclasses__()}
    assert tested == set(available("quantizers"))


def test_an_unknown_quantizer_lists_the_valid_ones():
    with pytest.raises(ConfigurationError, match="minmax, mse"):
        WeightQuantizer("mean")
