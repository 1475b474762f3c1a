"""Estimators: ways to compute the interaction matrix from measurements. NumPy only.

To add an estimator, add a file to this folder with an object `estimator = Estimator(...)`, and subclass `EstimatorContract`
(tests/contracts/estimator.py) for it. The file's name is the estimator's name. Its docstring cites its source and says what it
costs.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from clado.errors import ConfigurationError, MeasurementError
from clado.interaction.matrix import Convexity, InteractionMatrix
from clado.measuring.kinds import tile_kind, tile_kinds
from clado.measuring.pair_kind import PairKind
from clado.measuring.plan import Plan
from clado.plugins import available, load
from clado.space import SearchSpace

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """The measurements: for each tile kind an array of sums over images. The first axis is the sample block.

    The other axes have the shape of the tile kind (`TileKind.shape`). If gram was measured, its first row is singles.
    """

    space: SearchSpace
    """The space whose options are rows and columns."""
    criterion: str
    """Name of the measured loss."""
    counts: NDArray[np.int64]
    """(blocks,) images of each sample block."""
    sums: Mapping[str, Array]
    """Sums over the images of each block, by tile kind."""

    def __post_init__(self) -> None:
        if "gram" in self.sums and "singles" not in self.sums:
            object.__setattr__(self, "sums", {**self.sums, "singles": self.sums["gram"][:, 0]})

    @property
    def num_images(self) -> int:
        """Images of the sensitivity set."""
        return int(self.counts.sum())

    def block_means(self, kind: str) -> Array:
        """Means over each block's images."""
        values = self.sums[kind]
        return values / self.counts.reshape(-1, *[1] * (values.ndim - 1))

    def mean(self, per_block: Array) -> Array:
        """Mean over all images of per-block means (blocks, ...)."""
        return np.tensordot(self.counts / self.num_images, per_block, 1)

    def standard_error(self, per_block: Array) -> Array | None:
        """Standard error of `mean` from the scatter of the blocks. None with fewer than two blocks."""
        blocks = len(self.counts)
        if blocks < 2:
            return None
        weights = self.counts / self.num_images
        deviation = per_block - self.mean(per_block)
        variance = np.tensordot(weights**2, deviation**2, 1) * blocks / (blocks - 1)
        return np.sqrt(variance)

    def baseline(self) -> float:
        """Mean loss of the float network."""
        kind = next(kind for kind in ("singles", "trace", "gradients") if kind in self.sums)
        loss = float(self.mean(self.block_means(kind)).flat[0])
        if not np.isfinite(loss):
            raise MeasurementError(
                "the float network's own loss on the sensitivity set is NaN or infinite; expected a finite loss: "
                "are the images normalised as the network expects?"
            )
        return loss

    def increases(self) -> Array:
        """Loss increase of each single option in each block (blocks, K): ℓ({i:a})."""
        means = self.block_means("singles")
        return means[:, 1:] - means[:, :1]


@dataclass(frozen=True)
class Estimator:
    """Everything that the rest of the code must know about an estimator."""

    estimate: Callable[[Measured], InteractionMatrix]
    """Makes the matrix. `estimate` of this package then adds the estimator's name and `convexity` to it."""
    kinds: tuple[str, ...]
    """Tile kinds that it reads (names of files in `clado/measuring/kinds/`)."""
    convexity: Convexity = "raw"
    """How its matrix is solved. "clip_psd": noise makes it indefinite, and clipping regularises (CLADO, section 4.2)."""
    sees_weights_only: bool = False
    """Whether it covers errors of weights only, and not of activations."""
    is_safe: bool = False
    """Whether a chosen assignment must not have more measured loss than this estimator's. The verdict compares with it."""
    proposes_always: bool = False
    """Whether it also proposes if the settings do not name it, as long as all its tiles are measured anyway."""
    prediction_order: int = 100
    """Some estimators only rank assignments. Of those that predict losses, the one of least order predicts for them."""
    interaction_order: int | None = None
    """In the verdict, the estimator of least order represents interactions. None: the estimator has none."""

    @property
    def needs_single_images(self) -> bool:
        """Whether it reads the gradient of every single image."""
        return "gradients" in self.kinds


def estimator_of(name: str) -> Estimator:
    """The estimator of a name, or of `package.module:name`."""
    estimator: Estimator = load("estimators", name)
    return estimator


def safe_estimators() -> tuple[str, ...]:
    """Estimators of this folder that a chosen assignment must not be worse than."""
    return tuple(name for name in available("estimators") if estimator_of(name).is_safe)


def unreported_estimators(named: Collection[str], kinds: Collection[str]) -> tuple[str, ...]:
    """Estimators that propose in addition to the `named` ones. They cost solver time only, because they read `kinds` only.

    `layerwise` is one, so that the chosen assignment can be compared with it. The others rank assignments of large losses better
    (tests/benchmarks/STUDY.md).
    """
    measured = {*kinds, *({"singles"} if "gram" in kinds else ())}  # the first row of gram
    plugins = {name: estimator_of(name) for name in available("estimators") if name not in named}
    return tuple(name for name, plugin in plugins.items() if plugin.proposes_always and measured.issuperset(plugin.kinds))


def with_interactions(names: Collection[str]) -> list[str]:
    """The named estimators of this folder that have interactions, by their `interaction_order`."""
    orders = {name: estimator_of(name).interaction_order for name in available("estimators") if name in names}
    return sorted((name for name, order in orders.items() if order is not None), key=lambda name: orders[name] or 0)


