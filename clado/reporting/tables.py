"""The results of a run as text for a terminal and for table.md. Nothing here measures.

Sizes are those of the searched weights. Losses are measured on the decision set with the
deployed network. Accuracy is measured on the validation set, which no choice has seen. Only printed
figures are in percent.
"""

import math
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clado.interaction.estimators import safe_estimators, with_interactions
from clado.plugins import available
from clado.records.interval import Interval
from clado.records.results import CHOSEN, Comparison, MeasuredProposal, Receipt, Result
from clado.records.run_record import RunRecord
from clado.records.text import REPORT, markdown_table, percent, size_text
from clado.settings.tracking import database_of
from clado.space import RECONSTRUCTED, Assignment

QUANTITIES = ("size", "loss", "top-1 %", "uncorrected %", "corrections")
"""Rows of a budget.

`uncorrected %` is top-1 of the same bits without corrections, where it was counted. It is left out if the run has no
corrections.

`corrections` is left out if every answer has all corrections.

A user-defined metric has a row of its name. Without classes it takes the place of top-1.
"""
FEWER = {
    "all": "",
    "static": "; deployed without the final corrections",
    "none": "; deployed without corrections",
    **dict.fromkeys(RECONSTRUCTED, "; reconstructed"),
}
"""The note on an answer, by `Assignment.corrected`."""


def table(record: RunRecord) -> Table:
    """The table of a record: `QUANTITIES` of every budget × methods.

    The best loss and top-1 are bold.
    """
    grid = Table()
    grid.add_column("budget", no_wrap=True)
    grid.add_column("", no_wrap=True, style="dim")
    for method in record.methods:
        grid.add_column(method, justify="right", overflow="fold", min_width=9)
    for budget in record.budgets:
        lines = list(rows(record, budget))
        for k, (quantity, cells, best) in enumerate(lines):
            texts = [Text(cell, style="bold green" if cell == best else "") for cell in cells]
            grid.add_row(Text("" if k else budget, style="bold"), quantity, *texts, end_section=k == len(lines) - 1)
    return grid


def markdown(record: RunRecord) -> str:
    """The same table as Markdown, with its caption and the verdict."""
    lines = []
    for budget in record.budgets:
        for quantity, cells, best in rows(record, budget):
            lines.append([budget, quantity, *[f"**{cell}**" if cell == best else cell for cell in cells]])
    body = markdown_table(["budget", "", *record.methods], lines)
    parts = [f"{record.network}: {caption(record)}.", body, comparisons_table(record), serving_table(record), verdict(record)]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict(record: RunRecord) -> str:
    """The effect of interactions, counted on validation images.

    It compares `layerwise` with `pairwise`, or else with the next estimator by `interaction_order`.
    """
    base_name = safe_estimators()[0]
    rival = next(iter(with_interactions(record.methods)), None)
    if base_name not in record.methods or rival is None:
        methods = ", ".join(record.methods) or "no results"
        usual = with_interactions(available("estimators"))[0]
        return f"Interactions: no verdict. It compares {base_name} with {usual}, and the run has {methods}."
    pairs = [
        (budget, base, other)
        for budget in record.budgets
        if (base := record.find(budget, base_name)) is not None and (other := record.find(budget, rival)) is not None
        if math.isfinite(base.loss_deployed) and math.isfinite(other.loss_deployed)
    ]
    if not pairs:
        return f"Interactions: no verdict. At no budget do both {base_name} and {rival} have a finite loss."
    counts = [_num_changed(base, other) for _, base, other in pairs]
    if not any(counts):
        where = "every budget" if len(pairs) == len(record.budgets) else f"{len(pairs)} of {len(record.budgets)} budgets"
        return f"Interactions change nothing: {rival} and {base_name} agree on all {len(record.layer_names)} layers at {where}."
    layers = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(max(counts))
    start, end = f"Interactions change {layers} of {len(record.layer_names)} layers", f"({rival} against {base_name})."
    compared = [row for budget in record.budgets if (row := record.comparison(budget, rival, base_name)) is not None]
    if not compared:
        return f"{start}; they were not compared on validation images {end}"
    return f"{start}. On {compared[0].kl.num_images:,} validation images they {_changes(compared)} {end}"


