"""How far the images decide: each layer's bits in one estimator's answer under a bootstrap over sample blocks. NumPy only.

A resample draws sample blocks with replacement (Efron, 1979), estimates the matrix anew, and descends from the answer by the
moves of the local search (`local_search.settle`). A layer is *undecided* where fewer than 90 % of the resamples keep its bits.
What a run chooses, by measured losses, may be another answer, of which this says nothing.

How many images would do: drawing m times as many blocks has the sampling noise of m times as many images, σ/√(mN) (the m out of
n bootstrap, Bickel, Götze and van Zwet, 1997), around what was measured. The first multiple of 4 and 16 that leaves no layer
undecided is reported; it supposes that what was measured is the truth, so it is a guess and not a bound.
"""

from collections.abc import Callable, Mapping

import numpy as np

from clado.choosing.local_search import settle
from clado.choosing.program import Program
from clado.interaction.estimators import Measured
from clado.interaction.matrix import InteractionMatrix
from clado.records import Stability
from clado.space import Assignment

DECIDED = 0.9
MULTIPLES = (1, 4, 16)
RESAMPLES = 24


def resampled(measured: Measured, multiple: int, rng: np.random.Generator) -> Measured:
    """The measurement as another draw of `multiple` times as many blocks would have given it."""
    blocks = len(measured.counts)
    times = np.bincount(rng.integers(blocks, size=multiple * blocks), minlength=blocks)
    drawn = np.flatnonzero(times)
    sums = {kind: v[drawn] * times[drawn].reshape(-1, *[1] * (v.ndim - 1)) for kind, v in measured.sums.items()}
    return Measured(measured.space, measured.criterion, measured.counts[drawn] * times[drawn], sums)


def stability(
    measured: Measured,
    estimate: Callable[[Measured], InteractionMatrix],
    program: Callable[[InteractionMatrix, str], Program],
    answers: Mapping[str, Assignment],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Stability, ...]:
    """The stability of `answers`, one estimator's own to each budget; nothing with fewer than two sample blocks.

    `program(matrix, budget)` poses a matrix under the budget called so. Larger multiples are tried while a layer is undecided.
    """
    if len(measured.counts) < 2:
        return ()
    kept: dict[str, list[list[float]]] = {budget: [] for budget in answers}
    name = ""
    for multiple in MULTIPLES:
        left = [b for b, rows in kept.items() if not rows or min(rows[-1]) < DECIDED]
        rng = np.random.default_rng([seed, multiple])
        same = {budget: np.zeros(measured.space.num_layers) for budget in left}
        for _ in range(resamples if left else 0):
            matrix = estimate(resampled(measured, multiple, rng))
            name = matrix.estimator
            for budget in left:
                posed = program(matrix, budget)
                answer = answers[budget]
                found = posed.assignment(settle(posed, posed.choices(answer)))
                same[budget] += [a == b for a, b in zip(found.pairs, answer.pairs, strict=True)]
        for budget in left:
            kept[budget].append((same[budget] / resamples).tolist())
    return tuple(
        Stability(
            budget,
            name,
            measured.num_images,
            resamples,
            tuple(rows[0]),
            MULTIPLES[: len(rows)],
            tuple(sum(share < DECIDED for share in row) for row in rows),
        )
        for budget, rows in kept.items()
    )
