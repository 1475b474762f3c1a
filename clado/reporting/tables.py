"""What a run found, as text for a terminal and for table.md. Reads a `RunRecord`; nothing here measures.

Sizes are those of the searched weights. Losses are measured on the sensitivity set with the network that would ship; accuracy
on the validation set, which no choice has seen. Percent exist only here, in print.
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
from clado.records import CHOSEN, MeasuredProposal, Receipt, Result, RunRecord, markdown_table, percent, size_text
from clado.settings.tracking import database_of

# "plain %" only where a run corrects: the same bits without corrections; "corrections" only where an answer has not all of them
QUANTITIES = ("size", "loss", "top-1 %", "plain %", "corrections")
FEWER = {"all": "", "static": "; deployed without the final corrections", "none": "; deployed without corrections"}


def table(record: RunRecord) -> Table:
    """Rows of a budget (size, loss, top-1, plain top-1 where a run corrects) × methods; the best loss and top-1 are bold."""
    result = Table()
    result.add_column("budget", no_wrap=True)
    result.add_column("", no_wrap=True, style="dim")
    for method in record.methods:
        result.add_column(method, justify="right", overflow="fold", min_width=9)
    for budget in record.budgets:
        lines = list(rows(record, budget))
        for k, (quantity, cells, best) in enumerate(lines):
            shown = [Text(cell, style="bold green" if cell == best else "") for cell in cells]
            result.add_row(Text("" if k else budget, style="bold"), quantity, *shown, end_section=k == len(lines) - 1)
    return result


def markdown(record: RunRecord) -> str:
    """The same table as Markdown, with its caption and the verdict."""
    lines = []
    for budget in record.budgets:
        for quantity, cells, best in rows(record, budget):
            lines.append([budget, quantity, *[f"**{cell}**" if cell == best else cell for cell in cells]])
    body = markdown_table(["budget", "", *record.methods], lines)
    return f"{record.network}: {caption(record)}.\n\n{body}\n\n{verdict(record)}\n"


def verdict(record: RunRecord) -> str:
    """One sentence: what the interactions changed, from `layerwise` to `pairwise` (or else the next by `interaction_order`)."""
    base_name = safe_estimators()[0]
    rival = next(iter(with_interactions(record.methods)), None)
    if base_name not in record.methods or rival is None:
        methods = ", ".join(record.methods) or "no results"
        usual = with_interactions(available("estimators"))[0]
        return f"Interactions: no verdict, for it compares {base_name} with {usual} and the run has {methods}."
    pairs = [
        (budget, base, other)
        for budget in record.budgets
        if (base := record.find(budget, base_name)) is not None and (other := record.find(budget, rival)) is not None
        if math.isfinite(base.loss_deployed) and math.isfinite(other.loss_deployed)
    ]
    if not pairs:
        return f"Interactions: no verdict, for at no budget both {base_name} and {rival} have a finite loss."
    changed = [_num_changed(base, other) for _, base, other in pairs]
    of = f"of {len(record.layer_names)} layers"
    if not any(changed):
        where = "every budget" if len(pairs) == len(record.budgets) else f"{len(pairs)} of {len(record.budgets)} budgets"
        return f"Interactions change nothing: {rival} and {base_name} agree on all {len(record.layer_names)} layers at {where}."
    lower = [(budget, base, other) for budget, base, other in pairs if other.loss_deployed < base.loss_deployed]
    higher = [(budget, base, other) for budget, base, other in pairs if other.loss_deployed > base.loss_deployed]
    layers = f"{min(changed)} to {max(changed)}" if min(changed) < max(changed) else str(max(changed))
    if len(pairs) == 1:
        return f"Interactions change {layers} {of} and the measured loss {_change(*pairs[0])} ({rival} against {base_name})."
    parts = [f"Interactions change {layers} {of}"]
    for word, found, extreme in (("lower", lower, min), ("raise", higher, max)):
        if found:
            most = extreme(found, key=lambda pair: _relative(pair[1], pair[2]))
            parts.append(f"{word} the measured loss at {len(found)} of {len(pairs)} budgets, most {_change(*most, signed=False)}")
    if not lower and not higher:
        parts.append("leave the measured loss as it is")
    return f"{'; they '.join(parts)} ({rival} against {base_name})."


def winners(record: RunRecord) -> str:
    """One line a budget: whose assignment was chosen, and how far its measured loss is from the least of the others."""
    chosen = [result for result in record.results if result.method == CHOSEN]
    width = max((len(result.budget) for result in chosen), default=0)
    name_width = max((len(result.winner or "") for result in chosen), default=0)
    lines = []
    for result in chosen:
        name = (result.winner or "unknown").ljust(name_width)
        fewer = FEWER[result.assignment.corrected]
        lines.append(f"  {result.budget.ljust(width)}  {name}  loss {loss_text(result.loss_deployed)}{_lead(result)}{fewer}")
    return "\n".join(["Chosen, and who proposed it:", *lines]) if lines else "Nothing was chosen."


def search_text(record: RunRecord) -> str:
    """What the local search gained at each budget; empty where there was none."""
    if not record.searches:
        return ""
    evaluations = sum(row.evaluations for row in record.searches)
    gained = [row for row in record.searches if row.gain > 0]
    surrogate = record.searches[0].surrogate
    head = f"Local search on the measured loss ({evaluations} evaluations, moves ranked by {surrogate}) "
    if not gained:
        return head + f"found nothing better at any of {len(record.searches)} budgets."
    most = max(gained, key=lambda row: row.gain / row.start_loss if row.start_loss else row.gain)
    share = f" ({100 * most.gain / most.start_loss:.1f} %)" if most.start_loss else ""
    return (
        head + f"lowered it at {len(gained)} of {len(record.searches)} budgets, most at {most.budget}: "
        f"from {loss_text(most.start_loss)} ({most.start}) to {loss_text(most.best_loss)}{share}."
    )


def stability_text(record: RunRecord) -> str:
    """One sentence: how many layers of the surrogate's answers, which need not be the chosen ones, the images leave undecided at
    each budget, and how many images would settle them."""
    if not record.stability:
        return ""
    first, num_layers = record.stability[0], len(record.layer_names)
    parts = []
    for row in record.stability:
        if not row.undecided[0]:
            continue
        settled = row.settled_by
        most = row.multiples[-1] * row.num_images
        after = f"even {most:,} would leave {row.undecided[-1]}" if settled is None else f"about {settled:,} would settle them"
        parts.append(f"{row.undecided[0]} of {num_layers} at {row.budget} ({after})")
    head = f"With {first.num_images:,} images, {first.estimator}'s own answers, chosen or not, have"
    how = f"bootstrap over sample blocks, {first.num_resamples} resamples"
    if not parts:
        return f"{head} every layer's bits decided at every budget ({how})."
    return f"{head} undecided layers: {'; '.join(parts)} ({how})."


def proposals_table(record: RunRecord) -> str:
    """Every candidate that was measured, by budget and Brier score, as Markdown; the chosen one is marked, and who predicts where
    another proposed."""
    rows = []
    for budget in record.budgets:
        best = record.find(budget, CHOSEN)
        own = [c for c in record.measured_proposals if c.budget == budget]
        if own and best and all(c.assignment != best.assignment for c in own):  # proposed for another budget
            own += [
                replace(c, budget=budget, origin=best.winner or CHOSEN)
                for c in record.measured_proposals
                if c.assignment == best.assignment
            ][:1]
        for c in sorted(own, key=_by_what_is_measured):
            predicted = "–" if c.loss_predicted is None else loss_text(c.loss_predicted)
            predicted += f" ({c.predicted_by})" if c.predicted_by else ""
            measured = "not finite" if c.loss_deployed is None else loss_text(c.loss_deployed)
            brier = "–" if c.brier_deployed is None else loss_text(c.brier_deployed)
            origin = f"{c.origin} (chosen)" if best and c.assignment == best.assignment else c.origin
            agreement = "–" if c.agreement_deployed is None else percent(c.agreement_deployed)
            rows.append([budget, origin, f"{c.size_bytes:,}", predicted, measured, brier, agreement, str(c.assignment)])
    if not rows:
        return "No proposals are recorded."
    header = ["budget", "proposed by", "bytes", "predicted loss", "measured loss", "Brier score", "agreement %", "bits"]
    return markdown_table(header, rows)


def _by_what_is_measured(candidate: MeasuredProposal) -> tuple[float, float]:
    """Brier score, then loss; what has not been measured comes last."""
    brier, loss = candidate.brier_deployed, candidate.loss_deployed
    return math.inf if brier is None else brier, math.inf if loss is None else loss


def _lead(result: Result) -> str:
    """How far a chosen assignment is ahead of what the other methods proposed."""
    if result.gain is None:
        return ""
    if result.gain == 0:
        return ", as low as the best of the others"
    if result.gain < 0:
        return f", {loss_text(-result.gain)} above the least of the others: Brier score and agreement decided"
    others = result.loss_deployed + result.gain
    share = f" ({100 * result.gain / others:.1f} %)" if others > 0 else ""
    return f", {loss_text(result.gain)}{share} below the best of the others"


def solver_line(record: RunRecord) -> str:
    """How the programs were solved: statuses, the largest gap, the longest time."""
    solved = [result for result in record.results if result.status is not None and result.method != CHOSEN]
    if not solved:
        return "Solver: no program was solved."
    counts = Counter(result.status for result in solved)
    parts = [", ".join(f"{count} of {len(solved)} {status}" for status, count in counts.most_common())]
    gaps = [result.gap for result in solved if result.gap is not None]
    seconds = [result.seconds for result in solved if result.seconds is not None]
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
    return f"Seconds: {phases}; together {sum(record.seconds.values()):.1f}."


def how_to_open(receipt: Receipt) -> str:
    """The address of the run's page, or the command that serves it; in the database's own folder that needs no address."""
    if receipt.uri.startswith(("http://", "https://")):
        page = f"/#/experiments/{receipt.experiment_id}/runs/{receipt.parent_run_id}" if receipt.parent_run_id else ""
        return receipt.uri.rstrip("/") + page
    installed = Path(sys.executable).with_name("mlflow")
    command = shlex.quote(str(installed)) if shutil.which("mlflow") is None and installed.exists() else "mlflow"
    default = database_of(receipt.uri) == Path.cwd() / "mlflow.db"
    store = "" if default else f" --backend-store-uri {shlex.quote(receipt.uri)}"
    return f"MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true {command} ui{store}"


def locations(folder: Path, plots: Sequence[Path] = (), receipt: Receipt | None = None) -> str:
    """Where the run, the plots and the MLflow store are, and how to open them."""
    rows = [("run", str(folder)), ("shown by", f"clado show {folder}")]
    if plots:
        places = sorted({str(path.parent) for path in plots})
        rows.append(("plots", f"{', '.join(places)} ({', '.join(path.name for path in plots)})"))
    if receipt is not None:
        rows.append(("MLflow", f"{receipt.uri}, experiment {receipt.experiment}"))
        if receipt.parent_run_id is not None:
            rows.append(("", f"run {receipt.parent_run_id}, {receipt.num_children} below it"))
        if receipt.problem is not None:
            rows.append(("", f"NOT all delivered: {receipt.problem}"))
        if receipt.parent_run_id is not None:
            rows.append(("opened by", how_to_open(receipt)))
    return "\n".join(f"{name.ljust(10)}{value}" for name, value in rows)


def show(record: RunRecord) -> Group:
    """Everything there is to say about a record, to print with rich."""
    parts: list[RenderableType] = [Text(f"{record.network}: {caption(record)}"), table(record)]
    texts = [
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
    """(quantity, one cell a method, the best cell where best has a meaning) of a budget."""
    found = [record.find(budget, method) for method in record.methods]
    losses = [None if result is None else result.loss_deployed for result in found]
    accuracies = [_top1(result) for result in found]
    least = min((loss for loss in losses if loss is not None), default=None)
    most = max((top1 for top1 in accuracies if top1 is not None), default=None)
    yield QUANTITIES[0], ["–" if result is None else size_text(result.size_bytes) for result in found], None
    yield (
        QUANTITIES[1],
        ["–" if loss is None else loss_text(loss) for loss in losses],
        None if least is None else loss_text(least),
    )
    yield _top1_label(record), [percent(top1) for top1 in accuracies], None if most is None else percent(most)
    plain = [None if result is None or result.validation_plain is None else result.validation_plain.top1 for result in found]
    if any(top1 is not None for top1 in plain):
        yield QUANTITIES[3], [percent(top1) for top1 in plain], None
    corrected = ["–" if result is None else result.assignment.corrected for result in found]
    if any(level not in ("–", "all") for level in corrected):
        yield QUANTITIES[4], corrected, None


def _top1(result: Result | None) -> float | None:
    return None if result is None or result.validation is None else result.validation.top1


def _top1_label(record: RunRecord) -> str:
    return QUANTITIES[2] if record.top1_name == "top1" else f"{record.top1_name} % of {record.float_accuracy.num_images:,}"


def caption(record: RunRecord) -> str:
    """Size, loss and accuracy of the float network, and what is corrected."""
    accuracy = record.float_accuracy
    top1 = "" if accuracy.top1 is None else f", {record.top1_title} {percent(accuracy.top1)} % on {accuracy.num_images:,} images"
    if interval := accuracy.top1_interval:
        top1 += f" (95 %: {percent(interval[0])} to {percent(interval[1])})"
    corrections = "" if record.corrections == "none" else f"; corrections: {record.corrections}"
    return f"float {size_text(record.float_bytes)}, loss {loss_text(record.baseline)} ({record.criterion}){top1}{corrections}"


def _forwards(record: RunRecord) -> str:
    """How many forward images each kind of tile and what was measured to choose took, and each estimator."""
    counts = ", ".join(f"{name} {count:,}" for name, count in record.forwards.items())
    own = ", ".join(
        f"{name} {cost['forwards']:,}" + (f" and {cost['backwards']:,} backward" if cost["backwards"] else "")
        for name, cost in record.costs.items()
    )
    text = f"Forward images, as whole forwards would need: {counts}." if counts else ""
    return f"{text} Each estimator alone: {own}." if own else text


def loss_text(value: float) -> str:
    """At least three significant digits in at most nine characters."""
    if 0.01 <= abs(value) < 1000:
        return f"{value:.4f}"
    return f"{value:.3g}"


def _num_changed(one: Result, other: Result) -> int:
    return sum(a != b for a, b in zip(one.assignment.pairs, other.assignment.pairs, strict=True))


def _relative(base: Result, other: Result) -> float:
    """Relative change of the measured loss; the absolute one where the base is 0."""
    change = other.loss_deployed - base.loss_deployed
    return change / abs(base.loss_deployed) if base.loss_deployed else change


def _change(budget: str, base: Result, other: Result, signed: bool = True) -> str:
    """'by -12.3 % at 2.5 bits (12.3 % unless signed), from 0.1000 to 0.0877, and top-1 from 80.00 to 81.00 %'."""
    change = 100 * _relative(base, other)
    share = f"by {change:+.1f} % " if signed else f"by {abs(change):.1f} % "
    share = share if base.loss_deployed else ""
    before, after = _top1(base), _top1(other)
    accuracy = "" if before is None or after is None else f", and top-1 from {percent(before)} to {percent(after)} %"
    return f"{share}at {budget}, from {loss_text(base.loss_deployed)} to {loss_text(other.loss_deployed)}{accuracy}"