def _changes(compared: Sequence[Comparison]) -> str:
    """How often interactions lower or raise the divergence from the float network, and by how much at most."""
    lower, higher = [row for row in compared if row.kl.mean < 0], [row for row in compared if row.kl.mean > 0]
    parts = []
    for word, group, extreme in (("lower", lower, min), ("raise", higher, max)):
        if group:
            most = extreme(group, key=lambda row: row.kl.mean)
            sure = sum(row.kl.excludes_zero for row in group)
            parts.append(
                f"{word} KL from the float network at {len(group)} of {len(compared)} budgets, at {sure} by more than the 95 % "
                f"interval; most at {most.budget}, by {_comparison_text(most)}"
            )
    return "; they ".join(parts) or "leave KL from the float network as it is"


def _comparison_text(row: Comparison) -> str:
    top1 = "" if row.top1 is None else f", with top-1 {interval_text(row.top1, 100, 2)} points"
    return interval_text(row.kl) + top1


def interval_text(interval: Interval, scale: float = 1.0, digits: int = 4) -> str:
    """A difference with its 95 % interval."""
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in (interval.mean, interval.low, interval.high))
    return f"{mean} ({low} to {high})"


def comparisons_table(record: RunRecord) -> str:
    """The chosen answer of each budget compared with every other method, on the validation images. Empty if nothing differs."""
    rows = [row for row in record.comparisons if row.method == CHOSEN]
    if not rows:
        return ""
    lines = [
        [
            row.budget,
            row.other,
            "–" if row.top1 is None else interval_text(row.top1, 100, 2),
            interval_text(row.agreement, 100, 2),
            interval_text(row.kl),
        ]
        for row in rows
    ]
    title = f"Chosen minus others, on {rows[0].kl.num_images:,} validation images that no choice has seen (95 %, paired):"
    return f"{title}\n\n{markdown_table(['budget', 'other', 'top-1 points', 'agreement points', 'KL from float'], lines)}"


def serving_table(record: RunRecord) -> str:
    """Measurements of the chosen networks, float and uniform 8 bits in the runtime. Empty without a runtime."""
    return "" if record.serving is None else f"{record.serving.caption()}:\n\n{record.serving.table()}"


def winners(record: RunRecord) -> str:
    """One line for each budget: who proposed the chosen assignment.

    It also says how far its measured loss is from the least of the others.
    """
    chosen = [result for result in record.results if result.method == CHOSEN]
    width = max((len(result.budget) for result in chosen), default=0)
    name_width = max((len(result.winner or "") for result in chosen), default=0)
    lines = []
    for result in chosen:
        name = (result.winner or "unknown").ljust(name_width)
        fewer = FEWER[result.assignment.corrected]
        lines.append(f"  {result.budget.ljust(width)}  {name}  loss {loss_text(result.loss_deployed)}{_lead(result)}{fewer}")
    return "\n".join(["Chosen, and the method that proposed it:", *lines]) if lines else "Nothing was chosen."


def search_text(record: RunRecord) -> str:
    """One sentence: how far the local search lowered the measured loss.

    Empty if there was no local search.
    """
    if not record.searches:
        return ""
    evaluations = sum(row.evaluations for row in record.searches)
    successes = [row for row in record.searches if row.gain > 0]
    surrogate = record.searches[0].surrogate
    head = f"Local search on the measured loss ({evaluations} evaluations, moves ranked by {surrogate}) "
    if not successes:
        return head + f"found nothing better at any of {len(record.searches)} budgets."
    best = max(successes, key=lambda row: row.gain / row.start_loss if row.start_loss else row.gain)
    share = f" ({100 * best.gain / best.start_loss:.1f} %)" if best.start_loss else ""
    return (
        head + f"lowered it at {len(successes)} of {len(record.searches)} budgets, most at {best.budget}: "
        f"from {loss_text(best.start_loss)} ({best.start}) to {loss_text(best.best_loss)}{share}."
    )


