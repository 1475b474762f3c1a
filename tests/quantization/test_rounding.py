"""Every rounding correction keeps the contract; each does what its paper says, against exhaustive search and plain OBQ."""

import itertools

import pytest
import torch
from torch import nn

from clado.data.sources import zoo
from clado.grids import Grid
from clado.plugins import available
from clado.quantization.corrections import adaround, correction_of, gptq
from clado.settings.schema import DataSettings, NetworkSettings
from tests.contracts.rounding import (
    EVERY_GRID,
    RoundingContract,
    correlated,
    grid_of,
    output_error,
    rounding,
    sample,
    sample_of,
)
from tests.tolerance import of_sum

pytestmark = pytest.mark.numeric

SEEDS = range(8)


def small(seed, columns=6):
    """One output row of few weights, at 2 bits: small enough to try every code."""
    generator = torch.Generator().manual_seed(seed)
    layer = sample_of(torch.randn(1, columns, generator=generator), correlated((20, columns), 1, seed))
    return layer, grid_of(layer, 2)


def best(layer, grid, choices):
    """Codes of least output error among all combinations of the choices of each weight."""
    inputs = torch.cat(layer.inputs).double()
    combinations = torch.tensor(list(itertools.product(*choices)))
    outputs = (grid.dequantize(combinations).double() - layer.weight.double()) @ inputs.T
    return combinations[outputs.square().sum(1).argmin()][None].int()


@pytest.fixture(scope="module")
def zoo_layers():
    """Three layers of the zoo's ResNet-20 with what they see of 32 calibration images."""
    model = zoo.load_network(NetworkSettings(name="resnet20_fashion_mnist"))[0].eval()
    images = zoo.load_data(DataSettings(calibration_images=32), zoo.IMAGE_SHAPE).calibration.load(0, 32)[0]
    names = {"layer1.0.conv1": "conv2d", "layer3.0.downsample.0": "conv2d", "fc": "linear"}
    inputs_of = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _, inputs, __, name=name: inputs_of.update({name: inputs[0]}))
    with torch.no_grad():
        model(images)
    layers = []
    for name, operator in names.items():
        module = model.get_submodule(name)
        arguments = (list(module.stride), list(module.padding)) if isinstance(module, nn.Conv2d) else ()
        layers.append(sample_of(module.weight.detach(), inputs_of[name], operator, arguments))
    return layers


class SmallProblems(RoundingContract):
    """The contract's laws, and small layers compared with exhaustive search."""

    @pytest.mark.parametrize("seed", SEEDS)
    def test_error_lies_between_exhaustive_search_and_nearest_codes(self, seed):
        layer, grid = small(seed)
        codes = [best(layer, grid, [(-1, 0, 1)] * 6), self.codes(layer, grid), grid.quantize(layer.weight)]
        exhaustive, error, nearest = (output_error(layer, grid, one) for one in codes)
        assert exhaustive - rounding(layer, grid, *codes[:2], dtype=torch.float64) <= error
        assert error <= nearest + rounding(layer, grid, *codes[1:])


