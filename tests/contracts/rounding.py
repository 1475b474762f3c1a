"""What every rounding correction keeps. Subclass, set the attributes, and the tests come with it.

`SAMPLES` has one small layer of each kind of operator, with inputs whose channels and neighbours are correlated, so that rounding
each weight to nearest is not the best.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clado.grids import Codes, Grid
from clado.quantization.corrections import LayerSample
from clado.quantization.matrix_form import MatrixForm
from clado.quantization.moments import MomentSums, merged
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


@dataclass(frozen=True, eq=False)
class Observed(LayerSample):
    """A layer's sample and its source. The oracle of the tests runs the operator itself on whole inputs."""

    inputs: tuple[Tensor, ...] = ()
    """Its inputs in batches."""
    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear
    """The operator: (input, weight, bias) -> output."""
    arguments: tuple = ()
    """Its arguments after the bias."""

    def with_weight(self, weight: Tensor) -> "Observed":
        """The same inputs, read by another weight."""
        return sample_of(weight, torch.cat(self.inputs), self.layer.operator, self.arguments)


def correlated(shape: tuple[int, ...], channel_axis: int, seed: int = SEEDLESS) -> Tensor:
    """Inputs with a common part in all channels and positions of an image. None is negative, as after a ReLU."""
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


def sample_of(weight: Tensor, x: Tensor, operator: str = "linear", arguments: tuple = ()) -> Observed:
    """A layer's sample on inputs in batches of four, with the moments of all their rows."""
    layer = Layer("layer", tuple(weight.shape), operator, channel_axis=int("transpose" in operator))
    form, sums, inputs = MatrixForm.of(layer, arguments), MomentSums(), x.split(4)
    rows = [form.rows(batch.float()) for batch in inputs]
    for part in rows:
        sums.add(part)
    return Observed(
        layer, weight, None, form, len(x), sums.moments(), rows=torch.cat(rows, 1),
        inputs=inputs, apply=apply_of(operator, arguments), arguments=arguments,
    )  # fmt: skip


def sample(name: str = "linear", **changes) -> Observed:
    """One of the operators above."""
    operator, shape, input_shape, arguments = OPERATORS[name]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(SEEDLESS))
    x = correlated(input_shape, -1 if operator == "linear" else 1)
    return replace(sample_of(weight, x, operator, arguments), **changes)


def grid_of(layer: LayerSample, bits: int = 3, per_channel: bool = True, symmetric: bool = True) -> Grid:
    return WeightQuantizer("mse", per_channel, symmetric).grid(layer.weight, bits, layer.layer.channel_axis)


def output_error(layer: Observed, grid: Grid, codes: Tensor) -> float:
    """‖apply(x, W_q) − apply(x, W)‖² over the calibration inputs, in float64."""
    quantized, weight = grid.dequantize(codes).double(), layer.weight.double()
    return sum(
        float((layer.apply(x.double(), quantized, None) - layer.apply(x.double(), weight, None)).square().sum())
        for x in layer.inputs
    )


