"""The result of a run on one screen: in words, as a table, and the next step. Nothing here measures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clado.bits import FLOAT as FLOAT_TEXT
from clado.bits import bits_text
from clado.records.interval import Interval
from clado.records.results import CHOSEN, FLOAT, Accuracy, Result
from clado.records.run_record import RunRecord
from clado.records.text import file_name, percent, short_names, size_text
from clado.reporting import tables
from clado.reporting.tables import loss_text
from clado.space import Assignment

MOST_DROP = 0.01
"""Largest drop of top-1 of a recommended network, as a fraction of the images."""
NAMED = 6
"""Number of layers of a bit-width that are named. The others are counted."""


@dataclass(frozen=True)
class Gain:
    """The chosen network of a budget, in words."""

    budget: str
    """Name of the budget."""
    sizes: str
    """Bytes of the searched weights, in float and chosen."""
    quality: str
    """Top-1 of both, or agreement with the float network; empty if it was not evaluated."""
    points: str
    """The difference with half its 95 % interval, and the number of images; empty if it was not evaluated."""
    winner: str
    """The method that proposed it."""
    is_recommended: bool
    """Whether it is recommended."""

    def __str__(self) -> str:
        return f"{self.sizes}, {self.quality} ({self.points})" if self.quality else f"{self.sizes}, not evaluated"


def gains(record: RunRecord) -> list[Gain]:
    """The chosen network of each budget, in words."""
    best = recommended(record)
    return [_gain(record, row, row is best) for row in _chosen(record)]


def _gain(record: RunRecord, row: Result, is_recommended: bool) -> Gain:
    sizes = f"{size_text(record.float_bytes)} → {size_text(row.size_bytes)}"
    validation, with_float = row.validation, record.comparison(row.budget, CHOSEN, FLOAT)
    if validation is None:
        return Gain(row.budget, sizes, "", "", row.winner or "", is_recommended)
    quality = _quality(record.float_accuracy, validation, record.top1_title)
    interval = None if with_float is None else with_float.agreement if with_float.top1 is None else with_float.top1
    points = f"{quality.difference(interval)}{validation.num_images:,} images"
    return Gain(row.budget, sizes, str(quality), points, row.winner or "", is_recommended)


def headlines(record: RunRecord) -> list[str]:
    """A line for each budget: size and accuracy, before and after."""
    by_budget = gains(record)
    width = max((len(gain.budget) for gain in by_budget), default=0)
    return [f"{gain.budget.ljust(width)}  {gain}" for gain in by_budget]


@dataclass(frozen=True)
class Quality:
    """A quality of a network, compared with the float network."""

    name: str
    """What is compared."""
    before: float
    """Of the float network."""
    after: float
    """Of the other network."""
    is_share: bool
    """Whether both are fractions of the images; otherwise values of a user-defined metric."""

    @property
    def drop(self) -> float:
        """The loss of quality: as a fraction of the images, or of the metric."""
        lost = self.before - self.after
        return lost if self.is_share or not self.before else lost / abs(self.before)

    def difference(self, interval: Interval | None) -> str:
        """The change in points, with half its 95 % interval if it is known. For a metric it is in percent."""
        if not self.is_share:
            return f"{-100 * self.drop:+.2f} %, "
        if interval is None:
            return f"{-100 * self.drop:+.2f} points, "
        return f"{100 * interval.mean:+.2f} ± {50 * (interval.high - interval.low):.2f} points, "

    def __str__(self) -> str:
        if self.is_share:
            return f"{self.name} {percent(self.before)} → {percent(self.after)} %"
        return f"{self.name} {self.before:.4g} → {self.after:.4g}"


def _quality(before: Accuracy, after: Accuracy, top1_title: str) -> Quality:
    """The user-defined metric, else top-1, else agreement with the float network, else the loss."""
    if before.metric is not None and after.metric is not None:
        return Quality(after.metric_name or "metric", before.metric, after.metric, is_share=False)
    if before.top1 is not None and after.top1 is not None:
        return Quality(top1_title, before.top1, after.top1, is_share=True)
    if after.agreement is not None:
        return Quality("the float network's class on", 1.0, after.agreement, is_share=True)
    return Quality("loss", before.loss, after.loss, is_share=False)


def recommended(record: RunRecord) -> Result | None:
    """The smallest chosen network that loses at most one point of top-1. If there is none, the one that loses least.

    Without labels it is one point of agreement with the float network, with a user-defined metric one percent of it. None if
    nothing was evaluated, or if there is only a loss.
    """
    drops = [(drop, row) for row in _chosen(record) if (drop := _drop(record, row)) is not None]
    within = [row for drop, row in drops if drop <= MOST_DROP]
    if within:
        return min(within, key=lambda row: row.size_bytes)
    return min(drops, key=lambda pair: pair[0])[1] if drops else None


def _drop(record: RunRecord, row: Result) -> float | None:
    if row.validation is None:
        return None
    quality = _quality(record.float_accuracy, row.validation, record.top1_title)
    return None if quality.name == "loss" else quality.drop


def recommendation(record: RunRecord, folder: Path) -> str:
    """The recommended network, the reason, and the command that writes it."""
    row = recommended(record)
    if row is None:
        return f"Next: clado evaluate {folder}"
    exported = f"Its weights are in {folder / 'exports' / file_name(row.budget)}."
    bits = row.budget.removesuffix(" bits")
    other = f"\nNext: clado export {folder} --budget {bits} --format onnx" if bits != row.budget else ""
    return f"Recommended: {row.budget}, {why(record, row)}. {exported}{other}"


def why(record: RunRecord, row: Result) -> str:
    """The reason why a network is recommended."""
    is_within = (_drop(record, row) or 0.0) <= MOST_DROP
    unit = "1 %" if row.validation is not None and row.validation.metric is not None else "1 point"
    return f"the smallest that loses at most {unit}" if is_within else f"the one that loses least; all lose more than {unit}"


def table(record: RunRecord) -> Table:
    """Every method at every budget: the metric, top-1 with its 95 % interval, agreement with float, or the loss."""
    accuracy = record.float_accuracy
    name = accuracy.metric_name or (f"{record.top1_title} %" if accuracy.top1 is not None else "agreement %")
    title = f"{name}, {accuracy.num_images:,} images"
    grid = Table(title=title, title_justify="left", title_style="dim")
    grid.add_column("budget", no_wrap=True)
    for method in record.methods:
        grid.add_column(method, justify="right", overflow="fold", min_width=6)
    for budget in record.budgets:
        cells = [_cell(record.find(budget, method)) for method in record.methods]
        grid.add_row(Text(budget, style="bold"), *cells)
    return grid


def _cell(row: Result | None) -> str:
    if row is None or row.validation is None:
        return "–"
    if row.validation.metric is not None:
        return f"{row.validation.metric:.4g}"
    if row.validation.top1 is None:
        return loss_text(row.validation.loss) if row.validation.agreement is None else percent(row.validation.agreement)
    low, high = row.validation.top1_interval or (0.0, 0.0)
    return f"{percent(row.validation.top1)} ± {50 * (high - low):.1f}"


def summary(record: RunRecord) -> Group:
    """The part that fits on a screen. The rest is in table.md, the report, and `clado show RUN --details`."""
    texts = [f"{record.network}, {record.criterion}", *headlines(record)]
    parts: list[RenderableType] = [*map(Text, texts), table(record), Text(tables.verdict(record))]
    fewer = _fewer_corrections(record)
    parts += [Text(text) for text in (tables.serving_table(record), fewer, _notes(record)) if text]
    return Group(*parts)


def _fewer_corrections(record: RunRecord) -> str:
    budgets = [row.budget for row in _chosen(record) if row.assignment.corrected in ("static", "none")]
    return f"Deployed with fewer corrections, because that measured better: {', '.join(budgets)}." if budgets else ""


def _notes(record: RunRecord) -> str:
    count = len(record.notes)
    return f"{count} note{'' if count == 1 else 's'}: clado show RUN --details" if count else ""


def layers_text(names: Sequence[str], assignment: Assignment) -> str:
    """The layers of each bit-width by name, narrowest first. The first few of a width are named, the others counted."""
    groups: dict[str, list[str]] = {}
    order = sorted(zip(assignment.pairs, short_names(names), strict=True), key=lambda pair: [bits or 99 for bits in pair[0]])
    for (bits, activation_bits), name in order:
        groups.setdefault(bits_text(bits, activation_bits), []).append(name)
    lines = []
    for width, layers in groups.items():
        more = f" and {len(layers) - NAMED} more" if len(layers) > NAMED else ""
        title = "in float" if width == FLOAT_TEXT else f"{width} bits"
        lines.append(f"  {title}, {len(layers)} of {len(names)} layers: {', '.join(layers[:NAMED])}{more}")
    return "\n".join(lines)


def _chosen(record: RunRecord) -> list[Result]:
    return [row for row in record.results if row.method == CHOSEN]