class TestGptq(SmallProblems):
    module = gptq
    steps = steps_that_pay = 0
    share = 0.8

    def test_most_small_problems_are_solved_nearly_as_well_as_by_exhaustive_search(self):
        gaps = []
        for seed in SEEDS:
            layer, grid = small(seed)
            errors = [self.codes(layer, grid), best(layer, grid, [(-1, 0, 1)] * 6), grid.quantize(layer.weight)]
            error, exhaustive, nearest = (output_error(layer, grid, codes) for codes in errors)
            gaps.append((error - exhaustive) / (nearest - exhaustive + 1e-12))
        assert sorted(gaps)[len(gaps) // 2] < 0.2

    def test_nearest_codes_are_returned_where_the_sweeps_make_things_worse(self, monkeypatch):
        layer = sample("conv2d")
        grid = grid_of(layer)
        monkeypatch.setattr(gptq, "_sweep", lambda columns, codes, grid, feedback: torch.full_like(codes, 3))
        assert torch.equal(self.codes(layer, grid), grid.quantize(layer.weight))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_no_single_code_could_be_better(self, seed):
        layer, grid = small(seed, columns=16)
        codes = self.codes(layer, grid)
        error = output_error(layer, grid, codes)
        for column, code in itertools.product(range(16), (-1, 0, 1)):
            other = codes.clone()
            other[0, column] = code
            assert output_error(layer, grid, other) >= error - rounding(layer, grid, codes, other)

    @pytest.mark.parametrize("panel", [3, 128])
    @pytest.mark.parametrize("bits", [1, 2, 4])
    def test_the_sweep_in_plain_order_is_obq(self, monkeypatch, bits, panel):
        monkeypatch.setattr(gptq, "PANEL", panel)
        layer = sample("linear")
        grid = grid_of(layer, bits)
        x = torch.cat(layer.inputs).double()
        hessian = 2 * x.T @ x
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12)
        weight, inverse = layer.weight.double().clone(), torch.linalg.inv(damped)
        expected = torch.zeros(5, 12, dtype=torch.int32)
        for k in range(12):  # equations 2 and 3 of OBQ: quantize one weight, update all others, take it out of the inverse
            expected[:, k] = grid.quantize(weight.float())[:, k]
            error = weight[:, k] - grid.dequantize(expected).double()[:, k]
            weight -= torch.outer(error / inverse[k, k], inverse[k])
            inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
            inverse[k] = inverse[:, k] = 0
            inverse[k, k] = 1  # never used again: it only keeps the division above finite
        columns = layer.weight.T[None]
        column_grid = gptq._ColumnGrid.of(
            [Grid(grid.scale.expand(5, 12).T[None], grid.zero_point.expand(5, 12).T[None], grid.codes)]
        )
        factor = gptq._upper_factor(hessian[None])
        actual = gptq._sweep(columns, column_grid.quantize(columns), column_grid, factor)[0].T
        assert torch.equal(actual, expected)
        assert not torch.equal(actual, grid.quantize(layer.weight))

    @EVERY_GRID
    def test_uncorrelated_inputs_leave_nearest_codes(self, bits, per_channel, symmetric):
        layer = sample("linear")
        layer = sample_of(layer.weight, torch.eye(12) * torch.linspace(0.1, 3, 12))
        grid = grid_of(layer, bits, per_channel, symmetric)
        assert torch.equal(self.codes(layer, grid), grid.quantize(layer.weight))

    def test_inputs_that_are_all_alike_leave_no_more_than_half_a_step_in_sum(self):
        layer = sample_of(sample("linear").weight, torch.ones(3, 12))
        grid = grid_of(layer)
        quantized = grid.dequantize(self.codes(layer, grid))
        error = (quantized - layer.weight).double().sum(1).abs()
        half = grid.scale.flatten() / 2
        off = of_sum(12) * (quantized.abs() + layer.weight.abs()).sum(1)
        assert bool((error <= half + off).all())
        assert not bool(((grid.fake_quantize(layer.weight) - layer.weight).sum(1).abs() <= half).all())

    def test_the_groups_of_a_convolution_are_rounded_as_if_each_were_one(self):
        layer = sample("conv2d, grouped")
        grid = grid_of(layer)
        codes = self.codes(layer, grid)
        for group in range(2):
            part = slice(3 * group, 3 * group + 3)
            x = torch.cat(layer.inputs)[:, 2 * group : 2 * group + 2]
            alone = sample_of(layer.weight[part], x, "conv2d", ([1, 1], [1, 1]))
            assert torch.equal(self.codes(alone, Grid(grid.scale[part], grid.zero_point[part], grid.codes)), codes[part])

    def test_a_layer_with_too_many_weights_a_channel_is_skipped_with_a_reason(self, monkeypatch):
        layer = sample("conv2d")
        grid = grid_of(layer)
        monkeypatch.setattr(gptq, "MAX_COLUMNS", 27)
        assert gptq.skipped(layer.layer) is None
        monkeypatch.setattr(gptq, "MAX_COLUMNS", 26)
        assert "27 weights an output channel" in gptq.skipped(layer.layer)
        assert torch.equal(self.codes(layer, grid), grid.quantize(layer.weight))

    @pytest.mark.parametrize("bits", [2, 4])
    def test_it_pays_on_a_real_network(self, zoo_layers, bits):
        shares = [self.share_of_nearest_error(layer, grid_of(layer, bits)) for layer in zoo_layers]
        assert max(shares) < 1
        assert sum(shares) / len(shares) < 0.6


