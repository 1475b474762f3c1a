"""Synthetic interaction matrices with the layer sizes of real networks, in four families.

The error that option (i, b) causes is a vector U_ib of length r with |U_ib| = s_i 2^-b. Here s_i² is log-normal over about 2.5
decades and grows with the layer. The direction of U_ib mixes a part common to all layers (share c²), a part that drifts from
layer to layer (AR) and a part per bit-width. G = U Uᵀ + noise, with in-layer entries other than the diagonal set to zero, as
`pairwise` stores them: that, and the noise, make G indefinite.

| family | common share | AR | r | resembles |
|---|---|---|---|---|
| weak | 0.03 | 0.2 | 1000 | layers that hardly interact |
| medium | 0.15 | 0.5 | 200 | |
| strong | 0.40 | 0.8 | 50 | errors that add up |
| lowrank | 0.10 | 0.5 | 10 | errors that cancel: the optimum is near 0, the hardest to prove |
"""

from pathlib import Path

import numpy as np

from clado.interaction.matrix import InteractionMatrix
from clado.space import Layer, SearchSpace

FAMILIES = {"weak": (0.03, 0.2, 1000), "medium": (0.15, 0.5, 200), "strong": (0.40, 0.8, 50), "lowrank": (0.10, 0.5, 10)}
NETWORKS = ("resnet20", "resnet18", "resnet50", "mobilenet_v3_large", "vit_b_16", "resnet101", "resnet152")
SHARED_BETWEEN_BITS = 0.56
RELATIVE_NOISE, ABSOLUTE_NOISE = 0.03, 1e-3

MEASURED = Path(__file__).parent / "measured"  # by measured_matrices.py
MEASURED_NETWORKS = ("resnet20_fashion_mnist", "mobilenetv2_fashion_mnist", "vit_fashion_mnist")
MEASURED_ESTIMATORS = ("pairwise", "gauss_newton")

MOBILENET_V3_LARGE = """
432 144 256 1024 576 1536 1728 648 1728 1728 1800 1728 1728 2880 4800 3000 3840 3840 4800 4800 3000 3840 3840 4800 9600 2160 19200
16000 1800 16000 14720 1656 14720 14720 1656 14720 38400 4320 57600 57600 53760 75264 6048 112896 112896 75264 75264 16800 112896
112896 107520 153600 24000 230400 230400 153600 153600 24000 230400 230400 153600 153600 1228800 1280000
"""


def layer_sizes(network: str) -> list[int]:
    """Numbers of weights of the searched tensors, as torchvision's networks have them (resnet20: the shipped network)."""
    if network == "mobilenet_v3_large":
        return [int(size) for size in MOBILENET_V3_LARGE.split()]
    if network == "vit_b_16":
        width = 768
        return [16 * 16 * 3 * width, *[3 * width**2, width**2, 4 * width**2, 4 * width**2] * 12, width * 1000]
    if network == "resnet20":
        return [144, *[2304] * 6, 4608, 9216, 512, *[9216] * 4, 18432, 36864, 2048, *[36864] * 4, 640]
    if network == "resnet18":
        sizes, before = [9408], 64
        for width in (64, 128, 256, 512):
            sizes += [
                9 * before * width,
                9 * width**2,
                *([before * width] if before != width else []),
                9 * width**2,
                9 * width**2,
            ]
            before = width
        return [*sizes, 512 * 1000]
    depths = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}[network]
    sizes, before = [9408], 64
    for width, depth in zip((64, 128, 256, 512), depths, strict=True):
        for block in range(depth):
            sizes += [before * width, 9 * width**2, 4 * width**2, *([before * 4 * width] if block == 0 else [])]
            before = 4 * width
    return [*sizes, 2048 * 1000]


def search_space(network: str, bits: tuple[int, ...]) -> SearchSpace:
    """The network's layers, named by number, with the same bit-widths each."""
    return SearchSpace.uniform(
        [Layer(f"layer{i}", (size,), "conv2d", macs=size) for i, size in enumerate(layer_sizes(network))], bits
    )


def measured(network: str, estimator: str) -> InteractionMatrix:
    """The matrix of a network of the zoo, with its layers named by number."""
    with np.load(MEASURED / f"{network}-{estimator}.npz", allow_pickle=False) as arrays:
        values, bits, sizes = arrays["values"], arrays["bits"].tolist(), arrays["sizes"].tolist()
    layers = [Layer(f"layer{i}", (size,), "conv2d") for i, size in enumerate(sizes)]
    return InteractionMatrix(SearchSpace.uniform(layers, bits), values, estimator, "kl_to_float", 0.0, 256)


def instance(network: str, bits: tuple[int, ...], family: str, seed: int) -> InteractionMatrix:
    """One matrix as `pairwise` would store it (indefinite); `Program.build(convexity="clip_psd")` clips it."""
    common_share, drift, rank = FAMILIES[family]
    space = search_space(network, bits)
    rng = np.random.default_rng([seed, sorted(FAMILIES).index(family), space.num_layers, *bits])
    sizes = np.array([layer.num_weights for layer in space.layers], dtype=float)
    scale = 10 ** (0.5 * (rng.normal(0.0, 0.6, space.num_layers) + 0.3 * np.log10(sizes / sizes.mean())))
    common = rng.normal(size=rank)
    drifting = rng.normal(size=rank)
    errors = []
    for layer, widths in enumerate(space.bit_widths):
        drifting = drift * drifting + np.sqrt(1 - drift**2) * rng.normal(size=rank)
        for b in widths:
            per_width = np.sqrt(SHARED_BETWEEN_BITS) * drifting + np.sqrt(1 - SHARED_BETWEEN_BITS) * rng.normal(size=rank)
            direction = np.sqrt(common_share) * common + np.sqrt(1 - common_share) * per_width
            errors.append(scale[layer] * 2.0**-b * direction / np.linalg.norm(direction))
    u = np.array(errors)
    gram = u @ u.T
    size = np.sqrt(np.diag(gram))
    noise = rng.normal(size=gram.shape)
    noise = np.triu(noise, 1) + np.triu(noise, 1).T
    gram = gram + RELATIVE_NOISE * noise * size[:, None] * size[None, :] + ABSOLUTE_NOISE * np.median(size) ** 2 * noise
    matrix = InteractionMatrix(space, (gram + gram.T) / 2, f"synthetic-{family}", "synthetic", 0.0, 1)
    off_diagonal = matrix.in_layer_mask() & ~np.eye(space.num_options, dtype=bool)
    return InteractionMatrix(space, np.where(off_diagonal, 0.0, matrix.values), matrix.estimator, "synthetic", 0.0, 1)
