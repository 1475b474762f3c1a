"""What a run found, as text for a terminal and for table.md. Reads a `RunRecord`; nothing here measures.

Sizes are those of the searched weights. Losses are measured on the sensitivity set with the network that would ship; accuracy
on the validation set, which no choice has seen. Percent exist only here, in print.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clado.records import CHOSEN, Result, RunRecord, markdown_table, percent, size_text
from clado.tracking import Receipt

BASE, INTERACTING = "layerwise", ("pairwise", "gauss_newton", CHOSEN)
QUANTITIES = ("size", "loss", "top-1 %")


def table(record: RunRecord) -> Table:
    """Three rows a budget (size, measured loss, top-1) × methods; the lowest loss and highest top-1 of a row are bold."""
    result = Table()
    result.add_column("budget", no_wrap=True)
    result.add_column("", no_wrap=True, style="dim")
    for method in record.methods:
        result.add_column(method, justify="right", overflow="fold", min_width=9)
    for budget in record.budgets:
        for k, (quantity, cells, best) in enumerate(_rows(record, budget)):
            shown = [Text(cell, style="bold green" if cell == best else "") for cell in cells]
            result.add_row(Text("" if k else budget, style="bold"), quantity, *shown, end_section=k == len(QUANTITIES) - 1)
    return result


def markdown(record: RunRecord) -> str:
    """The same table as Markdown, with its caption and the verdict."""
    rows = []
    for budget in record.budgets:
        for quantity, cells, best in _rows(record, budget):
            rows.append([budget, quantity, *[f"**{cell}**" if cell == best else cell for cell in cells]])
    body = markdown_table(["budget", "", *record.methods], rows)
    return f"{record.network}: {_caption(record)}.\n\n{body}\n\n{verdict(record)}\n"


def verdict(record: RunRecord) -> str:
    """One sentence: what the interactions changed, from `layerwise` to `pairwise` (or else `gauss_newton`, or `chosen`)."""
    rival = next((method for method in INTERACTING if method in record.methods), None)
    if BASE not in record.methods or rival is None:
        methods = ", ".join(record.methods) or "no results"
        return f"Interactions: no verdict, for it compares {BASE} with {INTERACTING[0]} and the run has {methods}."
    pairs = [
        (budget, base, other)
        for budget in record.budgets
        if (base := record.find(budget, BASE)) is not None and (other := record.find(budget, rival)) is not None
    ]
    changed = [_num_changed(base, other) for _, base, other in pairs]
    of = f"of {len(record.layer_names)} layers"
    if not any(changed):
        return f"Interactions change nothing: {rival} and {BASE} agree on all {len(record.layer_names)} layers at every budget."
    lower = [(budget, base, other) for budget, base, other in pairs if other.loss_shipped < base.loss_shipped]
    higher = [(budget, base, other) for budget, base, other in pairs if other.loss_shipped > base.loss_shipped]
    layers = f"{min(changed)} to {max(changed)}" if min(changed) < max(changed) else str(max(changed))
    if len(pairs) == 1:
        return f"Interactions change {layers} {of} and the measured loss {_change(*pairs[0])} ({rival} against {BASE})."
    parts = [f"Interactions change {layers} {of}"]
    for word, found, extreme in (("lower", lower, min), ("raise", higher, max)):
        if found:
            most = extreme(found, key=lambda pair: _relative(pair[1], pair[2]))
            parts.append(f"{word} the measured loss at {len(found)} of {len(pairs)} budgets, most {_change(*most, signed=False)}")
    if not lower and not higher:
        parts.append("leave the measured loss as it is")
    return f"{'; they '.join(parts)} ({rival} against {BASE})."


def winners(record: RunRecord) -> str:
    """One line a budget: whose assignment was chosen, and how far its measured loss is below the best of the others."""
    chosen = [result for result in record.results if result.method == CHOSEN]
    width = max((len(result.budget) for result in chosen), default=0)
    name_width = max((len(result.winner or "") for result in chosen), default=0)
    lines = []
    for result in chosen:
        name = (result.winner or "unknown").ljust(name_width)
        lines.append(f"  {result.budget.ljust(width)}  {name}  loss {_loss(result.loss_shipped)}{_lead(result)}")
    return "\n".join(["Chosen by measured loss, and who proposed it:", *lines]) if lines else "Nothing was chosen."


def _lead(result: Result) -> str:
    """How far a chosen assignment is ahead of what the other methods proposed."""
    if result.gain is None:
        return ""
    if result.gain <= 0:
        return ", as low as the best of the others"
    others = result.loss_shipped + result.gain
    share = f" ({100 * result.gain / others:.1f} %)" if others > 0 else ""
    return f", {_loss(result.gain)}{share} below the best of the others"


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
            rows.append(("opened by", receipt.how_to_open))
    return "\n".join(f"{name.ljust(10)}{value}" for name, value in rows)


def show(record: RunRecord) -> Group:
    """Everything there is to say about a record, to print with rich."""
    parts: list[RenderableType] = [Text(f"{record.network}: {_caption(record)}"), table(record)]
    texts = [verdict(record), winners(record), solver_line(record), _forwards(record), phase_times(record)]
    texts += [f"Note: {note}" for note in record.notes]
    parts += [Text(text) for text in texts if text]
    return Group(*parts)


def _rows(record: RunRecord, budget: str) -> Iterator[tuple[str, list[str], str | None]]:
    """(quantity, one cell a method, the best cell where best has a meaning) of a budget."""
    found = [record.find(budget, method) for method in record.methods]
    losses = [None if result is None else result.loss_shipped for result in found]
    accuracies = [_top1(result) for result in found]
    least = min((loss for loss in losses if loss is not None), default=None)
    most = max((top1 for top1 in accuracies if top1 is not None), default=None)
    yield QUANTITIES[0], ["–" if result is None else size_text(result.size_bytes) for result in found], None
    yield QUANTITIES[1], ["–" if loss is None else _loss(loss) for loss in losses], None if least is None else _loss(least)
    yield QUANTITIES[2], [percent(top1) for top1 in accuracies], None if most is None else percent(most)


def _top1(result: Result | None) -> float | None:
    return None if result is None or result.validation is None else result.validation.top1


def _caption(record: RunRecord) -> str:
    accuracy = record.float_accuracy
    top1 = "" if accuracy.top1 is None else f", top-1 {percent(accuracy.top1)} % on {accuracy.num_images:,} images"
    return f"float {size_text(record.float_bytes)}, loss {_loss(record.baseline)} ({record.criterion}){top1}"


def _forwards(record: RunRecord) -> str:
    """How many evaluations each estimator took."""
    counts = ", ".join(f"{name} {count:,}" for name, count in record.forwards.items())
    return f"Forward images, as whole forwards would need: {counts}." if counts else ""


def _loss(value: float) -> str:
    """At least three significant digits in at most nine characters."""
    if 0.01 <= abs(value) < 1000:
        return f"{value:.4f}"
    return f"{value:.3g}"


def _num_changed(one: Result, other: Result) -> int:
    return sum(a != b for a, b in zip(one.assignment.bits, other.assignment.bits, strict=True))


def _relative(base: Result, other: Result) -> float:
    """Relative change of the measured loss; the absolute one where the base is 0."""
    change = other.loss_shipped - base.loss_shipped
    return change / abs(base.loss_shipped) if base.loss_shipped else change


def _change(budget: str, base: Result, other: Result, signed: bool = True) -> str:
    """'by -12.3 % at 2.5 bits (12.3 % unless signed), from 0.1000 to 0.0877, and top-1 from 80.00 to 81.00 %'."""
    change = 100 * _relative(base, other)
    share = f"by {change:+.1f} % " if signed else f"by {abs(change):.1f} % "
    share = share if base.loss_shipped else ""
    before, after = _top1(base), _top1(other)
    accuracy = "" if before is None or after is None else f", and top-1 from {percent(before)} to {percent(after)} %"
    return f"{share}at {budget}, from {_loss(base.loss_shipped)} to {_loss(other.loss_shipped)}{accuracy}"
