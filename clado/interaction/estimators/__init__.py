"""Estimators: ways to make the interaction matrix of measurements. NumPy only.

An estimator is a module of this folder with

    KINDS: tuple of the tile kinds that it needs (names of files in `clado/measuring/kinds/`)
    estimate(measured: Measured) -> InteractionMatrix

Its docstring cites its source and says what it costs. Names are file names; a new file is a new estimator.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from clado.errors import ConfigurationError, MeasurementError
from clado.interaction.matrix import InteractionMatrix
from clado.measuring.kinds import tile_kind, tile_kinds
from clado.measuring.pair_kind import PairKind
from clado.measuring.plan import Plan
from clado.plugins import available, nearest
from clado.space import SearchSpace

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """What was measured: for each kind an array whose first axis is the sample block, of sums over the block's images.

    `counts` (blocks,) are images per block. The shape behind the first axis is that of the tile kind (`TileKind.shape`). Singles
    are the first row of gram, where that was measured.
    """

    space: SearchSpace
    criterion: str
    counts: NDArray[np.int64]
    sums: Mapping[str, Array]

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
        """Standard error of `mean` from the scatter of the blocks; None with fewer than two blocks."""
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
        """Per-block loss increases of the options alone (blocks, K): ℓ({i:a})."""
        means = self.block_means("singles")
        return means[:, 1:] - means[:, :1]


def kinds_of(estimators: Iterable[str], has_corrections: bool = False) -> tuple[str, ...]:
    """Kinds of tiles that these estimators need between them, and those of uncorrected layers where there are corrections."""
    needed = {kind for name in estimators for kind in _module(name).KINDS}
    if has_corrections:
        needed |= {name for name, kind in tile_kinds().items() if kind.is_uncorrected}
    needed -= {name for name in needed if tile_kind(name).contained_in in needed}
    return tuple(name for name in tile_kinds() if name in needed)


def costs(estimators: Iterable[str], plan: Plan) -> dict[str, tuple[int, int]]:
    """Estimator -> (forward images, backward images) that it takes on its own, in whole passes; what two share counts in both."""
    found = {}
    for name in estimators:
        kinds = kinds_of([name])
        tiles = replace(plan, kinds=kinds).tiles
        found[name] = plan.forward_images(tiles), plan.backward_images(tiles)
    return found


def estimate(name: str, measured: Measured) -> InteractionMatrix:
    """The interaction matrix that an estimator makes of the measurements."""
    with np.errstate(invalid="ignore"):  # infinity minus infinity is NaN: a loss that `quarantine` deals with
        matrix: InteractionMatrix = _module(name).estimate(measured)
    return matrix


def uncorrected(measured: Measured) -> InteractionMatrix | None:
    """`layerwise` of layers rounded to nearest, without corrections.

    None where they were not measured, or where some layer works at no bit-width without corrections.
    """
    if "plain_singles" not in measured.sums:
        return None
    with suppress(MeasurementError):
        return estimate("layerwise", replace(measured, sums={"singles": measured.sums["plain_singles"]}))
    return None


def non_finite(measured: Measured) -> list[str]:
    """One line for each option, and each pair of options that are finite alone, whose loss is NaN or infinite in some block.

    Names layers, bits and sample blocks, and what follows: an option is excluded, a pair is forbidden.
    """
    space = measured.space

    def where(bad: NDArray[np.bool_]) -> str:
        blocks = np.flatnonzero(bad)
        return f"in sample block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, blocks))}"

    if "singles" not in measured.sums:
        return []  # nothing was measured that could overflow: a gradient that is no number excludes its option
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


def _module(name: str) -> ModuleType:
    if name not in available("estimators"):
        valid = available("estimators")
        raise ConfigurationError(f"unknown estimator {name!r}; expected one of {', '.join(valid)}{nearest(name, valid)}")
    return import_module(f"clado.interaction.estimators.{name}")


def quarantine(measured: Measured, increases: Array) -> tuple[tuple[int, ...], Array]:
    """(options whose own loss is NaN or infinite, the increases with 0 in their place).

    Raises MeasurementError where a layer loses every candidate.
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


def diagonal_matrix(estimator: str, measured: Measured, per_block: Array, ranking_only: bool = False) -> InteractionMatrix:
    """The diagonal matrix of per-block values (blocks, K) on the scale of twice a loss, with their standard errors."""
    quarantined, values = quarantine(measured, measured.mean(per_block))
    errors = measured.standard_error(np.nan_to_num(per_block, nan=0.0, posinf=0.0, neginf=0.0))
    return InteractionMatrix(
        space=measured.space,
        values=np.diag(values),
        estimator=estimator,
        criterion=measured.criterion,
        baseline=measured.baseline(),
        num_samples=measured.num_images,
        standard_error=None if errors is None else np.diag(errors),
        ranking_only=ranking_only,
        quarantined=quarantined,
    )
