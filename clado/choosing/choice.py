"""The choice among proposals, by their measurements. NumPy only.

The quadratic model only proposes. The chosen assignment was measured as it would be deployed.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite

import numpy as np

from clado.choosing.constraints import Constraint
from clado.choosing.local_search import ordered
from clado.choosing.proposals import Budget, Proposal, merge_limits
from clado.interaction import estimators
from clado.interaction.matrix import Array, InteractionMatrix
from clado.records.results import CHOSEN, UNIFORM, Result
from clado.space import Assignment, SearchSpace

SIGNIFICANT = 2.0
"""A paired difference of more than this many standard errors is significant."""


def safe_methods() -> tuple[str, ...]:
    """A chosen assignment is measured to be no worse than these methods, nor than the same without corrections."""
    return UNIFORM, *estimators.safe_estimators()


def surrogate(matrices: Mapping[str, InteractionMatrix], losses: Mapping[Assignment, float]) -> str:
    """The estimator whose predictions rank the measured assignments best, by Spearman's correlation.

    Assignments without corrections and reconstructed ones do not count. Of equal estimators, the one with more interactions is
    returned.
    """
    measured = {a: loss for a, loss in losses.items() if isfinite(loss) and a.corrected in ("all", "static")}

    def quality(name: str) -> tuple[float, int]:
        matrix = matrices[name].clip_psd() if matrices[name].convexity == "clip_psd" else matrices[name]
        predicted = np.array([matrix.predicted_increase(a) for a in measured])
        return round(rank_correlation(predicted, np.array(list(measured.values()))), 9), int(np.count_nonzero(matrix.values))

    return max(matrices, key=quality)


def rank_correlation(one: Array, other: Array) -> float:
    """Spearman's correlation of two samples (n,). Ties are in the given order. 0 for fewer than two."""
    if len(one) < 2:
        return 0.0
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (one, other)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


@dataclass(frozen=True)
class Score:
    """The measurements that decide between assignments, in addition to their loss."""

    briers: Array
    """Brier score of each image (n,), or its loss if there are no classes."""
    hits: Array
    """1 for each image with the right top class, else 0 (n,). Empty if there are no classes."""

    @property
    def brier(self) -> float:
        """The mean Brier score."""
        return float(self.briers.mean())

    def misses_significantly(self, other: "Score") -> bool:
        """Whether fewer images hit than with the other, by more than two standard errors of the paired difference."""
        return _is_significant(other.hits - self.hits)

    def is_significantly_nearer(self, other: "Score") -> bool:
        """Whether the Brier score is less than the other's, by more than two standard errors of the paired difference.

        A finite score is nearer than one that is not finite.
        """
        if not isfinite(other.brier):
            return isfinite(self.brier)
        return _is_significant(other.briers - self.briers)


def _is_significant(differences: Array) -> bool:
    """Whether the mean is above zero by more than two standard errors. False for a single image, which has no standard error."""
    n = len(differences)
    return n > 1 and bool(differences.mean() > SIGNIFICANT * differences.std(ddof=1) / np.sqrt(n))


def choose(
    space: SearchSpace,
    proposals: Sequence[Proposal],
    losses: Mapping[Assignment, float],
    limits: Sequence[Constraint] = (),
    scores: Mapping[Assignment, Score] | None = None,
    accepted: Collection[Assignment] = (),
) -> list[Result]:
    """One result for each reported proposal, and one `chosen` for each budget.

    `chosen` is taken from all proposals that fit the budget, also from those for other budgets. Without `scores` it has the
    least measured loss; on a tie it is the smaller one. With scores it follows `_Measurements.best`: it is the best among the
    proposals of `safe_methods` and those without corrections. Another proposal is chosen only if it is significantly nearer to
    the float network.

    Args:
        space: Layers and their candidates.
        proposals: All measured proposals.
        losses: Measured losses. NaN is as bad as infinity.
        limits: Limits that hold for every budget.
        scores: Brier scores and hits of the same measurement, image by image.
        accepted: The assignments that an earlier choice chose, and their reconstructions. No chosen one has more loss than they.
    """
    measurements = _Measurements(space, losses, scores, frozenset(accepted))
    results = []
    for budget in dict.fromkeys(proposal.budget for proposal in proposals):
        made_for_it = [proposal for proposal in proposals if proposal.budget == budget]
        results += [measurements.result(proposal) for proposal in made_for_it if proposal.reported]
        # of equal assignments the one made for this budget comes first, so that its method is named
        ordered_proposals = [*made_for_it, *(proposal for proposal in proposals if proposal.budget != budget)]
        limits_of_budget = merge_limits(budget.limit(space), limits)
        fitting = [p for p in ordered_proposals if all(limit.holds(space, p.assignment) for limit in limits_of_budget)]
        chosen = measurements.best(fitting or made_for_it)  # uniform, if nothing fits
        results.append(measurements.chosen_result(chosen, budget, made_for_it))
    return results


