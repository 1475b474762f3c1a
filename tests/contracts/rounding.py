"""What every rounding correction keeps. Subclass, set the attributes, and the tests come with it.

`SAMPLES` has one small layer of each kind of operator, with inputs whose channels and neighbours are correlated, so that rounding
each weight to nearest is not the best.
"""

import warnings
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clado.grids import Codes, Grid
from clado.quantization.corrections import LayerSample
from clado.quantization.quantizers import WeightQuantizer
from clado.space import Layer
from tests.tolerance import of_forward

SEEDLESS = 5  # of every other random number in this file
# name -> (operator, weight, input, arguments as an exported graph has them)
OPERATORS = {
    "linear": ("linear", (5, 12), (40, 12), ()),
    "linear, tokens": ("linear", (5, 12), (6, 7, 12), ()),
    "conv1d": ("conv1d", (5, 3, 4), (6, 3, 12), ([1], [2])),
    "conv2d": ("conv2d", (5, 3, 3, 3), (6, 3, 8, 7), ()),
    "conv2d, strided, padded, dilated": ("conv2d", (5, 3, 3, 2), (6, 3, 9, 8), ([2, 1], [1, 0], [1, 2])),
    "conv2d, one number for both axes": ("conv2d", (5, 3, 3, 3), (6, 3, 8, 7), ([2], [1])),
    "conv2d, same": ("conv2d", (5, 3, 2, 3), (6, 3, 6, 7), ([1, 1], "same")),
    "conv2d, valid": ("conv2d", (5, 3, 2, 3), (6, 3, 6, 7), ([2, 2], "valid")),
    "conv2d, grouped": ("conv2d", (6, 2, 3, 3), (6, 4, 8, 7), ([1, 1], [1, 1], [1, 1], 2)),
    "conv2d, depthwise": ("conv2d", (6, 1, 3, 3), (6, 6, 8, 7), ([1, 1], [1, 1], [1, 1], 6)),
    "conv3d": ("conv3d", (4, 2, 2, 3, 2), (4, 2, 4, 6, 5), ([1, 2, 1], [0, 1, 1])),
    "conv_transpose1d": ("conv_transpose1d", (3, 4, 3), (6, 3, 8), ([1], [1])),
    "conv_transpose2d": ("conv_transpose2d", (3, 4, 3, 2), (6, 3, 6, 5), ([1, 2], [2, 1], [0, 1], 1, [2, 1])),
    "conv_transpose2d, grouped": ("conv_transpose2d", (4, 3, 2, 3), (6, 4, 6, 5), ([1, 1], [1, 2], [0, 0], 2)),
}
GRIDS = [(bits, per_channel, symmetric) for bits in (1, 2, 4) for per_channel in (True, False) for symmetric in (True, False)]
GRIDS += [(8, True, True), (16, True, True), (16, False, False)]


@dataclass(frozen=True)
class Inputs:
    """Calibration inputs that count how many batches were read."""

    batches: tuple[Tensor, ...]
    read: list[int]

    def __call__(self):
        for batch in self.batches:
            self.read.append(len(batch))
            yield batch


def correlated(shape: tuple[int, ...], channel_axis: int, seed: int = SEEDLESS) -> Tensor:
    """Inputs with a common part in all channels and positions of an image, none negative: what a layer behind a ReLU sees."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn((shape[0], *[1] * (len(shape) - 1)), generator=generator)
    channels = [1] * len(shape)
    channels[channel_axis] = -1
    spread = torch.rand(shape[channel_axis], generator=generator).reshape(channels) + 0.5
    return ((torch.randn(shape, generator=generator) + 2 * common) * spread).relu()


def apply_of(operator: str, arguments: tuple):
    function = F.linear if operator == "linear" else getattr(F, operator)

    def apply(x, weight, bias):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
            return function(x, weight, bias, *arguments)

    return apply


def sample_of(weight: Tensor, x: Tensor, operator: str = "linear", arguments: tuple = ()) -> LayerSample:
    """A layer's sample, its inputs in batches of four."""
    layer = Layer("layer", tuple(weight.shape), operator, channel_axis=int("transpose" in operator))
    return LayerSample(layer, weight, None, len(x), Inputs(x.split(4), []), apply_of(operator, arguments), arguments)


