"""The interaction matrix Ĝ, which an estimator computes and a program minimises. NumPy only.

Row and column k is option k of the space (`space.py`). For a one-hot choice α the predicted loss increase is ½ αᵀ Ĝ α
(CLADO, arXiv 2307.05657, equation 8), so every estimator stores numbers on the scale of twice a loss.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from clado.bits import bits_text
from clado.errors import CladoError, MeasurementError
from clado.records.documents import space_document, space_of, unreadable
from clado.records.tabular import Tabular, pandas
from clado.space import Assignment, SearchSpace

Array = NDArray[np.float64]
Convexity = Literal["raw", "clip_psd"]
"""How a matrix is solved: unchanged, or without its negative eigenvalues."""

_FILE = "a matrix that `InteractionMatrix.save` wrote, or `clado run` in the folder matrices of a run"


@dataclass(frozen=True, repr=False)
class InteractionMatrix(Tabular):
    """A symmetric matrix over the K options of a space."""

    space: SearchSpace
    """The space of the options."""
    values: Array
    """The matrix, (K, K), float64."""
    estimator: str
    """The name of the estimator that made it."""
    criterion: str
    """The criterion that was measured."""
    baseline: float
    """Mean loss of the float network on the sensitivity set."""
    num_samples: int
    """Images of the sensitivity set."""
    standard_error: Array | None = None
    """Standard errors of the values, (K, K), if the estimator gives them."""
    ranking_only: bool = False
    """Whether ½ αᵀ Ĝ α only ranks assignments and is not a loss."""
    quarantined: tuple[int, ...] = ()
    """Options whose loss is NaN or infinite. A program must not choose them."""
    forbidden: tuple[tuple[int, int], ...] = ()
    """Pairs of options whose joint loss is NaN or infinite. A program must not choose them together."""
    convexity: Convexity = "raw"
    """How a program of this matrix is made convex. The estimator sets it."""

    def __post_init__(self) -> None:
        k = self.space.num_options
        if self.values.shape != (k, k):
            raise MeasurementError(f"the matrix has shape {self.values.shape}; the space has {k} options")
        faults = np.argwhere(~np.isfinite(self.values))
        if len(faults):
            row, column = faults[0]
            raise MeasurementError(f"the matrix holds a NaN or an infinity at {self.label(row)}, {self.label(column)}")
        if not np.array_equal(self.values, self.values.T):
            raise MeasurementError("the matrix is not symmetric")

    def label(self, option: int) -> str:
        """Layer and bits of an option, for messages and axes."""
        return self.space.label(option)

    def predicted_increase(self, assignment: Assignment) -> float:
        """½ αᵀ Ĝ α: the predicted increase of the mean loss (CLADO, equation 8).

        It is exact for at most two layers under `pairwise`.

        Args:
            assignment: The assignment. It may leave layers in float.

        Returns:
            The increase, in the unit of the criterion. It is infinite with a quarantined option or a forbidden pair.

        Raises:
            ConfigurationError: The assignment does not fit the space.
        """
        options = self.space.chosen_options(assignment)
        distinct = set(options)
        if not distinct.isdisjoint(self.quarantined) or any(distinct.issuperset(pair) for pair in self.forbidden):
            return float("inf")
        return 0.5 * float(self.values[np.ix_(options, options)].sum())

    def in_layer_mask(self) -> NDArray[np.bool_]:
        """True where row and column are options of the same layer, also on the diagonal."""
        owner = np.array([option.layer for option in self.space.options])
        return np.asarray(owner[:, None] == owner[None, :])

    def loss_of(self, objective: float) -> float | None:
        """The loss for a predicted increase.

        Args:
            objective: A predicted increase ½ αᵀ Ĝ α.

        Returns:
            The mean loss on the sensitivity set. None if the matrix only ranks assignments.
        """
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
        """The nearest positive semidefinite matrix: negative eigenvalues become 0 (CLADO, section 4.2)."""
        eigenvalues, vectors = np.linalg.eigh(self.values)
        if eigenvalues[0] >= 0:
            return self
        clipped = (vectors * np.maximum(eigenvalues, 0.0)) @ vectors.T
        return replace(self, values=(clipped + clipped.T) / 2)

    def shrink(self) -> "InteractionMatrix":
        """Shrinks cross terms by the share of their size that noise explains: positive-part James–Stein, v·max(0, 1 − Σs²/Σv²).

        The sums run over all pairs of layers at the same two candidates, such as 4 and 2 bits. Their terms have one order of
        magnitude (James and Stein, 1961; empirical Bayes with unequal groups: Efron and Morris, JASA 68, 1973). In-layer entries
        stay the same. Without a standard error the matrix stays the same.
        """
        if self.standard_error is None:
            return self
        numbers = {candidate: k for k, candidate in enumerate(sorted({o[1:] for o in self.space.options}, key=str))}
        number = np.array([numbers[option[1:]] for option in self.space.options])
        pools = np.maximum(number[:, None], number[None, :]) * len(numbers) + np.minimum(number[:, None], number[None, :])
        factor = np.ones_like(self.values)
        for pool in np.unique(pools):
            cross = (pools == pool) & ~self.in_layer_mask()
            signal, noise = float((self.values[cross] ** 2).sum()), float((self.standard_error[cross] ** 2).sum())
            factor[cross] = max(0.0, 1.0 - noise / signal) if signal else 1.0
        return replace(self, values=self.values * factor, standard_error=self.standard_error * factor)

    def summary(self) -> str:
        """Estimator, criterion, size and number of images, in one line."""
        images = f"{self.num_samples:,} image" + ("" if self.num_samples == 1 else "s")
        layers, options = self.space.num_layers, self.space.num_options
        return f"{self.estimator} of {self.criterion}: {layers} layers, {options} options, {images}"

    def rows(self) -> list[dict[str, Any]]:
        """Each option: layer, bits, weights, and its loss increase alone, ½ Ĝ_kk. The column is `score` if this is not a loss."""
        title, widths = "score" if self.ranking_only else "loss_alone", self.space.has_activations
        return [
            {
                "layer": self.space.layers[i].name,
                "bits": bits,
                **({"activation_bits": activation_bits} if widths else {}),
                "weights": self.space.layers[i].num_weights,
                title: None if k in self.quarantined else 0.5 * float(self.values[k, k]),
            }
            for k, (i, bits, activation_bits) in enumerate(self.space.options)
        ]

    def to_frame(self) -> Any:
        """The values as a pandas DataFrame, (K, K). Rows and columns are labelled with layer and bits."""
        labels = [self.label(k) for k in range(self.space.num_options)]
        return pandas().DataFrame(self.values, index=labels, columns=labels)

    def save(self, path: str | Path) -> None:
        """Writes the matrix as .npz, for `load`.

        Its arrays are `values`, `standard_error` (empty if there is none), `options`, the numbers of `quarantined` options,
        `forbidden` pairs (n, 2), and `ranking_only`. An option is "layer:4", or "layer:4/8" with activation bits. `document`
        holds the space and all other fields as JSON.

        Args:
            path: The file. Its folder is created if it is missing.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.stem}.{os.getpid()}.part.npz")
        errors = np.empty(0) if self.standard_error is None else self.standard_error
        options = np.array([f"{self.space.layers[i].name}:{bits_text(*bits)}" for i, *bits in self.space.options])
        document = {
            "space": space_document(self.space),
            **{name: getattr(self, name) for name in ("estimator", "criterion", "baseline", "num_samples", "convexity")},
        }
        np.savez_compressed(
            part,
            values=self.values,
            standard_error=errors,
            options=options,
            quarantined=np.array(self.quarantined, dtype=np.int64),
            forbidden=np.array(self.forbidden, dtype=np.int64).reshape(-1, 2),
            ranking_only=np.array(self.ranking_only),
            document=np.array(json.dumps(document)),
        )
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "InteractionMatrix":
        """The matrix that `save` wrote.

        Raises:
            StoreError: The file is missing, or holds something else.
        """
        try:
            with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                document = json.loads(str(file["document"]))
                errors = file["standard_error"]
                return cls(
                    **{**document, "space": space_of(document["space"])},
                    values=file["values"],
                    standard_error=errors if errors.size else None,
                    ranking_only=bool(file["ranking_only"]),
                    quarantined=tuple(file["quarantined"].tolist()),
                    forbidden=tuple((int(one), int(other)) for one, other in file["forbidden"]),
                )
        except (OSError, EOFError, KeyError, TypeError, ValueError, BadZipFile, CladoError) as error:
            raise unreadable(path, error, _FILE) from None
