"""A deployed network in training: its trained tensors, its forward pass, and the network that it deploys.

Every weight stays on its grid. A latent position u of each weight is trained, in steps of the first grid. The latent weight is
w = (u − z) s₀. The forward pass uses its value on the grid, ŵ = (clip(round(w / s + z)) − z) · s. In the
backward pass rounding counts as the identity, and clipping has its own gradient (Bengio et al. 2013, arXiv 1308.3432). The scales
s can be trained too, as in LSQ (Esser et al. 2020, arXiv 1902.08153), and so can those of inputs. Their gradient follows from the
same formula. Biases, affine parameters of batch norm and other float parameters are also trained. Statistics of batch norm are
not.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clado.errors import NetworkError
from clado.grids import ActivationGrid, Grid, QuantizedLayer
from clado.network.network import Network
from clado.network.tensors import laid_out_like

LEAST_SCALE = 1e-2  # smallest learned scale, as a share of its first value
MARGIN = 0.05  # least distance of the start of a latent position from the edge of its code, in steps
Layers = Mapping[int, QuantizedLayer]


@dataclass(frozen=True)
class Rates:
    """Adam's first learning rates. Each falls to zero with a cosine."""

    positions: float
    """Rate of latent positions, in steps of the grid."""
    scales: float
    """Rate of scales, as a share of the scale. If it is 0, scales are not trained."""
    floats: float
    """Rate of biases and of float parameters."""


class Pupil:
    """The trained tensors of a deployed network.

    Args:
        network: The deployed network.
        layers: Its quantized layers by number. Training starts at their codes. A latent position starts as near to the network's
            float weight as its code allows.
        unchanged: Names of float parameters that are not trained.

    Raises:
        NetworkError: A layer has no grid.
    """

    def __init__(self, network: Network, layers: Layers, unchanged: Collection[str] = ()) -> None:
        if names := [network.layers[i].name for i, layer in layers.items() if layer.grid is None]:
            raise NetworkError(f"{', '.join(names[:8])} have no grid; expected layers as `Prepared.deployed` gives them")
        # corrections make tensors in inference mode, and such tensors cannot be trained
        self.network = network.updated({name: value.clone() for name, value in network.changed.items()})
        self.layers = {i: replace(layer, grid=_cloned(_grid(layer))) for i, layer in layers.items()}
        self.positions = {i: _leaf(_position(layer, network.weights[i])) for i, layer in layers.items()}
        self.scales = {i: _leaf(torch.ones_like(_grid(layer).scale)) for i, layer in layers.items()}
        """Scales of weights, as a share of the first ones."""
        self.input_scales = {
            i: _leaf(torch.ones((), device=layer.weight.device)) for i, layer in layers.items() if layer.activation is not None
        }
        """Scales of inputs, as a share of the first ones."""
        self.biases = {i: _leaf(layer.bias) for i, layer in layers.items() if layer.bias is not None}
        floats = self.network.trainable(layers).items()
        self.others = {name: _leaf(value) for name, value in floats if name not in unchanged}
        """Trained float parameters by name."""

    def grid(self, i: int) -> Grid:
        """A layer's grid with its present scale."""
        grid = _grid(self.layers[i])
        return replace(grid, scale=grid.scale * self.scales[i])

    def _weight(self, i: int) -> Tensor:
        """The latent weight, float32."""
        grid = _grid(self.layers[i])
        return (self.positions[i] - grid.zero_point) * grid.scale

    def layer(self, i: int) -> QuantizedLayer:
        """A layer with gradients to its trained tensors."""
        layer = self.layers[i]
        weight = straight_through(self._weight(i), self.grid(i)).to(layer.weight.dtype)
        activation = layer.activation
        if activation is not None:
            activation = _LearnedInputs(activation, self.input_scales[i])
        return QuantizedLayer(laid_out_like(weight, layer.weight), self.biases.get(i), activation)

    def training(self, layers: Iterable[int], names: Iterable[str]) -> tuple[Network, dict[int, QuantizedLayer]]:
        """The network and some of its layers, with gradients to their trained tensors and to the named float parameters."""
        return self.network.updated({name: self.others[name] for name in names}), {i: self.layer(i) for i in layers}

    @torch.no_grad()
    def deployed(self, layers: Iterable[int] | None = None) -> tuple[Network, dict[int, QuantizedLayer]]:
        """The network, and its layers or some of them, on their grids."""
        network = self.network.updated({name: value.detach().clone() for name, value in self.others.items()})
        return network, {i: self._deployed_layer(i) for i in (self.layers if layers is None else layers)}

    def _deployed_layer(self, i: int) -> QuantizedLayer:
        layer, grid = self.layers[i], replace(self.grid(i), scale=self.grid(i).scale.detach().clone())
        weight = laid_out_like(grid.fake_quantize(self._weight(i)).to(layer.weight.dtype), layer.weight)
        bias = self.biases[i].detach().clone() if i in self.biases else None
        activation = layer.activation
        if activation is not None:
            activation = replace(activation, scale=activation.scale * float(self.input_scales[i]))
        return QuantizedLayer(weight, bias, activation, grid)

    @torch.no_grad()
    def settle(self, margin: float) -> None:
        """Moves latent positions within their codes, until each is at least `margin` steps from the edge of its code.

        Training leaves many positions at the edges. Adam's first step would change all their codes at once.
        """
        for i, position in self.positions.items():
            grid = self.grid(i)
            codes, first = grid.quantize(self._weight(i)).float(), _grid(self.layers[i])
            low, high = (_between(codes + sign * (0.5 - margin) * grid.codes.step, grid, first) for sign in (-1, 1))
            position.copy_(torch.minimum(torch.maximum(position, low), high).clamp(first.codes.low, first.codes.high))

    def tensors(self, layers: Collection[int], names: Collection[str]) -> dict[str, Tensor]:
        """The trained tensors of some layers and float parameters, by name."""
        of_layers = {"position": self.positions, "scale": self.scales, "input scale": self.input_scales, "bias": self.biases}
        trained = {f"{what} {i}": by_layer[i] for what, by_layer in of_layers.items() for i in layers if i in by_layer}
        return trained | {f"parameter {name}": self.others[name] for name in names}

    @torch.no_grad()
    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the values of trained tensors."""
        own = self.tensors(self.layers, self.others)
        for name, value in tensors.items():
            own[name].copy_(value)


class Descent:
    """Adam on a part of a pupil.

    Args:
        pupil: The pupil.
        layers: The layers to train.
        names: The float parameters to train.
        rates: First learning rates.
        steps: Number of all steps.
    """

    def __init__(self, pupil: Pupil, layers: Collection[int], names: Collection[str], rates: Rates, steps: int) -> None:
        self.pupil, self.layers = pupil, tuple(layers)
        of_part = pupil.tensors(layers, names)
        rate_of = {"position": rates.positions, "scale": rates.scales, "input": rates.scales}
        groups: dict[float, list[Tensor]] = {}
        for name, tensor in of_part.items():
            if rate := rate_of.get(name.split()[0], rates.floats):
                groups.setdefault(rate, []).append(tensor)
        self.parameters = [tensor for group in groups.values() for tensor in group]
        self.optimiser = torch.optim.Adam([{"params": group, "lr": rate} for rate, group in groups.items()])
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / max(1, steps))
        )

    def step(self, loss: Tensor) -> None:
        """One step of all trained tensors. The module's own parameters get no gradient."""
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimiser.step()
        self.schedule.step()
        with torch.no_grad():
            for i in self.layers:
                codes = _grid(self.pupil.layers[i]).codes
                self.pupil.positions[i].clamp_(codes.low, codes.high)  # outside of the range it would never move again
                self.pupil.scales[i].clamp_(min=LEAST_SCALE)
                if i in self.pupil.input_scales:
                    self.pupil.input_scales[i].clamp_(min=LEAST_SCALE)