def stability_text(record: RunRecord) -> str:
    """One sentence: how many layers the images leave undecided at each budget.

    It also says how many images would decide them.

    The layers are those of the surrogate's answers, which need not be the chosen ones.
    """
    if not record.stability:
        return ""
    first, num_layers = record.stability[0], len(record.layer_names)
    parts = []
    for row in record.stability:
        if not row.undecided[0]:
            continue
        images, largest = row.settled_by, row.multiples[-1] * row.num_images
        outlook = f"even {largest:,} would leave {row.undecided[-1]}" if images is None else f"about {images:,} would settle them"
        parts.append(f"{row.undecided[0]} of {num_layers} at {row.budget} ({outlook})")
    head = f"With {first.num_images:,} images, {first.estimator}'s answers, chosen or not, have"
    procedure = f"bootstrap over sample blocks, {first.num_resamples} resamples"
    if not parts:
        return f"{head} every layer's bits decided at every budget ({procedure})."
    return f"{head} undecided layers: {'; '.join(parts)} ({procedure})."


def proposals_table(record: RunRecord) -> str:
    """Every measured proposal as Markdown table, ordered by budget and Brier score.

    The chosen one is marked.
    """
    table = [_proposal_cells(proposal, best) for budget in record.budgets for proposal, best in _proposals_of(record, budget)]
    if not table:
        return "No proposals are recorded."
    header = ["budget", "proposed by", "bytes", "predicted loss", "measured loss", "Brier score", "agreement %", "bits"]
    return markdown_table(header, table)


def _proposals_of(record: RunRecord, budget: str) -> list[tuple[MeasuredProposal, bool]]:
    """(proposal, whether it was chosen) of a budget, by Brier score.

    The chosen one may be a proposal for another budget.
    """
    best = record.find(budget, CHOSEN)
    proposals = [proposal for proposal in record.measured_proposals if proposal.budget == budget]
    if proposals and best and all(proposal.assignment != best.assignment for proposal in proposals):
        proposals += [
            replace(proposal, budget=budget, origin=best.winner or CHOSEN)
            for proposal in record.measured_proposals
            if proposal.assignment == best.assignment
        ][:1]
    is_best = [best is not None and proposal.assignment == best.assignment for proposal in proposals]
    return sorted(zip(proposals, is_best, strict=True), key=lambda pair: _measured_rank(pair[0]))


def _proposal_cells(proposal: MeasuredProposal, chosen: bool) -> list[str]:
    """Cells of a row of `proposals_table`.

    The predicted loss names its estimator, unless it is the proposing one.
    """
    predicted, brier = (
        "–" if value is None else loss_text(value) for value in (proposal.loss_predicted, proposal.brier_deployed)
    )
    return [
        proposal.budget,
        f"{proposal.origin} (chosen)" if chosen else proposal.origin,
        f"{proposal.size_bytes:,}",
        f"{predicted} ({proposal.predicted_by})" if proposal.predicted_by else predicted,
        "not finite" if proposal.loss_deployed is None else loss_text(proposal.loss_deployed),
        brier,
        percent(proposal.agreement_deployed),
        str(proposal.assignment),
    ]


def _measured_rank(proposal: MeasuredProposal) -> tuple[float, float]:
    """A key to sort by: Brier score, then loss. Unmeasured proposals come last."""
    brier, loss = proposal.brier_deployed, proposal.loss_deployed
    return math.inf if brier is None else brier, math.inf if loss is None else loss


