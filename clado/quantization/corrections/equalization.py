"""Cross-layer equalisation: channels of a weight get equal ranges, and the float network computes the same function.

Channel c of a layer's result is divided by s_c, and the next layer's input channel is multiplied by it. This changes nothing if
everything between is positively homogeneous, f(x / s) = f(x) / s (Nagel et al., arXiv 1906.04721; Meller et al., arXiv
1902.01917). A channel's share p_c is its range `max |w|` divided by the tensor's range. Three scales are exact:

    between              divided by s                                multiplied by s        s
    layer, layer         output channels of the first, its bias      inputs of the second   √(p1 / p2): both shares become equal
    layer, batch norm    output channels, bias, mean; σ² + ε by s²                          p1: every share becomes 1
    batch norm, layer    γ and β                                     inputs of the layer    1 / p2: every share becomes 1

The first is the papers' √(r1 r2) / r2 with shares instead of ranges r. Shares also work for tensors of any size, and if some
channels may not be scaled. A batch norm that is not folded needs no compromise between two layers. Before it s ≤ 1, so that the
new variance is above the old one, and so valid. After it s ≥ 1, so that activations shrink, away from any clip. Quantizers with a
range for each output channel gain from input channels only. Rounds are repeated until no scale changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clado.network.graph import Graph
from clado.network.network import Network
from clado.quantization.corrections import NetworkCorrection
from clado.quantization.corrections._connections import Clip, Connection
from clado.quantization.corrections._survey import Survey, value_shapes

ROUNDS = 200
TOLERANCE = 1e-8  # smallest change of the logarithm of a scale, in float64


@dataclass(frozen=True)
class Pair:
    """Two neighbours of a network, and what happened to the channels between them."""

    first: str
    """The name of a layer."""
    second: str
    """The name of a layer, or of the batch norm directly after the first layer."""
    done: bool
    """Whether the channels were scaled."""
    note: str
    """The range of the scales, or the reason why nothing was scaled."""

    def __str__(self) -> str:
        return f"{self.first} -> {self.second}: {'equalised' if self.done else 'skipped'}, {self.note}"


@dataclass(frozen=True, eq=False)
class Equalization:
    """The changes by equalisation in a network."""

    tensors: dict[str, Tensor]
    """New values of parameters and buffers, by the module's names."""
    report: tuple[Pair, ...]
    """Every pair, in order of execution."""


@torch.inference_mode(False)  # ordinary tensors, even if the caller is in inference mode
@torch.no_grad()
def equalize(network: Network, observed: Sequence[Mapping[str, Tensor]]) -> Equalization:
    """Equalises neighbouring layers of a float network. Apply it with `network.updated(result.tensors)`.

    A connection is scaled between two searched layers whose values have no other reader. It may pass through ReLU, leaky ReLU,
    PReLU, pooling, zero padding, upsampling, and reshapes that keep channels apart. Depthwise and grouped convolutions are
    included. Weights that are tied, split or fixed stay the same. A channel whose weights are all zero keeps scale 1.

    A layer has one pair with the nearest layer that its result reaches. If a batch norm follows, it has another pair with
    this.

    Args:
        network: The float network.
        observed: What `observe` returns for blocks of calibration images. It matters only for clips from above, such as ReLU6:
            these are homogeneous below their clip. A channel is scaled there only if its measured maximum is below the clip,
            and the scaled maximum keeps a distance. Everywhere else the float network stays the same for every input, up to
            rounding.
    """
    graph = network.engine
    if not isinstance(graph, Graph):
        reason = "the network runs by whole forward passes, which do not show what lies between two layers"
        return Equalization({}, (Pair("every layer", "every layer", False, reason),))
    connections, clips = _surveyed(network, graph)
    maxima = {clip: _maximum([block[str(k)] for block in observed if str(k) in block]) for k, clip in enumerate(clips)}
    values = {name: graph.constants[slots[0]] for name, slots in graph.named.items()}
    magnitudes: dict[str, Tensor] = {}
    for connection in connections:
        connection.prepare(values, magnitudes, maxima)
    scaled = [connection for connection in connections if connection.reason is None]
    # batch norms first, because scaling there changes no activation
    scaled.sort(key=lambda connection: connection.columns is not None)
    for _ in range(ROUNDS):
        if max((connection.equalize(magnitudes) for connection in scaled), default=0.0) < TOLERANCE:
            break
    exact: dict[str, Tensor] = {}
    for connection in scaled:
        connection.apply(values, exact)
    rounded = {name: tensor.to(values[name].dtype) for name, tensor in exact.items()}
    tensors = {name: tensor for name, tensor in rounded.items() if not torch.equal(tensor, values[name])}
    return Equalization(tensors, tuple(map(_pair, connections)))


def _pair(connection: Connection) -> Pair:
    """The report of one connection."""
    if connection.reason is not None:
        return Pair(connection.first, connection.second, False, connection.reason)
    scale = connection.scale
    note = f"{len(scale)} channels, scales {float(scale.min()):.3g} to {float(scale.max()):.3g}"
    if connection.num_fixed:
        clip = f"the clip at {connection.clips[0].high:g}"
        note += f"; {connection.num_fixed} keep their scale, because their measured maximum reaches {clip}"
    return Pair(connection.first, connection.second, True, note)


def observe(network: Network, images: Sequence[Tensor]) -> dict[str, Tensor]:
    """What `equalize` must know about a block of calibration images: the largest value of each channel at each clip.

    Args:
        network: The float network.
        images: Batches (n, C, H, W).

    Returns:
        Number of the clip -> maxima (channels,), float64. Empty for a network without clips from above, and without images.
    """
    graph = network.engine
    if not isinstance(graph, Graph):
        return {}
    _, clips = _surveyed(network, graph)
    order = sorted(enumerate(clips), key=lambda numbered: numbered[1].position)
    observed: dict[str, Tensor] = {}
    with torch.inference_mode():
        for batch in images if clips else ():
            state = graph.begin(batch.to(network.device))
            for k, clip in order:
                state = graph.run(state, clip.position, {})
                value = state.values[clip.slot]
                largest = value.amax([axis for axis in range(value.ndim) if axis != clip.layout.axis])
                largest = largest.reshape(-1, clip.layout.repeat).amax(1).double()
                observed[str(k)] = torch.maximum(observed[str(k)], largest) if str(k) in observed else largest
    return {k: maxima.clone() for k, maxima in observed.items()}


def reads_images(network: Network) -> bool:
    """Whether there are clips from above between neighbours."""
    return isinstance(network.engine, Graph) and bool(_surveyed(network, network.engine)[1])


def _surveyed(network: Network, graph: Graph) -> tuple[list[Connection], list[Clip]]:
    """The connections of a network, and the clips from above between them."""
    example = network.example.to(network.device)
    survey = Survey(graph, [value_shapes(graph, example.repeat(n, *[1] * (example.ndim - 1))) for n in (2, 3)])
    connections = list(survey.connections())
    return connections, [clip for connection in connections for clip in connection.clips]


def _maximum(blocks: Sequence[Tensor]) -> Tensor | None:
    """The largest values of all blocks. None without blocks."""
    return torch.stack(list(blocks)).amax(0) if blocks else None


correction = NetworkCorrection(observe, equalize, reads_images)
