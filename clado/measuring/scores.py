"""What an assignment does to each sample of a sample block, by whole forwards."""

from collections.abc import Iterable
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
    """Scores of one assignment, partial or full, on a sample block, as probes see it."""
    return score_passes(bench.criterion, bench.network, bench.chosen(assignment), bench.passes(sample_block))


def score_passes(criterion: str, network: Network, replaced: Replaced, passes: Iterable[Pass]) -> Scores:
    """Scores of a network with layers replaced, pass after pass."""
    per_pass = []
    for part in passes:
        logits = network.logits(part.images, replaced)
        arguments = criterion, logits, part.float_logits, part.labels
        per_pass.append((part.criterion(criterion)(logits), criteria.brier(*arguments), criteria.hits(*arguments)))
    return Scores(*(np.concatenate([to_numpy(value) for value in column]) for column in zip(*per_pass, strict=True)))
