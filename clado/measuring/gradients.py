"""What gradients through the float network say of each option: sums over the images of a sample block, by autograd.

Random numbers come from the seed and the sample block alone, so that they do not depend on which worker is asked, nor on its
device. Errors are those of the weights as they ship, in the network as it is (batch norms not folded).
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clado import criteria
from clado.errors import NetworkError
from clado.grids import QuantizedLayer
from clado.network.network import Network
from clado.network.tensors import outside_inference
from clado.quantization.preparation import Prepared

Array = NDArray[np.float64]


@torch.inference_mode(False)
@torch.enable_grad()
def squared_slopes(
    prepared: Prepared, criterion: str, images: Tensor, labels: Tensor | None, random: np.random.Generator
) -> Array:
    """(2, 1 + K) sums over images, of each sample's g = ∂ log p_y / ∂w; one forward and one backward an image.

    Row 0: the loss of the float network, then ⟨Δ_k, g⟩² of each option, where Δ_k holds the change of a layer's bias too. Row 1:
    the loss again, then Σ Δ_k² g² over the weights. y is the label where the criterion needs labels; else it is drawn from the
    float network's softmax, so that the expectation of g gᵀ is the Fisher information, KL's second order.
    """
    network, space = prepared.network, prepared.space
    weights = _leaves(network.weights)
    biases = _biases(prepared)
    errors = [_errors(prepared, layer, biases[layer]) for layer in range(space.num_layers)]
    replaced = {i: QuantizedLayer(weight, biases[i]) for i, weight in enumerate(weights)}
    given = [layer for layer, bias in enumerate(biases) if bias is not None]
    wanted = [*weights, *(bias for bias in biases if bias is not None)]
    differentiable = network.differentiable()
    sums = torch.zeros((2, 1 + space.num_options), dtype=torch.float64, device=network.device)
    for n in range(len(images)):
        logits = differentiable.recorded_logits(outside_inference(images[n : n + 1]), replaced)
        log_p = logits[0].double().log_softmax(-1)
        label = None if labels is None else labels[n : n + 1]
        sums[:, 0] += criteria.bind(criterion, logits.detach(), label)(logits.detach()).sum()
        if not criteria.criterion_of(criterion).needs_labels:
            total = log_p.detach().exp().cumsum(0).cpu().numpy()
            y = min(int(np.searchsorted(total, random.random() * total[-1], side="right")), len(total) - 1)
        else:
            y = -1 if labels is None else int(labels[n])
        slopes = torch.autograd.grad(log_p[y], wanted, allow_unused=True, materialize_grads=True)
        bias_slopes = dict(zip(given, slopes[len(weights) :], strict=True))
        for layer, (of_weight, of_bias) in enumerate(errors):
            where = slice(1 + space.offsets[layer], 1 + space.offsets[layer + 1])
            slope = slopes[layer].reshape(-1).to(of_weight.dtype)
            first = of_weight @ slope
            if of_bias is not None:
                first = first + of_bias @ bias_slopes[layer].reshape(-1).to(of_bias.dtype)
            sums[0, where] += first.double().square()
            sums[1, where] += (of_weight.square() @ slope.square()).double()
    return sums.cpu().numpy()


@torch.inference_mode(False)
@torch.enable_grad()
def average_traces(
    prepared: Prepared,
    criterion: str,
    parts: Sequence[tuple[Tensor, Tensor | None]],
    num_vectors: int,
    random: np.random.Generator,
    batch_statistics: bool = False,
) -> Array:
    """(1 + K,) sums over images: the float network's loss, then of each option tr(H_ii) / n_i · ‖Δ‖², n_i weights in layer i.

    The trace of the Hessian of the loss in a layer's weights is Hutchinson's estimate, mean v_iᵀ (H v)_i over `num_vectors`
    vectors v of random signs in all layers at once: other layers' blocks vanish in expectation. One forward and one backward an
    image, and another backward through both for each vector.
    """
    network, space = prepared.network, prepared.space
    weights = _leaves(network.weights)
    signs = [
        [torch.from_numpy(random.integers(0, 2, tuple(w.shape)) * 2.0 - 1.0).to(w) for w in weights] for _ in range(num_vectors)
    ]
    replaced = {i: QuantizedLayer(weight) for i, weight in enumerate(weights)}
    differentiable = (network.with_batch_statistics() if batch_statistics else network).differentiable()
    # numbers stay on the device until all of it is asked: reading one back would wait for the device each time
    loss = torch.zeros((), dtype=torch.float64, device=network.device)
    traces = torch.zeros(space.num_layers, dtype=torch.float64, device=network.device)
    for images, labels in parts:
        logits = differentiable.recorded_logits(outside_inference(images), replaced)
        total = criteria.bind(criterion, logits.detach(), labels)(logits).sum()
        loss += total.detach()
        try:
            slopes = torch.autograd.grad(total, weights, create_graph=True, allow_unused=True, materialize_grads=True)
            used = [i for i, slope in enumerate(slopes) if slope.requires_grad]
            inputs = [weights[i] for i in used]
            for v, vector in enumerate(signs):
                products = torch.autograd.grad(
                    [slopes[i] for i in used],
                    inputs,
                    [vector[i] for i in used],
                    retain_graph=v + 1 < num_vectors,
                    allow_unused=True,
                    materialize_grads=True,
                )
                for i, product in zip(used, products, strict=True):
                    traces[i] += (vector[i] * product).sum(dtype=torch.float64) / num_vectors
        except RuntimeError as error:
            if "not implemented" not in str(error):
                raise
            raise NetworkError(
                f"hawq needs second derivatives, which this network does not have ({error}); expected other estimators"
            ) from None
    norms = torch.stack(
        [
            (made.weight - network.weights[option.layer]).double().square().sum() * traces[option.layer]
            for option, made in zip(space.options, prepared.layers, strict=True)
        ]
    )
    sizes = np.array([space.layers[option.layer].num_weights for option in space.options])
    return np.concatenate([loss.reshape(1).cpu().numpy(), norms.cpu().numpy() / sizes])


def images_at_once(network: Network, most: int, limit_bytes: int | None) -> int:
    """Images of one recorded run, at most `most`: autograd keeps every layer's input and output, and second derivatives as much
    again twice over, within a quarter of the limit (default 2 GB)."""
    kept = 8 * sum(place.cut.bytes_per_image for place in network.places)
    return max(1, min(most, (limit_bytes or 2 * 10**9) // (4 * max(1, kept))))


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def _biases(prepared: Prepared) -> list[Tensor | None]:
    """Leaves for the biases that some option of the layer changes; zeros where the float layer has none."""
    space, own = prepared.space, prepared.network.biases
    found: list[Tensor | None] = []
    for layer in range(space.num_layers):
        given = [made.bias for made in prepared.layers[space.offsets[layer] : space.offsets[layer + 1]] if made.bias is not None]
        if not given:
            found.append(None)
            continue
        bias = own[layer]
        found += _leaves([torch.zeros_like(given[0]) if bias is None else bias])
    return found


def _errors(prepared: Prepared, layer: int, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(options of a layer, weights) and (options, bias): what each option adds to the float layer, float32 at least: squares of
    small errors leave float16's range."""
    kind = torch.promote_types(prepared.network.weights[layer].dtype, torch.float32)
    offsets, weight = prepared.space.offsets, prepared.network.weights[layer]
    made = prepared.layers[offsets[layer] : offsets[layer + 1]]
    of_weight = torch.stack([(m.weight - weight).reshape(-1).detach().clone() for m in made]).to(kind)
    if bias is None:
        return of_weight, None
    of_bias = torch.stack([(bias * 0 if m.bias is None else m.bias - bias).detach().reshape(-1).clone() for m in made])
    return of_weight, of_bias.to(kind)
