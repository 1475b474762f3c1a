"""AdaRound: whether each weight rounds up or down is learned from the layer's output (Nagel et al., arXiv 2004.10568).

A weight lies between two neighbouring codes, base and base + step. It becomes base + h(V) · step. The rectified sigmoid h runs
from 0 to 1 over V and reaches both ends. V starts at the weight's position, so that rounding h at one half gives nearest codes.
Adam minimises

    N tr(Eᵀ Σ E) / tr(E₀ᵀ Σ E₀)  +  λ Σ (1 − |2 h(V) − 1|^β)

for N weights. Σ is the second moment of the layer's float inputs, E = W̃ − W the error of the weight as columns, and E₀ that of
nearest codes. The first trace is the expected squared output error of the layer, which the paper estimates on mini-batches (its
equation 20). The weight λ fits any layer and bit-width, unlike the paper's, because the first term is divided by the error of
nearest codes. β falls from a large value to a small one, which leaves every h at 0 or 1.
"""

from collections.abc import Sequence
from math import cos, inf, pi

import torch
from torch import Tensor

from clado.grids import Grid
from clado.quantization.corrections import LayerSample, Rounding

# The settings below were chosen on ResNet-20 at 2 and 4 bits. Halving or doubling one changes the error by at most 8 %
LEARNING_RATE = 0.1
REGULARIZATION = 10.0  # λ
LOOSE, TIGHT = 8.0, 2.0  # β, on half a cosine
WARM_UP = 0.2  # share of the steps without regularization: the paper's
LOW, HIGH = -0.1, 1.1  # the sigmoid is stretched to this range and cut at 0 and 1: the paper's
MARGIN = 0.01  # V starts at least this far from the ends, where h is cut and its gradient is 0


def learned(sample: LayerSample, grids: Sequence[Grid], steps: int = 1000) -> list[Tensor]:
    """Codes for each grid, int32 of the weight's shape, after `steps` steps of Adam each.

    The squared output error on the calibration inputs is not above that of nearest codes. If learning does not help, nearest
    codes are returned. Nothing is random.
    """
    # autograd needs ordinary tensors, even if the caller is in inference mode
    with torch.inference_mode(False), torch.enable_grad():
        learner = _Learner(sample, steps)
        return [learner.codes(Grid(grid.scale.clone(), grid.zero_point.clone(), grid.codes)) for grid in grids]


class _Learner:
    """Learns the codes of one layer's weight on the second moment of its inputs."""

    def __init__(self, sample: LayerSample, steps: int) -> None:
        self.form, self.steps = sample.form, steps
        with torch.no_grad():
            self.weight = sample.weight.detach().float().clone()
            self.second = (sample.moments.products / sample.moments.count).float()

    def codes(self, grid: Grid) -> Tensor:
        """The learned codes, or nearest codes if their output error is not larger."""
        nearest = grid.quantize(self.weight)
        with torch.no_grad():
            nearest_error = float(self._squared_error(grid.dequantize(nearest)))
        if not 0 < nearest_error < inf:
            return nearest
        rounding = _Codes(self.weight, grid)
        adam = _Adam(rounding.v)
        weighting = self.weight.numel() / nearest_error
        for step in range(self.steps):
            up = rounding.up()
            loss = weighting * self._squared_error(grid.dequantize(rounding.base + grid.codes.step * up))
            progress = (step / self.steps - WARM_UP) / (1 - WARM_UP)
            if progress >= 0:
                beta = TIGHT + (LOOSE - TIGHT) * (1 + cos(pi * progress)) / 2
                loss = loss + REGULARIZATION * (1 - (2 * up - 1).abs().pow(beta)).sum()
            adam.step(*torch.autograd.grad(loss, [rounding.v]))
        codes = rounding.codes()
        with torch.no_grad():
            return codes if float(self._squared_error(grid.dequantize(codes))) < nearest_error else nearest

    def _squared_error(self, quantized: Tensor) -> Tensor:
        """Expected squared output error of one row, summed over channels."""
        error = self.form.columns(quantized - self.weight)
        return (error * (self.second @ error)).sum()


class _Codes:
    """The lower code (`base`) of each weight, and its share of the way to the next code as a function of `v`.

    Both have the weight's shape.
    """

    def __init__(self, weight: Tensor, grid: Grid) -> None:
        codes = grid.codes
        self.step = codes.step
        position = weight / grid.scale + grid.zero_point
        lower = codes.low + codes.step * ((position - codes.low) / codes.step).floor()
        # a weight outside of the range is placed between the last two codes, so that it can move away from the last one
        self.base = lower.clamp(codes.low, codes.high - codes.step)
        start = ((position - self.base) / codes.step).clamp(MARGIN, 1 - MARGIN)
        self.v = ((start - LOW) / (HIGH - LOW)).logit().requires_grad_()

    def up(self) -> Tensor:
        """h(V), within 0..1."""
        return (torch.sigmoid(self.v) * (HIGH - LOW) + LOW).clamp(0, 1)

    def codes(self) -> Tensor:
        """The nearer of the two codes, int32."""
        with torch.no_grad():
            return (self.base + self.step * (self.up() >= 0.5)).to(torch.int32)


class _Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980). torch's Adam imports the compiler, which takes seconds in each process."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.steps = 0
        self.mean, self.square = torch.zeros_like(parameter), torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """Moves the parameter by one step of LEARNING_RATE."""
        self.steps += 1
        self.mean.lerp_(gradient, 1 - 0.9)
        self.square.lerp_(gradient.square(), 1 - 0.999)
        spread = (self.square / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
        self.parameter.addcdiv_(self.mean, spread, value=-LEARNING_RATE / (1 - 0.9**self.steps))


correction = Rounding(learned)
