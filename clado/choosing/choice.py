"""The choice among proposals, by what was measured of each. NumPy only.

The quadratic model only proposes. What is chosen was measured as it would be deployed.
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
"""Standard errors of a paired difference by which two networks differ significantly."""


def safe_methods() -> tuple[str, ...]:
    """Methods that nothing chosen is worse than, as measured. Nor is it worse than what is deployed without corrections."""
    return UNIFORM, *estimators.safe_estimators()


def surrogate(matrices: Mapping[str, InteractionMatrix], losses: Mapping[Assignment, float]) -> str:
    """The estimator whose predictions rank the measured assignments best, by Spearman's correlation.

    Assignments without corrections do not count, nor do those that are reconstructed. Of equal estimators it is the one that
    knows of more interactions.
    """
    measured = {a: loss for a, loss in losses.items() if isfinite(loss) and a.corrected in ("all", "static")}

    def quality(name: str) -> tuple[float, int]:
        matrix = matrices[name].clip_psd() if matrices[name].convexity == "clip_psd" else matrices[name]
        predicted = np.array([matrix.predicted_increase(a) for a in measured])
        return round(rank_correlation(predicted, np.array(list(measured.values()))), 9), int(np.count_nonzero(matrix.values))

    return max(matrices, key=quality)


def rank_correlation(one: Array, other: Array) -> float:
    """Spearman's correlation of two samples (n,), ties in the order given; 0 for fewer than two."""
    if len(one) < 2:
        return 0.0
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (one, other)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


@dataclass(frozen=True)
class Score:
    """What decides between assignments, beside their loss."""

    briers: Array
    """Brier score of each image (n,); its loss where there are no classes."""
    hits: Array
    """Whether each image hits (n,), 0 or 1; empty where there are no classes."""

    @property
    def brier(self) -> float:
        """The mean Brier score."""
        return float(self.briers.mean())

    def misses_significantly(self, other: "Score") -> bool:
        """Whether fewer images hit than with the other, by more than two standard errors of the paired difference."""
        return _is_significant(other.hits - self.hits)

    def is_significantly_nearer(self, other: "Score") -> bool:
        """Whether the Brier score is less than the other's, by more than two standard errors of the paired difference.

        What is finite is nearer than what is not.
        """
        if not isfinite(other.brier):
            return isfinite(self.brier)
        return _is_significant(other.briers - self.briers)


def _is_significant(differences: Array) -> bool:
    """Whether the mean is above zero by more than two standard errors. One image has no error, and tells nothing."""
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

    `chosen` is taken from all proposals that fit the budget, whether made for it or for another. Without `scores` it is
    the one of least measured loss, the smaller on a tie. With them see `_Measurements.best`: `chosen` is then the best of what
    `safe_methods` proposed or is deployed without corrections, unless another is nearer to the float network by more than the
    images that decide leave to chance.

    Args:
        space: Layers and their candidates.
        proposals: All measured.
        losses: Measured losses. NaN is as bad as infinity.
        limits: Standing limits.
        scores: Brier scores and hits of the same measurement, image by image.
        accepted: What an earlier choice chose, and what was made of that. Nothing that is chosen has more loss.
    """
    measurements = _Measurements(space, losses, scores, frozenset(accepted))
    results = []
    for budget in dict.fromkeys(proposal.budget for proposal in proposals):
        made_for_it = [proposal for proposal in proposals if proposal.budget == budget]
        results += [measurements.result(proposal) for proposal in made_for_it if proposal.reported]
        # of equal assignments the one made for this budget comes first, so that it gets the credit
        ordered_proposals = [*made_for_it, *(proposal for proposal in proposals if proposal.budget != budget)]
        limits_of_budget = merge_limits(budget.limit(space), limits)
        fitting = [p for p in ordered_proposals if all(limit.holds(space, p.assignment) for limit in limits_of_budget)]
        chosen = measurements.best(fitting or made_for_it)  # uniform, where nothing fits
        results.append(measurements.chosen_result(chosen, budget, made_for_it))
    return results


@dataclass(frozen=True)
class _Measurements:
    """What was measured of every proposal."""

    space: SearchSpace
    """The options."""
    losses: Mapping[Assignment, float]
    """The measured loss of each proposal."""
    scores: Mapping[Assignment, Score] | None
    """Brier score and hits of each proposal, where they were counted."""
    accepted: frozenset[Assignment] = frozenset()
    """What was chosen before."""

    def loss(self, proposal: Proposal) -> float:
        """The measured loss; infinite where it is no number."""
        return ordered(self.losses[proposal.assignment])

    def rank(self, proposal: Proposal) -> tuple[float, float, int]:
        """Least is best: Brier score (the loss, where there are no scores), loss, size."""
        loss = self.loss(proposal)
        brier = loss if self.scores is None else ordered(self.scores[proposal.assignment].brier)
        return brier, loss, self.space.size_bits(proposal.assignment)

    def best(self, proposals: Sequence[Proposal]) -> Proposal:
        """The reference of least loss, unless another proposal has earned its place.

        References are what `safe_methods` proposed, what is deployed without corrections, and what was chosen before. Another
        proposal competes if its loss is not above the reference's, and its Brier scores are significantly less. The one of
        least rank among these and the reference is taken. Those whose hits are significantly fewer than the most are passed
        over.
        """
        if self.scores is None:
            return min(proposals, key=self.rank)
        scores, safe = self.scores, safe_methods()
        safe_too = {p.assignment for p in proposals if p.assignment.corrected == "none"} | self.accepted
        references = [p for p in proposals if p.method in safe or p.assignment in safe_too]
        # where there is none, all compete
        reference = min(references, key=lambda p: (self.loss(p), *self.rank(p)), default=None)
        ranked = sorted((p for p in proposals if reference is None or self._competes(p, reference)), key=self.rank)
        best = scores[max(ranked, key=lambda p: scores[p.assignment].hits.sum()).assignment]
        return next(p for p in ranked if not scores[p.assignment].misses_significantly(best))

    def _competes(self, proposal: Proposal, reference: Proposal) -> bool:
        """Whether it is the reference, or significantly nearer to the float network and of no more loss."""
        assert self.scores is not None
        one, other = self.scores[proposal.assignment], self.scores[reference.assignment]
        is_better = self.loss(proposal) <= self.loss(reference) and one.is_significantly_nearer(other)
        return proposal is reference or is_better

    def chosen_result(self, chosen: Proposal, budget: Budget, made_for_it: Sequence[Proposal]) -> Result:
        """The row `chosen` of a budget: who proposed it, and what it gains on other proposals for the budget."""
        is_own = chosen.budget == budget
        winner = chosen.method if is_own else f"{chosen.method} for {chosen.budget.name}"
        # what else a local search tried is no rival of its answer
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
