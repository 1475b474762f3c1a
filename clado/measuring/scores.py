"""What an assignment does to each sample of a sample block, by whole forwards."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from clado import criteria
from clado.measuring.workbench import Array, Pass, Workbench, to_numpy
from clado.network.network import Network, Replaced
from clado.space import Assignment


class Scores(NamedTuple):
    """One number for each sample (n,)."""

    losses: Array
    """The criterion."""
    briers: Array
    """The Brier score."""
    hits: Array
    """1 where the top class stays right, else 0."""


def scores(bench: Workbench, assignment: Assignment, sample_block: int) -> Scores:
    """Scores of one assignment, partial or full, as probes see it."""
    return _scores(bench, bench.network, bench.chosen(assignment), bench.passes(sample_block))


def deployed_scores(bench: Workbench, network: Network, replaced: Replaced, sample_block: int) -> Scores:
    """Scores of a deployed network, with the layers that stand in it."""
    return _scores(bench, network, replaced, bench.deployed_passes(sample_block))


def _scores(bench: Workbench, network: Network, replaced: Replaced, parts: Sequence[Pass]) -> Scores:
    per_part = []
    for part in parts:
        logits = network.logits(part.images, replaced)
        given = bench.criterion, logits, part.float_logits, part.labels
        per_part.append((part.criterion(bench.criterion)(logits), criteria.brier(*given), criteria.hits(*given)))
    return Scores(*(np.concatenate([to_numpy(value) for value in column]) for column in zip(*per_part, strict=True)))
