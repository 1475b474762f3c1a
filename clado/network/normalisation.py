"""Statistics of batch norms' inputs with layers replaced, measured in execution order."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from clado.grids import QuantizedLayer
from clado.network.graph import Graph
from clado.network.whole_forwards import WholeForwards

CACHED = 2**17  # values whose moments are computed at once
Moments = tuple[Tensor, Tensor]  # mean and variance of each channel, (channels,) each


@dataclass(frozen=True)
class NormStatistics:
    """The statistics of a batch norm, and those of its input over images and positions."""

    mean: str
    """Name of the buffer of the running mean."""
    variance: str
    """Name of the buffer of the running variance."""
    eps: float
    """ε, which is added to the variance."""
    trained: Moments
    """The network's own statistics."""
    seen: Moments
    """The measured statistics of its input."""


Statistics = Callable[[NormStatistics], Moments]


def as_seen(norm: NormStatistics) -> Moments:
    """The statistics of the batch norm's input, instead of its own."""
    return norm.seen


def normalisation(
    engine: Graph | WholeForwards, batches: Sequence[Tensor], replaced: Mapping[int, QuantizedLayer], statistics: Statistics
) -> dict[str, Tensor]:
    """New statistics of batch norms, measured with layers replaced.

    Earlier batch norms of the network already have their new statistics. A graph runs once for all
    batch norms. Whole forward passes run once for each of them.

    Args:
        engine: What runs the network.
        batches: Batches of images (n, C, H, W).
        replaced: Layer -> its replacement.
        statistics: Computes a batch norm's new statistics from its own ones and those of its input.

    Returns:
        Buffer name -> statistic (channels,), in execution order.
    """
    if isinstance(engine, Graph):
        return _of_graph(engine, batches, replaced, statistics)
    return _of_modules(engine, batches, replaced, statistics)


def _of_graph(
    graph: Graph, batches: Sequence[Tensor], replaced: Mapping[int, QuantizedLayer], statistics: Statistics
) -> dict[str, Tensor]:
    buffers: dict[str, Tensor] = {}
    # from the images on, because a layer before the first batch norm may not be searched
    states = [graph.start(batch) for batch in batches]
    absent = replaced  # a state keeps the replaced layers that it has not reached
    for norm in graph.norms:
        trained_mean, trained_variance = (graph.constants[graph.named[name][0]] for name in (norm.mean, norm.variance))
        moments_of_batches = []
        for k, state in enumerate(states):
            states[k] = graph.run(state, norm.position, absent)
            # immediately, while the values are in the cache
            moments_of_batches.append(batch_moments(states[k].values[norm.input_slot]))
        absent = {}
        measured = pooled(moments_of_batches, trained_mean.dtype)
        moments = statistics(NormStatistics(norm.mean, norm.variance, norm.eps, (trained_mean, trained_variance), measured))
        changed = dict(zip((norm.mean, norm.variance), moments, strict=True))
        buffers |= changed
        graph = graph.updated(changed)
    return buffers


def _of_modules(
    engine: WholeForwards, batches: Sequence[Tensor], replaced: Mapping[int, QuantizedLayer], statistics: Statistics
) -> dict[str, Tensor]:
    buffers: dict[str, Tensor] = {}
    changed = engine.changed
    for name, module in _norms_in_order(engine, batches[0][:1], replaced).items():
        inputs: list[BatchMoments] = []
        hook = module.register_forward_pre_hook(lambda _, arguments, inputs=inputs: inputs.append(batch_moments(arguments[0])))
        try:
            for batch in batches:
                engine.forward(batch, replaced)
        finally:
            hook.remove()
        if inputs:  # otherwise the images would decide whether it runs
            mean, variance = (f"{name}.{buffer}".lstrip(".") for buffer in ("running_mean", "running_var"))
            trained_mean, trained_variance = (changed.get(n, engine.model.get_buffer(n)) for n in (mean, variance))
            measured = pooled(inputs, trained_mean.dtype)
            moments = statistics(NormStatistics(mean, variance, module.eps, (trained_mean, trained_variance), measured))
            buffers |= zip((mean, variance), moments, strict=True)
            engine = engine.updated(buffers)
    return buffers


def _norms_in_order(engine: WholeForwards, image: Tensor, replaced: Mapping[int, QuantizedLayer]) -> dict[str, _BatchNorm]:
    """Batch norms with statistics, by name in execution order, except those that run twice."""
    modules = {
        name: module
        for name, module in engine.model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    order: list[str] = []
    hooks = [m.register_forward_pre_hook(lambda _, __, n=name: order.append(n)) for name, m in modules.items()]
    try:
        engine.forward(image, replaced)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: modules[name] for name, uses in Counter(order).items() if uses == 1}


@dataclass(frozen=True)
class BatchMoments:
    """Moments of each channel of one batch."""

    count: int
    """Number of values of a channel."""
    mean: Tensor
    """Mean (channels,), float64."""
    squares: Tensor
    """Sum of squared distances from the mean (channels,), float64."""


def batch_moments(values: Tensor) -> BatchMoments:
    """Moments of each channel of values (n, channels, ...).

    The values are read once, in parts that stay in the cache. Sums over a part are taken in float32 at least, about the mean of
    the first part, which keeps them small. Sums over parts are taken in float64.
    """
    channels, count = values.shape[1], values.numel() // values.shape[1]
    whole = values.flatten(2) if values.ndim > 2 else values[..., None]  # (n, channels, positions)
    parts = [
        part.to(torch.promote_types(values.dtype, torch.float32))
        for images in torch.split(whole, max(1, CACHED // whole[0].numel()))
        for part in torch.split(images, max(1, CACHED // channels), 2)
    ]
    centre = parts[0].mean((0, 2), keepdim=True)
    sums = squares = torch.zeros(channels, dtype=torch.float64, device=values.device)
    for part in parts:
        difference = part - centre
        sums = sums + difference.sum((0, 2)).double()
        squares = squares + difference.square_().sum((0, 2)).double()
    shift = sums / count
    return BatchMoments(count, centre.flatten().double() + shift, squares - count * shift.square())


def pooled(batches: Sequence[BatchMoments], dtype: torch.dtype) -> Moments:
    """Mean and unbiased variance of each channel over all batches, (channels,) each.

    By Chan, Golub and LeVeque 1983, in float64. How images are cut into batches changes only the rounding.
    """
    count = sum(batch.count for batch in batches)
    mean = torch.stack([batch.mean * (batch.count / count) for batch in batches]).sum(0)
    squares = torch.stack([batch.squares + (batch.mean - mean).square() * batch.count for batch in batches]).sum(0)
    return mean.to(dtype), (squares / max(1, count - 1)).to(dtype)