def straight_through(weight: Tensor, grid: Grid) -> Tensor:
    """The weight on its grid.

    In the backward pass rounding is the identity. A weight outside of the range has gradient 0. Only a scale can learn from it.
    """
    position = weight.float() / grid.scale + grid.zero_point
    inside = position.clamp(grid.codes.low, grid.codes.high)
    codes = inside + (grid.quantize(weight.float()) - inside).detach()
    return grid.dequantize(codes).to(weight.dtype)


class _LearnedInputs(ActivationGrid):
    """A grid of inputs whose scale is trained."""

    def __init__(self, grid: ActivationGrid, ratio: Tensor) -> None:
        super().__init__(grid.bits, grid.scale, grid.zero_point)
        object.__setattr__(self, "ratio", ratio)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """The nearest values on the grid. In the backward pass rounding is the identity."""
        ratio: Tensor = self.ratio  # type: ignore[attr-defined]
        scale = self.scale * ratio
        inside = (x.float() / scale).clamp(-self.zero_point, 2**self.bits - 1 - self.zero_point)
        return ((inside + (inside.round() - inside).detach()) * scale).to(x.dtype)


def _position(layer: QuantizedLayer, weight: Tensor) -> Tensor:
    """The first latent position. It has the code of the layer's weight, and is as near to the float weight as possible."""
    grid = _grid(layer)
    codes, reach = grid.quantize(layer.weight.float()).float(), (0.5 - MARGIN) * grid.codes.step
    position = (weight.float() / grid.scale + grid.zero_point).clamp(grid.codes.low, grid.codes.high)
    return torch.minimum(torch.maximum(position, codes - reach), codes + reach)


def _between(position: Tensor, grid: Grid, first: Grid) -> Tensor:
    """Converts a position in steps of a grid to steps of the first grid."""
    return (position - grid.zero_point) * grid.scale / first.scale + first.zero_point


def _grid(layer: QuantizedLayer) -> Grid:
    assert layer.grid is not None  # `Pupil` refuses others
    return layer.grid


def _cloned(grid: Grid) -> Grid:
    return Grid(grid.scale.clone(), grid.zero_point.clone(), grid.codes)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()
