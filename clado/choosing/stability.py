"""How far the sensitivity images determine the bits of each layer, by a bootstrap over sample blocks. NumPy only.

A resample draws sample blocks with replacement (Efron, 1979), estimates the matrix again, and descends from one estimator's
answer by the moves of the local search (`local_search.settle`). A layer is *undecided* where fewer than 90 % of the resamples
keep its bits. A run chooses by measured losses, and may choose another answer. The bootstrap says nothing about that one.

It also says how many images would be enough. With m times as many images there are m times as many blocks. A resample of this
many blocks has the sampling noise of m times as many images, σ/√(mN) (the m out of n bootstrap, Bickel, Götze and van Zwet,
1997). The first of the multiples 4 and 16 that leaves no layer undecided is reported. The resamples vary around the measured
values, not around the true ones, so this is a guess and not a bound.
"""

from collections.abc import Callable, Mapping

import numpy as np

from clado.choosing.local_search import settle
from clado.choosing.program import Program
from clado.interaction.estimators import Measured
from clado.interaction.matrix import InteractionMatrix
from clado.records.results import Stability
from clado.space import Assignment

DECIDED = 0.9  # share of the resamples that keep a layer's bits
MULTIPLES = (1, 4, 16)
RESAMPLES = 24


def resampled(measured: Measured, multiple: int, rng: np.random.Generator) -> Measured:
    """The measurement for another draw of sample blocks, with `multiple` times as many blocks."""
    num_blocks = len(measured.counts)
    repeats = np.bincount(rng.integers(num_blocks, size=multiple * num_blocks), minlength=num_blocks)
    blocks = np.flatnonzero(repeats)
    sums = {kind: v[blocks] * repeats[blocks].reshape(-1, *[1] * (v.ndim - 1)) for kind, v in measured.sums.items()}
    return Measured(measured.space, measured.criterion, measured.counts[blocks] * repeats[blocks], sums)


def stability(
    measured: Measured,
    estimate: Callable[[Measured], InteractionMatrix],
    program: Callable[[InteractionMatrix, str], Program],
    answers: Mapping[str, Assignment],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Stability, ...]:
    """The stability of one estimator's answers, one for each budget. Empty with fewer than two sample blocks.

    Args:
        measured: The measurement, by sample blocks.
        estimate: The estimator.
        program: Makes the program of a matrix under the budget of a name.
        answers: Name of a budget -> the estimator's answer.
        resamples: How many resamples are drawn at each multiple. Larger multiples are drawn while a layer is undecided.
        seed: The seed of the draws.
    """
    if len(measured.counts) < 2:
        return ()
    shares: dict[str, list[list[float]]] = {budget: [] for budget in answers}
    name = ""
    for multiple in MULTIPLES:
        undecided = [budget for budget, rows in shares.items() if not rows or min(rows[-1]) < DECIDED]
        rng = np.random.default_rng([seed, multiple])
        counts = {budget: np.zeros(measured.space.num_layers) for budget in undecided}
        for _ in range(resamples if undecided else 0):
            matrix = estimate(resampled(measured, multiple, rng))
            name = matrix.estimator
            for budget in undecided:
                counts[budget] += _equal_bits(program(matrix, budget), answers[budget])
        for budget in undecided:
            shares[budget].append((counts[budget] / resamples).tolist())
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
        for budget, rows in shares.items()
    )


def _equal_bits(program: Program, answer: Assignment) -> list[bool]:
    """For each layer, whether a descent from an answer keeps its bits."""
    settled = program.assignment(settle(program, program.choices(answer)))
    return [a == b for a, b in zip(settled.pairs, answer.pairs, strict=True)]
