"""Scores of an assignment for each sample of a sample block, by whole forward passes."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from clado import criteria
from clado.measuring.workbench import Array, Pass, Workbench, to_numpy
from clado.network.network import Network, Replaced
from clado.space import Assignment


class Scores(NamedTuple):
    """One number for each sample (n,)."""

    losses: Array
    """The criterion."""
    briers: Array | None
    """The Brier score. None for a criterion without classes."""
    hits: Array | None
    """1 where the top class stays right, else 0. None for a criterion without classes."""


def scores(bench: Workbench, assignment: Assignment, sample_block: int) -> Scores:
    """Scores of one assignment, partial or full, on a sample block, with the network of probes."""
    return score_passes(bench.criterion, bench.network, bench.chosen(assignment), bench.passes(sample_block))


def score_passes(criterion: Any, network: Network, replaced: Replaced, passes: Iterable[Pass]) -> Scores:
    """Scores of a network with layers replaced, pass after pass."""
    packed = criteria.packed(criterion, network.outputs)
    per_pass = []
    for part in passes:
        logits = network.logits(part.images, replaced)
        losses = part.loss(packed)(logits)
        if "classes" in packed.offers:
            arguments = logits, part.float_logits, part.labels
            per_pass.append(Scores(to_numpy(losses), to_numpy(packed.brier(*arguments)), to_numpy(packed.hits(*arguments))))
        else:
            per_pass.append(Scores(to_numpy(losses), None, None))
    return joined(per_pass)


def joined(parts: Sequence[Scores]) -> Scores:
    """Scores of several parts, in order."""
    losses, briers, hits = (
        None if any(part is None for part in column) else np.concatenate(column) for column in zip(*parts, strict=True)
    )
    assert losses is not None
    return Scores(losses, briers, hits)