def _lead(result: Result) -> str:
    """How far the measured loss of a chosen assignment is from the least of the other methods."""
    if result.gain is None:
        return ""
    if result.gain == 0:
        return ", as low as the best of the others"
    if result.gain < 0:
        return f", {loss_text(-result.gain)} above the least of the others, but not significantly on these images"
    others = result.loss_deployed + result.gain
    share = f" ({100 * result.gain / others:.1f} %)" if others > 0 else ""
    return f", {loss_text(result.gain)}{share} below the best of the others"


def solver_line(record: RunRecord) -> str:
    """One sentence on the solver: statuses, the largest gap, the longest time."""
    answers = [result for result in record.results if result.status is not None and result.method != CHOSEN]
    if not answers:
        return "Solver: no program was solved."
    counts = Counter(result.status for result in answers)
    parts = [", ".join(f"{count} of {len(answers)} {status}" for status, count in counts.most_common())]
    gaps = [result.gap for result in answers if result.gap is not None]
    seconds = [result.seconds for result in answers if result.seconds is not None]
    if gaps:
        parts.append(f"largest gap {100 * max(gaps):.3g} %")
    if seconds:
        parts.append(f"longest {max(seconds):.2f} s")
    return f"Solver: {'; '.join(parts)}."


def phase_times(record: RunRecord) -> str:
    """Seconds of each phase, and their sum."""
    if not record.seconds:
        return "Seconds: not recorded."
    phases = ", ".join(f"{name} {value:.1f}" for name, value in record.seconds.items())
    return f"Seconds: {phases}; in all {sum(record.seconds.values()):.1f}."


def how_to_open(receipt: Receipt) -> str:
    """The address of the run's page in MLflow, or the command that serves it, and its address then.

    In the folder of the database, the command needs no address. The link opens the pages for model training, not for GenAI.
    """
    is_known = receipt.experiment_id and receipt.parent_run_id
    page = (
        f"/#/experiments/{receipt.experiment_id}/runs/{receipt.parent_run_id}?workflowType=machine_learning" if is_known else ""
    )
    if receipt.uri.startswith(("http://", "https://")):
        return receipt.uri.rstrip("/") + page
    installed = Path(sys.executable).with_name("mlflow")
    command = shlex.quote(str(installed)) if shutil.which("mlflow") is None and installed.exists() else "mlflow"
    is_default = database_of(receipt.uri) == Path.cwd() / "mlflow.db"
    store = "" if is_default else f" --backend-store-uri {shlex.quote(receipt.uri)}"
    served = f"\n{''.ljust(10)}then http://localhost:5000{page}" if page else ""
    return f"MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true {command} ui{store}{served}"


def locations(folder: Path, receipt: Receipt | None = None) -> str:
    """The places of the report and of the run in MLflow, and how to open them."""
    lines = [("report", str(folder / REPORT)), ("all of it", f"clado show {folder} --details")]
    if receipt is not None:
        lines.append(("MLflow", f"{receipt.uri}, experiment {receipt.experiment}"))
        if receipt.parent_run_id is not None:
            lines.append(("", f"run {receipt.parent_run_id}"))
        if receipt.problem is not None:
            lines.append(("", f"NOT all delivered: {receipt.problem}"))
        if receipt.parent_run_id is not None:
            lines.append(("opened by", how_to_open(receipt)))
    return "\n".join(f"{name.ljust(10)}{value}" for name, value in lines)


def show(record: RunRecord) -> Group:
    """All texts of a record, to print with rich."""
    parts: list[RenderableType] = [Text(f"{record.network}: {caption(record)}"), table(record)]
    texts = [
        comparisons_table(record),
        serving_table(record),
        verdict(record),
        winners(record),
        search_text(record),
        stability_text(record),
        solver_line(record),
        _forwards(record),
        phase_times(record),
    ]
    texts += [f"Note: {note}" for note in record.notes]
    parts += [Text(text) for text in texts if text]
    return Group(*parts)


