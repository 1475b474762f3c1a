"""Traces of the Hessian in each layer's weights, by Hutchinson's estimate, times the squared error of every option."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clado import criteria
from clado.errors import NetworkError
from clado.grids import QuantizedLayer
from clado.measuring.measurements._autograd import leaves, random_numbers
from clado.measuring.plan import Tile
from clado.measuring.workbench import Array, Batch, Workbench, split
from clado.network.network import Network
from clado.network.tensors import outside_inference
from clado.quantization.preparation import Prepared


def measure(bench: Workbench, tile: Tile) -> Array:
    """(1 + K,) sums: see `average_traces`. On batch statistics the sample block is one batch."""
    images, labels = bench.loaded(tile.sample_block)
    at_once = images_at_once(bench.network, bench.batching.images_per_pass, bench.memory_limit)
    parts = split(images, labels, len(images) if bench.batch_statistics else at_once)
    random = random_numbers(bench, tile)
    return average_traces(bench.prepared, bench.criterion, parts, bench.num_vectors, random, bench.batch_statistics)


@torch.inference_mode(False)
@torch.enable_grad()
def average_traces(
    prepared: Prepared,
    criterion: Any,
    parts: Sequence[Batch],
    num_vectors: int,
    random: np.random.Generator,
    batch_statistics: bool = False,
) -> Array:
    """(1 + K,) sums over images: the float network's loss, then of each option tr(H_ii) / n_i · ‖Δ‖², n_i weights in layer i.

    The trace of the Hessian of the loss in a layer's weights is Hutchinson's estimate, mean v_iᵀ (H v)_i over `num_vectors`
    vectors v of random signs. A vector covers all layers at once, because blocks of other layers vanish in expectation. An image
    takes one forward and one backward pass, and for each vector another backward pass through both.
    """
    network, space = prepared.network, prepared.space
    weights = leaves(network.weights)
    vectors = [
        [torch.from_numpy(random.integers(0, 2, tuple(w.shape)) * 2.0 - 1.0).to(w) for w in weights] for _ in range(num_vectors)
    ]
    replaced = {i: QuantizedLayer(weight) for i, weight in enumerate(weights)}
    packed = criteria.packed(criterion, network.outputs)
    differentiable = (network.with_batch_statistics() if batch_statistics else network).differentiable()
    # numbers stay on the device until all work is queued, because reading one back would wait for the device
    loss = torch.zeros((), dtype=torch.float64, device=network.device)
    traces = torch.zeros(space.num_layers, dtype=torch.float64, device=network.device)
    for images, labels in parts:
        logits = differentiable.recorded_logits(outside_inference(images), replaced)
        total = packed.of(logits.detach(), labels)(logits).sum()
        loss += total.detach()
        _add_traces(traces, total, weights, vectors)
    norms = torch.stack(
        [
            (layer.weight - network.weights[option.layer]).double().square().sum() * traces[option.layer]
            for option, layer in zip(space.options, prepared.layers, strict=True)
        ]
    )
    sizes = np.array([space.layers[option.layer].num_weights for option in space.options])
    return np.concatenate([loss.reshape(1).cpu().numpy(), norms.cpu().numpy() / sizes])


def _add_traces(traces: Tensor, loss: Tensor, weights: Sequence[Tensor], vectors: Sequence[Sequence[Tensor]]) -> None:
    """Adds the mean of v_iᵀ (H v)_i over the vectors v to each layer's trace, where H is the Hessian of `loss`."""
    try:
        slopes = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True, materialize_grads=True)
        used = [i for i, slope in enumerate(slopes) if slope.requires_grad]
        for number, vector in enumerate(vectors, 1):
            products = torch.autograd.grad(
                [slopes[i] for i in used],
                [weights[i] for i in used],
                [vector[i] for i in used],
                retain_graph=number < len(vectors),
                allow_unused=True,
                materialize_grads=True,
            )
            for i, product in zip(used, products, strict=True):
                traces[i] += (vector[i] * product).sum(dtype=torch.float64) / len(vectors)
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        raise NetworkError(
            f"hawq needs second derivatives, which this network does not have ({error}); expected other estimators"
        ) from None


def images_at_once(network: Network, most: int, limit_bytes: int | None) -> int:
    """Images of one run that autograd records, at most `most`.

    Autograd keeps every layer's input and output, and second derivatives keep twice as much again. All of it takes at most a
    quarter of the limit (default 2 GB).
    """
    prefix_bytes = 8 * sum(place.cut.bytes_per_image for place in network.places)
    return max(1, min(most, (limit_bytes or 2 * 10**9) // (4 * max(1, prefix_bytes))))
