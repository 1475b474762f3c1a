"""AdaRound: whether each weight rounds up or down is learned from the layer's output (Nagel et al., arXiv 2004.10568).

A weight lies between two neighbouring codes, base and base + step. It becomes base + h(V) · step, where the rectified sigmoid h
runs from 0 to 1 over V and reaches both ends; V starts where the weight does, so that cutting h at one half gives nearest codes.
Adam minimises, on mini-batches of the layer's float inputs x,

    N ‖apply(x, W̃ − W)‖² / ‖apply(x, nearest − W)‖²  +  λ Σ (1 − |2 h(V) − 1|^β)

for N weights. The operator is linear in its weight, so the first norm is that of the output's error. Dividing by the error of
nearest codes makes λ, unlike the paper's, a number that fits any layer and bit-width. β falls from loose to tight, which leaves
every h at 0 or 1.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from math import cos, inf, pi

import torch
from torch import Tensor

from clado.grids import Grid
from clado.quantization.corrections import LayerSample, Rounding

# ResNet-20 at 2 and 4 bits chose the settings below; halving or doubling one changes the error by 8 % at most
LEARNING_RATE = 0.1
REGULARIZATION = 10.0  # λ
LOOSE, TIGHT = 8.0, 2.0  # β, on half a cosine
WARM_UP = 0.2  # share of the steps without regularization: the paper's
LOW, HIGH = -0.1, 1.1  # the sigmoid is stretched to this range and cut at 0 and 1: the paper's
MARGIN = 0.01  # V starts at least so far from where h is cut, and its gradient 0
INPUT_ELEMENTS = 2**25  # most input elements in memory (128 MB); the first ones are read
POSITIONS = 2048  # positions of the input in a mini-batch, which has FEWEST to MOST images or rows
FEWEST, MOST = 4, 256


def rounder(sample: LayerSample, seed: int = 0, steps: int = 1000) -> Callable[[Grid], Tensor]:
    """Reads the calibration inputs once.

    Every grid takes `steps` steps of Adam on the same mini-batches, drawn with `seed` from at most INPUT_ELEMENTS elements of the
    inputs. On these, the squared output error is not above that of nearest codes. Where learning does not help, nearest codes are
    returned.

    Returns:
        A function from a grid of the weight to codes, int32 of the weight's shape.
    """
    learner = _Learner(sample, seed, steps)

    def codes(grid: Grid) -> Tensor:
        # autograd needs ordinary tensors, also where the caller is in inference mode; CUDA kernels need one order of sums
        with torch.inference_mode(False), torch.enable_grad(), _deterministic_convolutions():
            return learner.codes(Grid(grid.scale.clone(), grid.zero_point.clone(), grid.codes))

    return codes


class _Learner:
    """Learns the codes of one layer's weight on its inputs."""

    def __init__(self, sample: LayerSample, seed: int, steps: int) -> None:
        self.apply, self.seed, self.steps = sample.apply, seed, steps
        with torch.inference_mode(False), torch.no_grad():
            self.weight = sample.weight.detach().float().clone()
            self.inputs = _kept_inputs(sample)
        positions = self.inputs[0, 0].numel() if self.weight.ndim > 2 else 1
        self.batch = min(max(-(-POSITIONS // positions), FEWEST), MOST, len(self.inputs))

    def codes(self, grid: Grid) -> Tensor:
        """The learned codes, or nearest codes where these have no larger output error."""
        weight, inputs, batch = self.weight, self.inputs, self.batch
        nearest = grid.quantize(weight)
        nearest_error = self._total_error(grid.dequantize(nearest))
        if not 0 < nearest_error < inf:
            return nearest
        rounding = _Codes(weight, grid)
        adam = _Adam(rounding.v)
        generator = torch.Generator().manual_seed(self.seed)
        weighting = weight.numel() * len(inputs) / (batch * nearest_error)
        for step in range(self.steps):
            numbers = torch.randint(len(inputs), (batch,), generator=generator)
            x = inputs[numbers.to(inputs.device)] if batch < len(inputs) else inputs
            up = rounding.up()
            loss = weighting * self._squared_error(x, grid.dequantize(rounding.base + grid.codes.step * up))
            progress = (step / self.steps - WARM_UP) / (1 - WARM_UP)
            if progress >= 0:
                beta = TIGHT + (LOOSE - TIGHT) * (1 + cos(pi * progress)) / 2
                loss = loss + REGULARIZATION * (1 - (2 * up - 1).abs().pow(beta)).sum()
            adam.step(*torch.autograd.grad(loss, [rounding.v]))
        codes = rounding.codes()
        return codes if self._total_error(grid.dequantize(codes)) < nearest_error else nearest

    def _squared_error(self, x: Tensor, quantized: Tensor) -> Tensor:
        return self.apply(x, quantized - self.weight, None).square().sum()

    def _total_error(self, quantized: Tensor) -> float:
        with torch.no_grad():
            return sum(float(self._squared_error(part, quantized)) for part in torch.split(self.inputs, self.batch))


class _Codes:
    """The lower code (`base`) of each weight, and its share of the way to the next code as a function of `v`.

    Both have the weight's shape.
    """

    def __init__(self, weight: Tensor, grid: Grid) -> None:
        codes = grid.codes
        self.step = codes.step
        position = weight / grid.scale + grid.zero_point
        lower = codes.low + codes.step * ((position - codes.low) / codes.step).floor()
        # a weight beyond the range is placed between the last two codes, so that it can leave the last one
        self.base = lower.clamp(codes.low, codes.high - codes.step)
        start = ((position - self.base) / codes.step).clamp(MARGIN, 1 - MARGIN)
        self.v = ((start - LOW) / (HIGH - LOW)).logit().requires_grad_()

    def up(self) -> Tensor:
        """h(V), within 0..1."""
        return (torch.sigmoid(self.v) * (HIGH - LOW) + LOW).clamp(0, 1)

    def codes(self) -> Tensor:
        """The nearer of both codes, int32."""
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


def _kept_inputs(sample: LayerSample) -> Tensor:
    """The first inputs, float32 (images, channels, ...) or (rows, features): INPUT_ELEMENTS at most, but at least one item."""
    parts: list[Tensor] = []
    room = INPUT_ELEMENTS
    for x in sample.inputs():
        items = x.reshape(-1, x.shape[-1]) if sample.weight.ndim == 2 else x
        items = items[: max(room // items.shape[1:].numel(), 0 if parts else 1)]
        if not len(items):
            break
        parts.append(items.detach().float())
        room -= items.numel()
    return torch.cat(parts)


def _deterministic_convolutions() -> AbstractContextManager[None]:
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


correction = Rounding(rounder)