@dataclass(frozen=True)
class _Measurements:
    """The measurements of every proposal."""

    space: SearchSpace
    """The options."""
    losses: Mapping[Assignment, float]
    """The measured loss of each proposal."""
    scores: Mapping[Assignment, Score] | None
    """Brier score and hits of each proposal, if they were counted."""
    accepted: frozenset[Assignment] = frozenset()
    """The assignments that an earlier choice chose, and their reconstructions."""

    def loss(self, proposal: Proposal) -> float:
        """The measured loss, or infinity for NaN."""
        return ordered(self.losses[proposal.assignment])

    def rank(self, proposal: Proposal) -> tuple[float, float, int]:
        """A key to sort by, best first: Brier score (or the loss if there are no scores), then loss, then size."""
        loss = self.loss(proposal)
        brier = loss if self.scores is None else ordered(self.scores[proposal.assignment].brier)
        return brier, loss, self.space.size_bits(proposal.assignment)

    def best(self, proposals: Sequence[Proposal]) -> Proposal:
        """The reference with the least loss, unless another proposal is significantly better.

        References are the proposals of `safe_methods`, those without corrections, and `accepted`. Another proposal competes if
        its loss is not above the reference's, and its Brier scores are significantly lower. The best by `rank` among these and
        the reference is taken. Proposals with significantly fewer hits than the one with most are left out.
        """
        if self.scores is None:
            return min(proposals, key=self.rank)
        scores, safe = self.scores, safe_methods()
        safe_too = {p.assignment for p in proposals if p.assignment.corrected == "none"} | self.accepted
        references = [p for p in proposals if p.method in safe or p.assignment in safe_too]
        # without a reference all compete
        reference = min(references, key=lambda p: (self.loss(p), *self.rank(p)), default=None)
        ranked = sorted((p for p in proposals if reference is None or self._competes(p, reference)), key=self.rank)
        best = scores[max(ranked, key=lambda p: scores[p.assignment].hits.sum()).assignment]
        return next(p for p in ranked if not scores[p.assignment].misses_significantly(best))

    def _competes(self, proposal: Proposal, reference: Proposal) -> bool:
        """Whether it is the reference, or is significantly nearer to the float network without more loss."""
        assert self.scores is not None
        one, other = self.scores[proposal.assignment], self.scores[reference.assignment]
        is_better = self.loss(proposal) <= self.loss(reference) and one.is_significantly_nearer(other)
        return proposal is reference or is_better

    def chosen_result(self, chosen: Proposal, budget: Budget, made_for_it: Sequence[Proposal]) -> Result:
        """The row `chosen` of a budget: the method that proposed it, and its gain over other proposals for the budget."""
        is_own = chosen.budget == budget
        winner = chosen.method if is_own else f"{chosen.method} for {chosen.budget.name}"
        # other assignments of the same local search are not compared with its answer
        rivals = [self.loss(p) for p in made_for_it if not (is_own and p.method == chosen.method)]
        loss = self.loss(chosen)
        gain = min(rivals) - loss if rivals and isfinite(loss) else 0.0
        return replace(self.result(replace(chosen, budget=budget, method=CHOSEN)), winner=winner, gain=gain)

    def result(self, proposal: Proposal) -> Result:
        """The row of a proposal."""
        score = None if self.scores is None else self.scores[proposal.assignment]
        return _result(self.space, proposal, self.loss(proposal), score)


def _result(space: SearchSpace, proposal: Proposal, loss: float, score: Score | None) -> Result:
    solution, assignment = proposal.solution, proposal.assignment
    of_classes = None if score is None or not len(score.hits) else score
    return Result(
        budget=proposal.budget.name,
        method=proposal.method,
        assignment=assignment,
        size_bytes=space.size_bytes(assignment),
        average_bits=space.average_bits(assignment),
        loss_deployed=loss,
        brier_deployed=None if of_classes is None else of_classes.brier,
        agreement_deployed=None if of_classes is None else float(of_classes.hits.mean()),
        loss_predicted=proposal.loss_predicted,
        status=None if solution is None else str(solution.status),
        objective=None if solution is None else solution.objective,
        bound=None if solution is None else _finite(solution.bound),
        gap=None if solution is None else _finite(solution.gap),
        seconds=None if solution is None else solution.seconds,
    )


def _finite(value: float) -> float | None:
    return value if abs(value) != inf else None