def rows(record: RunRecord, budget: str) -> Iterator[tuple[str, list[str], str | None]]:
    """Rows of a budget in the table.

    Yields:
        A quantity, one cell for each method, and the best cell (None if no cell is better than
        another).
    """
    results = [record.find(budget, method) for method in record.methods]
    losses = [None if result is None else result.loss_deployed for result in results]
    accuracies = [_top1(result) for result in results]
    least = min((loss for loss in losses if loss is not None), default=None)
    highest = max((top1 for top1 in accuracies if top1 is not None), default=None)
    yield QUANTITIES[0], ["–" if result is None else size_text(result.size_bytes) for result in results], None
    yield (
        QUANTITIES[1],
        ["–" if loss is None else loss_text(loss) for loss in losses],
        None if least is None else loss_text(least),
    )
    if highest is not None or record.metric_name is None:
        yield _top1_label(record), [percent(top1) for top1 in accuracies], None if highest is None else percent(highest)
    if record.metric_name is not None:
        values = [None if result is None or result.validation is None else result.validation.metric for result in results]
        best = max((value for value in values if value is not None and math.isfinite(value)), default=None)
        yield record.metric_name, [metric_text(value) for value in values], None if best is None else metric_text(best)
    plain = [None if result is None or result.validation_plain is None else result.validation_plain.top1 for result in results]
    if any(top1 is not None for top1 in plain):
        yield QUANTITIES[3], [percent(top1) for top1 in plain], None
    corrections = ["–" if result is None else _corrections_text(result.assignment) for result in results]
    if any(level not in ("–", "all") for level in corrections):
        yield QUANTITIES[4], corrections, None


def _corrections_text(assignment: Assignment) -> str:
    return f"reconstructed ({assignment.corrected})" if assignment.is_reconstructed else assignment.corrected


def _top1(result: Result | None) -> float | None:
    return None if result is None or result.validation is None else result.validation.top1


def _top1_label(record: RunRecord) -> str:
    return QUANTITIES[2] if record.top1_name == "top1" else f"{record.top1_name} % of {record.float_accuracy.num_images:,}"


def caption(record: RunRecord) -> str:
    """Size, loss and accuracy of the float network, and the corrections."""
    accuracy = record.float_accuracy
    top1 = "" if accuracy.top1 is None else f", {record.top1_title} {percent(accuracy.top1)} % on {accuracy.num_images:,} images"
    if interval := accuracy.top1_interval:
        top1 += f" (95 %: {percent(interval[0])} to {percent(interval[1])})"
    if accuracy.metric is not None:
        top1 += f", {record.metric_name} {metric_text(accuracy.metric)} on {accuracy.num_images:,} images"
    corrections = "" if record.corrections == "none" else f"; corrections: {record.corrections}"
    return f"float {size_text(record.float_bytes)}, loss {loss_text(record.baseline)} ({record.criterion}){top1}{corrections}"


def _forwards(record: RunRecord) -> str:
    """Forward images of each tile kind, of choosing, and of each estimator alone."""
    counts = ", ".join(f"{name} {count:,}" for name, count in record.forwards.items())
    costs = ", ".join(
        f"{name} {cost['forwards']:,}" + (f" and {cost['backwards']:,} backward" if cost["backwards"] else "")
        for name, cost in record.costs.items()
    )
    text = f"Forward images, counted as whole forward passes: {counts}." if counts else ""
    return f"{text} Each estimator alone: {costs}." if costs else text


def metric_text(value: float | None) -> str:
    """Four significant digits of a user-defined metric."""
    return "–" if value is None else f"{value:.4g}"


def loss_text(value: float) -> str:
    """At least three significant digits in at most nine characters."""
    if 0.01 <= abs(value) < 1000:
        return f"{value:.4f}"
    return f"{value:.3g}"


def _num_changed(one: Result, other: Result) -> int:
    return sum(a != b for a, b in zip(one.assignment.pairs, other.assignment.pairs, strict=True))