def sample(name: str = "linear", **changes) -> LayerSample:
    """One of the operators above."""
    operator, shape, input_shape, arguments = OPERATORS[name]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(SEEDLESS))
    x = correlated(input_shape, -1 if operator == "linear" else 1)
    return replace(sample_of(weight, x, operator, arguments), **changes)


def grid_of(layer: LayerSample, bits: int = 3, per_channel: bool = True, symmetric: bool = True) -> Grid:
    return WeightQuantizer("mse", per_channel, symmetric).grid(layer.weight, bits, layer.layer.channel_axis)


def output_error(layer: LayerSample, grid: Grid, codes: Tensor) -> float:
    """‖apply(x, W_q) − apply(x, W)‖² over the calibration inputs, in float64."""
    quantized, weight = grid.dequantize(codes).double(), layer.weight.double()
    return sum(
        float((layer.apply(x.double(), quantized, None) - layer.apply(x.double(), weight, None)).square().sum())
        for x in layer.inputs()
    )


def rounding(layer: LayerSample, grid: Grid, *codes: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """Bound of the rounding of these codes' output errors, computed in `dtype`.

    An output is a sum of products, and an output error a sum of squares. Their scale is that of the same
    sums without signs.
    """
    scale, terms = 0.0, 0
    for x in layer.inputs():
        for one in codes:
            error = (grid.dequantize(one).double() - layer.weight.double()).abs()
            outputs = layer.apply(x.double().abs(), error, None)
            scale += float(outputs.square().sum())
            terms = max(terms, outputs.numel() + layer.weight[0].numel())
    return of_forward(2, terms, dtype) * scale


EVERY_OPERATOR = pytest.mark.parametrize("name", OPERATORS)
EVERY_GRID = pytest.mark.parametrize(("bits", "per_channel", "symmetric"), GRIDS)


class RoundingContract:
    """Laws of a rounding correction: features of `rounder` (clado/quantization/corrections/__init__.py)."""

    module: ModuleType
    steps: int  # enough for the laws below
    steps_that_pay: int
    share: float  # of nearest's error at 3 bits, that the error on correlated inputs is then below, for every operator

    def codes(self, layer: LayerSample, grid: Grid, seed: int = 0) -> Tensor:
        return self.module.rounder(layer, seed, self.steps)(grid)

    def share_of_nearest_error(self, layer: LayerSample, grid: Grid) -> float:
        """Output error as a share of that of nearest codes."""
        codes = self.module.rounder(layer, 0, self.steps_that_pay)(grid)
        return output_error(layer, grid, codes) / output_error(layer, grid, grid.quantize(layer.weight))

    @EVERY_GRID
    def test_codes_lie_on_the_grid_and_have_the_weights_shape(self, bits, per_channel, symmetric):
        layer = sample("conv2d")
        grid = grid_of(layer, bits, per_channel, symmetric)
        codes = self.codes(layer, grid)
        assert codes.dtype == torch.int32
        assert codes.shape == layer.weight.shape
        assert grid.codes.low <= int(codes.min()) <= int(codes.max()) <= grid.codes.high
        if grid.codes == Codes(-1, 1, 2):
            assert set(codes.unique().tolist()) <= {-1, 1}

    @EVERY_GRID
    def test_output_error_is_not_above_that_of_nearest_codes(self, bits, per_channel, symmetric):
        for name in ("linear", "conv2d, grouped"):
            layer = sample(name)
            grid = grid_of(layer, bits, per_channel, symmetric)
            nearest, codes = grid.quantize(layer.weight), self.codes(layer, grid)
            slack = rounding(layer, grid, nearest, codes)
            assert output_error(layer, grid, codes) <= output_error(layer, grid, nearest) + slack

    @EVERY_OPERATOR
    def test_output_error_is_well_below_that_of_nearest_codes_on_correlated_inputs(self, name):
        layer = sample(name)
        assert self.module.correction.skipped(layer.layer) is None
        assert self.share_of_nearest_error(layer, grid_of(layer)) < self.share

    @EVERY_GRID
    def test_a_weight_on_the_grid_stays(self, bits, per_channel, symmetric):
        layer = sample("conv2d")
        grid = grid_of(layer, bits, per_channel, symmetric)
        codes = grid.quantize(layer.weight)
        assert torch.equal(self.codes(replace(layer, weight=grid.dequantize(codes)), grid), codes)

    def test_nothing_given_is_changed(self):
        layer = sample("conv_transpose2d, grouped")
        grid = grid_of(layer)
        given = (layer.weight, grid.scale, grid.zero_point, *layer.inputs.batches)
        before = [tensor.clone() for tensor in given]
        state = torch.get_rng_state()
        self.codes(layer, grid)
        assert all(map(torch.equal, given, before))
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_same_seed_gives_the_same_codes_in_any_order_of_grids(self):
        layer = sample("conv2d")
        grids = [grid_of(layer, bits) for bits in (2, 3, 4)]
        upwards, downwards = (self.module.rounder(layer, 7, self.steps) for _ in range(2))
        expected = [upwards(grid) for grid in grids]
        torch.rand(3)
        found = [downwards(grid) for grid in reversed(grids)][::-1]
        assert all(map(torch.equal, found, expected))
        assert not torch.equal(expected[0], expected[1])

    def test_inputs_are_read_once_for_all_grids(self):
        layer = sample("conv2d")
        codes = self.module.rounder(layer, 0, self.steps)
        for bits in (2, 3, 4):
            codes(grid_of(layer, bits))
        assert layer.inputs.read == [4, 2]

    @pytest.mark.parametrize("name", ["linear, tokens", "conv2d, same", "conv_transpose2d"])
    def test_inference_mode_gives_the_same_codes(self, name):
        expected = self.codes(sample(name), grid_of(sample(name)))
        with torch.inference_mode():
            layer = sample(name)
            grid = grid_of(layer)
            made_inside = self.module.rounder(layer, 0, self.steps)
            inside = made_inside(grid)
        made_outside = self.module.rounder(layer, 0, self.steps)  # of tensors that were born in inference mode
        with torch.inference_mode():
            mixed = made_outside(grid)
        assert all(torch.equal(codes, expected) for codes in (inside, mixed, made_inside(grid), made_outside(grid)))

    def test_a_parameter_and_half_precision_are_taken_for_their_values(self):
        weight = sample("conv2d").weight.half()
        x = (100 * torch.cat(sample("conv2d").inputs.batches)).half()  # whose squares overflow half precision
        layer = sample_of(weight.float(), x.float(), "conv2d")
        expected = self.codes(layer, grid_of(layer))
        for given in (sample_of(weight, x, "conv2d"), replace(layer, weight=nn.Parameter(layer.weight))):
            assert torch.equal(self.codes(given, grid_of(layer)), expected)

    @EVERY_GRID
    def test_inputs_that_are_always_zero_leave_nearest_codes(self, bits, per_channel, symmetric):
        layer = sample("conv2d")
        grid = grid_of(layer, bits, per_channel, symmetric)
        silent = replace(layer, inputs=lambda: iter([torch.zeros(4, 3, 8, 7)]))
        assert torch.equal(self.codes(silent, grid), grid.quantize(layer.weight))

    @EVERY_GRID
    def test_dead_inputs_zero_channels_and_one_image_do_no_harm(self, bits, per_channel, symmetric):
        layer = sample("linear")
        weight = layer.weight.clone()
        weight[1] = 0
        x = layer.inputs.batches[0][:1].clone()
        x[:, 3] = 0
        layer = sample_of(weight, x)
        grid = grid_of(layer, bits, per_channel, symmetric)
        codes = self.codes(layer, grid)
        assert grid.codes.low <= int(codes.min()) <= int(codes.max()) <= grid.codes.high
        assert torch.equal(codes[:, 3], grid.quantize(weight)[:, 3])
        nearest = grid.quantize(weight)
        assert output_error(layer, grid, codes) <= output_error(layer, grid, nearest) + rounding(layer, grid, nearest, codes)
        if per_channel:
            assert float(grid.dequantize(codes)[1].abs().max()) < 1e-30
