"""First-order changes of each sample's log-likelihood under every option, by one backward pass an image."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from clado import criteria
from clado.errors import ConfigurationError
from clado.grids import QuantizedLayer
from clado.measuring.measurements._autograd import leaves, random_numbers
from clado.measuring.plan import Tile
from clado.measuring.workbench import Array, Workbench
from clado.network.tensors import outside_inference
from clado.quantization.preparation import Prepared


def measure(bench: Workbench, tile: Tile) -> Array:
    """(2, 1 + K) sums of squares: see `squared_slopes`.

    Raises:
        ConfigurationError: Probes are on batch statistics.
    """
    if bench.batch_statistics:
        raise ConfigurationError(
            "there are no gradients of single samples with batch statistics; expected running statistics, or other estimators"
        )
    images, labels = bench.loaded(tile.sample_block)
    return squared_slopes(bench.prepared, bench.criterion, images, labels, random_numbers(bench, tile))


@torch.inference_mode(False)
@torch.enable_grad()
def squared_slopes(
    prepared: Prepared, criterion: Any, images: Tensor, labels: Tensor | None, random: np.random.Generator
) -> Array:
    """(2, 1 + K) sums over images from each sample's g = ∂ log p_y / ∂w. One forward and one backward pass for each image.

    Row 0: the loss of the float network, then ⟨Δ_k, g⟩² of each option, where Δ_k holds the change of a layer's bias too. Row 1:
    the loss again, then Σ Δ_k² g² over the weights. y is the label where the criterion needs labels. Else it is drawn from
    the float network's softmax, so that the expectation of g gᵀ is the Fisher information, KL's second order.
    """
    network, space = prepared.network, prepared.space
    weights, biases = leaves(network.weights), _biases(prepared)
    errors = [_errors(prepared, layer, biases[layer]) for layer in range(space.num_layers)]
    replaced = {i: QuantizedLayer(weight, biases[i]) for i, weight in enumerate(weights)}
    layers_with_bias = [layer for layer, bias in enumerate(biases) if bias is not None]
    inputs = [*weights, *(bias for bias in biases if bias is not None)]
    packed = criteria.packed(criterion, network.outputs)
    differentiable = network.differentiable()
    sums = torch.zeros((2, 1 + space.num_options), dtype=torch.float64, device=network.device)
    for n in range(len(images)):
        logits = differentiable.recorded_logits(outside_inference(images[n : n + 1]), replaced)
        log_p = logits[0].double().log_softmax(-1)
        label = None if labels is None else labels[n : n + 1]
        sums[:, 0] += packed.of(logits.detach(), label)(logits.detach()).sum()
        if packed.needs_targets:
            y = -1 if labels is None else int(labels[n])
        else:
            total = log_p.detach().exp().cumsum(0).cpu().numpy()
            y = min(int(np.searchsorted(total, random.random() * total[-1], side="right")), len(total) - 1)
        slopes = torch.autograd.grad(log_p[y], inputs, allow_unused=True, materialize_grads=True)
        bias_slopes = dict(zip(layers_with_bias, slopes[len(weights) :], strict=True))
        for layer, (of_weight, of_bias) in enumerate(errors):
            options = slice(1 + space.offsets[layer], 1 + space.offsets[layer + 1])
            slope = slopes[layer].reshape(-1).to(of_weight.dtype)
            first = of_weight @ slope
            if of_bias is not None:
                first = first + of_bias @ bias_slopes[layer].reshape(-1).to(of_bias.dtype)
            sums[0, options] += first.double().square()
            sums[1, options] += (of_weight.square() @ slope.square()).double()
    return sums.cpu().numpy()


def _biases(prepared: Prepared) -> list[Tensor | None]:
    """Leaf tensors for the biases that an option of the layer changes. They are zero if the float layer has no bias."""
    space, float_biases = prepared.space, prepared.network.biases
    biases: list[Tensor | None] = []
    for layer in range(space.num_layers):
        changed = [prepared.layers[k].bias for k in space.options_of(layer)]
        example = next((bias for bias in changed if bias is not None), None)
        if example is None:
            biases.append(None)
            continue
        float_bias = float_biases[layer]
        biases += leaves([torch.zeros_like(example) if float_bias is None else float_bias])
    return biases


def _errors(prepared: Prepared, layer: int, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The change of each option from the float layer: (options of a layer, weights) and (options, bias).

    They are float32 at least, because squares of small errors leave float16's range.
    """
    weight = prepared.network.weights[layer]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    layers = [prepared.layers[k] for k in prepared.space.options_of(layer)]
    of_weight = torch.stack([(m.weight - weight).reshape(-1).detach().clone() for m in layers]).to(dtype)
    if bias is None:
        return of_weight, None
    of_bias = torch.stack([(bias * 0 if m.bias is None else m.bias - bias).detach().reshape(-1).clone() for m in layers])
    return of_weight, of_bias.to(dtype)