def kinds_of(estimators: Iterable[str], has_corrections: bool = False) -> tuple[str, ...]:
    """All tile kinds that these estimators need. If there are corrections, also the kinds of uncorrected layers."""
    needed = {kind for name in estimators for kind in estimator_of(name).kinds}
    if has_corrections:
        needed |= {name for name, kind in tile_kinds().items() if kind.is_uncorrected}
    needed -= {name for name in needed if tile_kind(name).contained_in in needed}
    return tuple(name for name in tile_kinds() if name in needed)


def check_criterion(names: Iterable[str], criterion: str, offers: Collection[str]) -> None:
    """Raises ConfigurationError if an estimator needs more of the criterion than it offers (`TileKind.needs`).

    Raises:
        ConfigurationError: The message names the estimator, and others that need less.
    """
    for name in names:
        needed = {tile_kind(kind).needs for kind in kinds_of([name])} - {None, *offers}
        if "curvature" in needed:
            raise ConfigurationError(
                f"estimator {name} needs the curvature of the criterion, and {criterion} states none; expected layerwise or "
                "pairwise, which need the loss alone, or clado.criteria.Criterion(loss, curvature=...)"
            )
        if needed:
            raise ConfigurationError(
                f"estimator {name} needs logits (N, C) and a criterion of their classes, not {criterion}; expected layerwise, "
                "pairwise, or gauss_newton where the criterion states its curvature"
            )


def costs(estimators: Iterable[str], plan: Plan) -> dict[str, tuple[int, int]]:
    """Estimator -> (forward images, backward images) that it takes alone, in whole passes. Shared tiles count for each."""
    images = {}
    for name in estimators:
        kinds = kinds_of([name])
        tiles = replace(plan, kinds=kinds).tiles
        images[name] = plan.forward_images(tiles), plan.backward_images(tiles)
    return images


def estimate(name: str, measured: Measured) -> InteractionMatrix:
    """The interaction matrix that an estimator computes from measurements."""
    estimator = estimator_of(name)
    with np.errstate(invalid="ignore"):  # infinity minus infinity is NaN; `quarantine` handles such a loss
        matrix = estimator.estimate(measured)
    return replace(matrix, estimator=name, convexity=estimator.convexity)


def uncorrected(measured: Measured) -> InteractionMatrix | None:
    """`layerwise` of layers rounded to nearest, without corrections.

    None if they were not measured, or where some layer works at no bit-width without corrections.
    """
    if "plain_singles" not in measured.sums:
        return None
    blocks = tile_kind("plain_singles").num_blocks(len(measured.counts))
    sums = {"singles": measured.sums["plain_singles"][:blocks]}
    with suppress(MeasurementError):
        return estimate("layerwise", replace(measured, counts=measured.counts[:blocks], sums=sums))
    return None


def non_finite(measured: Measured) -> list[str]:
    """A line for each option with a NaN or infinite loss in some block, and for each such pair of options that are finite alone.

    A line names layers, bits and sample blocks, and the consequence: an option is excluded, a pair is forbidden.
    """
    space = measured.space

    def where(bad: NDArray[np.bool_]) -> str:
        blocks = np.flatnonzero(bad)
        return f"in sample block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, blocks))}"

    if "singles" not in measured.sums:
        return []  # a gradient that is NaN excludes its option
    singles: NDArray[np.bool_] = ~np.isfinite(measured.sums["singles"][:, 1:])
    alone = np.asarray(singles.any(axis=0))
    lines = [
        f"{space.label(int(k))} has a NaN or infinite loss {where(singles[:, k])}: this candidate is excluded"
        for k in np.flatnonzero(alone)
    ]
    for name, kind in tile_kinds().items():
        if name not in measured.sums or not isinstance(kind, PairKind):
            continue
        counted = kind.mask(space) & ~alone[:, None] & ~alone[None, :]
        pairs: NDArray[np.bool_] = ~np.isfinite(measured.sums[name]) & counted
        lines += [
            f"{space.label(int(k))} with {space.label(int(m))} has a NaN or infinite loss {where(pairs[:, k, m])}: "
            "the two are not chosen together"
            for k, m in np.argwhere(pairs.any(axis=0))
        ]
    return lines


def quarantine(measured: Measured, increases: Array) -> tuple[tuple[int, ...], Array]:
    """The options whose single loss is NaN or infinite, and the increases with 0 for these options.

    Raises MeasurementError if a layer loses every candidate.
    """
    bad = ~np.isfinite(increases)
    if not bad.any():
        return (), increases
    space = measured.space
    dead = [space.layers[i].name for i in range(space.num_layers) if bad[space.offsets[i] : space.offsets[i + 1]].all()]
    if dead:
        raise MeasurementError(
            f"every bit-width of {', '.join(dead)} gives a NaN or infinite loss; "
            "give these layers wider bits, or name them in fixed"
        )
    return tuple(int(k) for k in np.flatnonzero(bad)), np.where(bad, 0.0, increases)


def diagonal_matrix(measured: Measured, per_block: Array, ranking_only: bool = False) -> InteractionMatrix:
    """The diagonal matrix of values of each block (blocks, K), on the scale of twice a loss, with standard errors."""
    quarantined, values = quarantine(measured, measured.mean(per_block))
    errors = measured.standard_error(np.nan_to_num(per_block, nan=0.0, posinf=0.0, neginf=0.0))
    return InteractionMatrix(
        space=measured.space,
        values=np.diag(values),
        estimator="",  # `estimate` sets it
        criterion=measured.criterion,
        baseline=measured.baseline(),
        num_samples=measured.num_images,
        standard_error=None if errors is None else np.diag(errors),
        ranking_only=ranking_only,
        quarantined=quarantined,
    )