class TestAdaround(SmallProblems):
    module = adaround
    steps = 40
    steps_that_pay = 200
    share = 0.95

    def test_most_small_problems_are_solved_nearly_as_well_as_by_the_best_of_both_neighbours(self):
        gaps = []
        for seed in SEEDS:
            layer, grid = small(seed)
            (codes,) = self.module.correction.round(layer, [grid], self.steps_that_pay)
            lower = (layer.weight / grid.scale).floor().clamp(-1, 0).int()
            exhaustive = best(layer, grid, [(int(code), int(code) + 1) for code in lower[0]])
            error, least, nearest = (output_error(layer, grid, c) for c in (codes, exhaustive, grid.quantize(layer.weight)))
            gaps.append((error - least) / (nearest - least + 1e-12))
        assert sorted(gaps)[len(gaps) // 2] < 0.2

    @pytest.mark.parametrize("bits", [1, 2, 4])
    def test_a_code_is_one_of_the_two_next_to_the_weight(self, bits):
        layer = sample("conv2d")
        grid = grid_of(layer, bits)
        position = (layer.weight / grid.scale).clamp(grid.codes.low, grid.codes.high)
        assert float((self.codes(layer, grid) - position).abs().max()) <= grid.codes.step

    @EVERY_GRID
    def test_learning_starts_from_the_weight_itself_and_cut_in_half_from_nearest_codes(self, bits, per_channel, symmetric):
        layer = sample("conv2d")
        grid = grid_of(layer, bits, per_channel, symmetric)
        rounding = adaround._Codes(layer.weight, grid)
        position = (layer.weight / grid.scale + grid.zero_point).clamp(grid.codes.low, grid.codes.high)
        start = rounding.base + grid.codes.step * rounding.up().detach()
        assert float((start - position).abs().max()) <= 2 * adaround.MARGIN * grid.codes.step
        is_tie = ((position - rounding.base) / grid.codes.step - 0.5).abs() < 1e-3
        assert torch.equal(rounding.codes()[~is_tie], grid.quantize(layer.weight)[~is_tie])

    def test_nearest_codes_are_returned_where_learning_makes_things_worse(self, monkeypatch):
        layer = sample("conv2d")
        grid = grid_of(layer)
        monkeypatch.setattr(adaround._Codes, "codes", lambda rounding: torch.full_like(rounding.base, 3, dtype=torch.int32))
        assert torch.equal(self.codes(layer, grid), grid.quantize(layer.weight))

    @pytest.mark.parametrize("bits", [2, 4])
    def test_it_pays_on_a_real_network(self, zoo_layers, bits):
        shares = [self.share_of_nearest_error(layer, grid_of(layer, bits)) for layer in zoo_layers]
        assert max(shares) < 1
        assert sum(shares) / len(shares) < 0.6


def test_every_rounding_correction_has_a_contract_class():
    tested = {test.module.__name__.rpartition(".")[2] for test in SmallProblems.__subclasses__()}
    assert tested == {name for name in available("corrections") if correction_of(name).stage == "rounding"}
