"""The interaction matrix Ĝ: what an estimator makes of its measurements, and what a program minimises. NumPy only.

Row and column k is option k of the space (`space.py`). For a one-hot choice α the predicted loss increase is ½ αᵀ Ĝ α
(CLADO, arXiv 2307.05657, equation 8), so every estimator stores numbers on the scale of twice a loss.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from clado.errors import MeasurementError
from clado.space import Assignment, SearchSpace, bits_text

Array = NDArray[np.float64]
Convexity = Literal["raw", "clip_psd"]
"""How a matrix is solved: as it is, or without its negative eigenvalues."""


@dataclass(frozen=True)
class InteractionMatrix:
    """A symmetric (K, K) float64 matrix over the options of a space.

    `baseline` is the mean loss of the float network on the sensitivity set; `standard_error` (K, K) belongs to `values`, where
    the estimator has one; `ranking_only` says that ½ αᵀ Ĝ α orders assignments but is not a loss. `quarantined` options
    have a loss that is NaN or infinite on their own, `forbidden` pairs of options together: a program must not choose them.
    `convexity` is how its estimator wants it solved.
    """

    space: SearchSpace
    values: Array
    estimator: str
    criterion: str
    baseline: float
    num_samples: int
    standard_error: Array | None = None
    ranking_only: bool = False
    quarantined: tuple[int, ...] = ()
    forbidden: tuple[tuple[int, int], ...] = ()
    convexity: Convexity = "raw"

    def __post_init__(self) -> None:
        k = self.space.num_options
        if self.values.shape != (k, k):
            raise MeasurementError(f"the matrix has shape {self.values.shape}; the space has {k} options")
        bad = np.argwhere(~np.isfinite(self.values))
        if len(bad):
            raise MeasurementError(f"the matrix holds a NaN or an infinity at {self.label(bad[0][0])}, {self.label(bad[0][1])}")
        if not np.array_equal(self.values, self.values.T):
            raise MeasurementError("the matrix is not symmetric")

    def label(self, option: int) -> str:
        """Layer and bits of an option, for messages and axes."""
        return self.space.label(option)

    def predicted_increase(self, assignment: Assignment) -> float:
        """½ αᵀ Ĝ α: the predicted increase of the mean loss; exact for at most two layers under `pairwise`. Infinite with an
        option that is quarantined, or a pair that is forbidden."""
        chosen = self.space.chosen_options(assignment)
        taken = set(chosen)
        if not taken.isdisjoint(self.quarantined) or any(taken.issuperset(pair) for pair in self.forbidden):
            return float("inf")
        return 0.5 * float(self.values[np.ix_(chosen, chosen)].sum())

    def in_layer_mask(self) -> NDArray[np.bool_]:
        """True where row and column are options of one layer (diagonal included)."""
        owner = np.array([option.layer for option in self.space.options])
        return np.asarray(owner[:, None] == owner[None, :])

    def loss_of(self, objective: float) -> float | None:
        """The loss that a predicted increase stands for; None where the matrix only orders assignments."""
        return None if self.ranking_only else self.baseline + objective

    def diagonal_only(self) -> "InteractionMatrix":
        """The same matrix without interactions."""
        return replace(self, values=np.diag(np.diag(self.values)), standard_error=None)

    def negative_share(self) -> float:
        """Σ|negative eigenvalues| / Σ|eigenvalues|: 0 for a positive semidefinite matrix."""
        eigenvalues = np.linalg.eigvalsh(self.values)
        total = float(np.abs(eigenvalues).sum())
        return float(-eigenvalues[eigenvalues < 0].sum()) / total if total else 0.0

    def clip_psd(self) -> "InteractionMatrix":
        """The nearest positive semidefinite matrix: negative eigenvalues become 0 (CLADO, section 4.2). Changes the objective."""
        eigenvalues, vectors = np.linalg.eigh(self.values)
        if eigenvalues[0] >= 0:
            return self
        clipped = (vectors * np.maximum(eigenvalues, 0.0)) @ vectors.T
        return replace(self, values=(clipped + clipped.T) / 2)

    def shrink(self) -> "InteractionMatrix":
        """Cross terms drawn towards zero as far as their noise explains them: positive-part James–Stein, v·max(0, 1 − Σs²/Σv²).

        The sums run over all pairs of layers at the same two candidates (4 and 2 bits, say), whose terms are of one order of
        magnitude (James and Stein, 1961; empirical Bayes with unequal groups: Efron and Morris, JASA 68, 1973). In-layer entries
        stay. The same matrix where there is no standard error.
        """
        if self.standard_error is None:
            return self
        numbers = {candidate: k for k, candidate in enumerate(sorted({o[1:] for o in self.space.options}, key=str))}
        number = np.array([numbers[option[1:]] for option in self.space.options])
        pool = np.maximum(number[:, None], number[None, :]) * len(numbers) + np.minimum(number[:, None], number[None, :])
        factor = np.ones_like(self.values)
        for pair in np.unique(pool):
            cross = (pool == pair) & ~self.in_layer_mask()
            signal, noise = float((self.values[cross] ** 2).sum()), float((self.standard_error[cross] ** 2).sum())
            factor[cross] = max(0.0, 1.0 - noise / signal) if signal else 1.0
        return replace(self, values=self.values * factor, standard_error=self.standard_error * factor)

    def save(self, path: Path) -> None:
        """Keeps the matrix as .npz: `values`, `standard_error` (empty where there is none), `options`: "layer:4", or "layer:4/8"
        with activation bits, numbers of those that are `quarantined`, `forbidden` pairs (n, 2), and `ranking_only`.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.stem}.{os.getpid()}.part.npz")
        errors = np.empty(0) if self.standard_error is None else self.standard_error
        options = np.array([f"{self.space.layers[i].name}:{bits_text(*bits)}" for i, *bits in self.space.options])
        np.savez_compressed(
            part,
            values=self.values,
            standard_error=errors,
            options=options,
            quarantined=np.array(self.quarantined, dtype=np.int64),
            forbidden=np.array(self.forbidden, dtype=np.int64).reshape(-1, 2),
            ranking_only=np.array(self.ranking_only),
        )
        part.replace(path)