def rounding(layer: Observed, grid: Grid, *codes: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """Bound of the rounding of these codes' output errors, computed in `dtype`.

    An output is a sum of products, and an output error a sum of squares. Their scale is that of the same
    sums without signs.
    """
    scale, terms = 0.0, 0
    for x in layer.inputs:
        for one in codes:
            error = (grid.dequantize(one).double() - layer.weight.double()).abs()
            outputs = layer.apply(x.double().abs(), error, None)
            scale += float(outputs.square().sum())
            terms = max(terms, outputs.numel() + layer.weight[0].numel())
    return of_forward(2, terms, dtype) * scale


EVERY_OPERATOR = pytest.mark.parametrize("name", OPERATORS)
EVERY_GRID = pytest.mark.parametrize(("bits", "per_channel", "symmetric"), GRIDS)


class RoundingContract:
    """Laws of a rounding correction: of `Rounding.round` (clado/quantization/corrections/__init__.py)."""

    module: ModuleType
    steps: int  # enough for the laws below
    steps_that_pay: int
    share: float  # of nearest's error at 3 bits, that the error on correlated inputs is then below, for every operator

    def codes(self, layer: LayerSample, grid: Grid) -> Tensor:
        (codes,) = self.module.correction.round(layer, [grid], self.steps)
        return codes

    def share_of_nearest_error(self, layer: LayerSample, grid: Grid) -> float:
        """Output error as a share of that of nearest codes."""
        (codes,) = self.module.correction.round(layer, [grid], self.steps_that_pay)
        return output_error(layer, grid, codes) / output_error(layer, grid, grid.quantize(layer.weight))

    def test_what_few_images_show_is_not_fitted(self):
        """A classifier sees one row of each image: fewer rows than it has columns. On other images nothing may be lost."""
        generator = torch.Generator().manual_seed(3)
        mixing = torch.randn(96, 96, generator=generator) * torch.rand(96, generator=generator)
        rows = torch.randn(2048, 96, generator=generator) @ mixing + 1.0
        parts = []
        for block in rows[:64].chunk(8):
            sums = MomentSums()
            sums.add(block[None])
            parts.append(sums.moments())
        moments = merged(parts)
        narrow = sample_of(torch.randn(16, 96, generator=generator), rows[:64])
        unseen = sample_of(narrow.weight, rows[64:])
        grid = grid_of(narrow, 3)
        fitted, shrunk = (self.codes(replace(narrow, moments=each), grid) for each in (moments, moments.shrunk()))
        error, error_fitted, error_nearest = (
            output_error(unseen, grid, codes) for codes in (shrunk, fitted, grid.quantize(narrow.weight))
        )
        assert error < error_nearest
        assert error < error_fitted

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
        assert torch.equal(self.codes(layer.with_weight(grid.dequantize(codes)), grid), codes)

    def test_nothing_given_is_changed(self):
        layer = sample("conv_transpose2d, grouped")
        grid = grid_of(layer)
        tensors = (layer.weight, grid.scale, grid.zero_point, layer.rows, layer.moments.mean, layer.moments.scatter)
        before = [tensor.clone() for tensor in tensors]
        state = torch.get_rng_state()
        self.codes(layer, grid)
        assert all(map(torch.equal, tensors, before))
        assert torch.equal(torch.get_rng_state(), state)

    def test_grids_that_are_rounded_together_get_the_codes_that_each_gets_alone(self):
        layer = sample("conv2d")
        grids = [grid_of(layer, bits) for bits in (1, 2, 3, 4)]
        torch.rand(3)
        codes_of = self.module.correction.round(layer, grids[::-1], self.steps)[::-1]
        assert all(torch.equal(codes, self.codes(layer, grid)) for codes, grid in zip(codes_of, grids, strict=True))
        assert not torch.equal(codes_of[0], codes_of[1])

    @pytest.mark.parametrize("name", ["linear, tokens", "conv2d, same", "conv_transpose2d"])
    def test_inference_mode_gives_the_same_codes(self, name):
        expected = self.codes(sample(name), grid_of(sample(name)))
        with torch.inference_mode():
            layer = sample(name)
            grid = grid_of(layer)
            inside = self.codes(layer, grid)
        mixed = self.codes(layer, grid)  # of tensors that were born in inference mode
        with torch.inference_mode():
            ordinary = self.codes(sample(name), grid_of(sample(name)))
        assert all(torch.equal(codes, expected) for codes in (inside, mixed, ordinary))

    def test_a_parameter_and_half_precision_are_taken_for_their_values(self):
        weight = sample("conv2d").weight.half()
        x = (100 * torch.cat(sample("conv2d").inputs)).half()  # whose squares overflow half precision
        layer = sample_of(weight.float(), x.float(), "conv2d")
        expected = self.codes(layer, grid_of(layer))
        for variant in (sample_of(weight, x, "conv2d"), replace(layer, weight=nn.Parameter(layer.weight))):
            assert torch.equal(self.codes(variant, grid_of(layer)), expected)

    @EVERY_GRID
    def test_inputs_that_are_always_zero_leave_nearest_codes(self, bits, per_channel, symmetric):
        layer = sample("conv2d")
        grid = grid_of(layer, bits, per_channel, symmetric)
        silent = sample_of(layer.weight, torch.zeros(4, 3, 8, 7), "conv2d")
        assert torch.equal(self.codes(silent, grid), grid.quantize(layer.weight))

    @EVERY_GRID
    def test_dead_inputs_zero_channels_and_one_image_do_no_harm(self, bits, per_channel, symmetric):
        layer = sample("linear")
        weight = layer.weight.clone()
        weight[1] = 0
        x = layer.inputs[0][:1].clone()
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
