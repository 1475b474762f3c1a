"""Reconstruct: fits the best answers of each budget to the float network, measures them, and chooses again."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from clado.choosing.local_search import ordered
from clado.choosing.proposals import Proposal
from clado.quantization.reconstruction import EFFORTS
from clado.records.results import CHOSEN
from clado.records.text import write_text
from clado.run.opened_run import OpenedRun
from clado.space import Assignment
from flows import worker
from flows.clusters import Workers
from flows.phases.choose import Choice, chosen_of, losses_of, mean_losses, with_other_corrections
from flows.progress import progress


def reconstruct(run: OpenedRun, workers: Workers, choice: Choice) -> Choice:
    """The choice among all measured proposals and the reconstructions of the best ones.

    No budget gets a higher loss on the decision set than before.
    """
    effort = run.config.effort
    before = {row.budget: row.assignment for row in choice.results if row.method == CHOSEN}
    best = best_proposals(choice.proposals, mean_losses(choice.losses), before, EFFORTS[effort].proposals)
    made = {proposal.assignment: proposal.assignment.with_corrections(effort) for proposal in best}
    tasks = list(dict.fromkeys(made.values()))
    with progress("reconstructing", len(tasks)) as advance:
        for _ in workers.map(worker.reconstruct, run.config, tasks):
            advance(1)
    losses = dict(choice.losses)
    losses |= losses_of(run, workers, "reconstructed", tasks)
    proposed = [*choice.proposals]
    proposed += [replace(p, assignment=made[p.assignment], loss_predicted=None, reported=False) for p in best]
    known = set(losses)
    measure = partial(losses_of, run, workers, "other corrections")
    accepted = [a for assignment in before.values() for a in (assignment, assignment.with_corrections(effort))]
    proposed = with_other_corrections(run, proposed, losses, measure, accepted)
    results = chosen_of(run, proposed, losses, accepted)
    others = choice.other_corrections | (losses.keys() - known)
    better = sum(row.assignment.is_reconstructed for row in results if row.method == CHOSEN)
    file = run.folder / "reconstruction.md"
    write_text(file, notes_text(run, best, made))
    note = f"{len(tasks)} networks were reconstructed ({effort}). They are deployed at {better} of {len(before)} budgets: {file}"
    return replace(
        choice,
        proposals=tuple(proposed),
        losses=losses,
        results=tuple(results),
        other_corrections=frozenset(others),
        notes=(*choice.notes, note),
    )


def notes_text(run: OpenedRun, proposals: Sequence[Proposal], made: Mapping[Assignment, Assignment]) -> str:
    """The result of each reconstruction, as Markdown."""
    text = ""
    for proposal in proposals:
        lines = "".join(f"- {note}\n" for note in run.preparation.reconstruction_notes(made[proposal.assignment]))
        text += f"## {proposal.budget.name}, {proposal.method}\n\n{lines}\n"
    return text


def best_proposals(
    proposals: Sequence[Proposal], losses: Mapping[Assignment, float], chosen: Mapping[str, Assignment], most: int
) -> list[Proposal]:
    """The proposals to reconstruct: for each budget the chosen one, then others with different bits, by measured loss.

    Networks in float are left out.

    Args:
        proposals: All measured proposals.
        losses: Their losses on the decision set.
        chosen: The chosen assignment of each budget.
        most: Most proposals of a budget.
    """
    picked: list[Proposal] = []
    for budget in dict.fromkeys(proposal.budget for proposal in proposals):
        of_budget = [p for p in proposals if p.budget == budget]
        # the chosen assignment may be the answer of another budget that fits this one too
        makers = sorted(proposals, key=lambda p: p.budget != budget)
        ranked = [p for p in makers if p.assignment == chosen[budget.name]][:1]
        ranked += sorted(of_budget, key=lambda p: ordered(losses[p.assignment]))
        different: dict[tuple[object, ...], Proposal] = {}
        for proposal in ranked:
            if not proposal.assignment.is_float:
                different.setdefault(proposal.assignment.pairs, proposal)
        picked += list(different.values())[:most]
    return picked
