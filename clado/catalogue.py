"""Runs below a folder: which there are, how far each came, and how several compare. Reads record.json and config.yaml alone."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from clado.errors import CladoError, StoreError
from clado.records import CHOSEN, Result, RunRecord, percent, size_text
from clado.report import loss_text

RECORD, CONFIG, INSIDE = (
    "record.json",
    "config.yaml",
    ("prepared", "store.zarr", "exports", "evaluations", "mlflow-artifacts", "sweep"),
)


@dataclass(frozen=True)
class Entry:
    """A run's folder: its record, or why there is none (`state`: unfinished, damaged); `when` it was last written, in seconds."""

    folder: Path
    state: str
    when: float
    record: RunRecord | None = None
    problem: str = ""

    @property
    def date(self) -> str:
        """Of the last record, or of the settings where there is none, in local time."""
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(self.when))


def entry(folder: Path) -> Entry:
    """What a folder holds. StoreError where it is the folder of no run."""
    file, config = folder / RECORD, folder / CONFIG
    if file.is_file():
        when = file.stat().st_mtime
        try:
            return Entry(folder, "finished", when, RunRecord.load(file))
        except CladoError as error:
            return Entry(folder, "damaged", when, problem=str(error))
    if config.is_file():
        return Entry(folder, "unfinished", config.stat().st_mtime, problem="no record yet; the same `clado run` goes on with it")
    raise StoreError(f"{folder} is not the folder of a run; expected such as `clado run` makes under runs/")


def find(top: Path) -> list[Entry]:
    """Every run at or below a folder, newest first; what a run keeps inside its folder is not looked into."""
    if not top.is_dir():
        raise StoreError(f"{top} is not a folder; expected one with runs below it, such as runs/")
    found = []
    for place, folders, files in os.walk(top):
        if RECORD in files or CONFIG in files:
            found.append(entry(Path(place)))
            folders.clear()
        else:
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in INSIDE)
    return sorted(found, key=lambda one: (-one.when, one.folder))


def listing(entries: Sequence[Entry], top: Path) -> Table:
    """A row a run: name, network, corrections, date, and for each budget the chosen size and top-1 (or loss without labels)."""
    table = Table()
    for heading in ("run", "network", "corrections", "date", "budget", "size", "top-1 %"):
        table.add_column(heading, justify="right" if heading in ("size", "top-1 %") else "left", overflow="fold")
    for one in entries:
        name = one.folder.name if one.folder == top else str(one.folder.relative_to(top))
        if one.record is None:
            table.add_row(Text(name), Text(one.state, style="yellow"), Text(one.problem), one.date, "", "", "", end_section=True)
            continue
        record = one.record
        cells = [_cells(record, record.find(budget, CHOSEN)) for budget in record.budgets]
        table.add_row(
            Text(name, style="bold"),
            Text(record.network),
            Text(record.corrections),
            one.date,
            "\n".join(record.budgets),
            "\n".join(size for size, _ in cells),
            "\n".join(quality for _, quality in cells),
            end_section=True,
        )
    return table


def comparison(entries: Sequence[Entry]) -> Table:
    """Budgets × runs: size, measured loss and top-1 of what each chose; the best top-1 of a budget is bold.

    The first rows hold each run's network, corrections and float top-1. StoreError where one of the runs has no record.
    """
    records = []
    for one in entries:
        if one.record is None:
            raise StoreError(f"{one.folder} is {one.state}: {one.problem}")
        records.append(one.record)
    table = Table()
    table.add_column("budget", no_wrap=True)
    table.add_column("", style="dim", no_wrap=True)
    for name in _names([one.folder for one in entries]):
        table.add_column(Text(name), justify="right", overflow="fold")
    table.add_row("", "network", *[Text(record.network) for record in records])
    table.add_row("", "corrections", *[Text(record.corrections) for record in records])
    table.add_row("", "float top-1 %", *[_float(record) for record in records], end_section=True)
    budgets = list(dict.fromkeys(budget for record in records for budget in record.budgets))
    for budget in sorted(
        budgets, key=lambda name: min(r.size_bytes for record in records for r in record.results if r.budget == name)
    ):
        found = [record.find(budget, CHOSEN) for record in records]
        top1 = [None if result is None or result.validation is None else result.validation.top1 for result in found]
        best = max((value for value in top1 if value is not None), default=None)
        table.add_row(Text(budget, style="bold"), "size", *["–" if r is None else size_text(r.size_bytes) for r in found])
        table.add_row("", "loss", *["–" if r is None else loss_text(r.loss_shipped) for r in found])
        shown = [Text(percent(value), style="bold green" if value is not None and value == best else "") for value in top1]
        table.add_row("", "top-1 %", *shown, end_section=True)
    return table


def cautions(entries: Sequence[Entry]) -> list[str]:
    """What makes the numbers of several runs differ beside their settings: other validation images, another criterion."""
    records = [one.record for one in entries if one.record is not None]
    found = []
    if len({record.criterion for record in records}) > 1:
        found.append(f"losses are of different criteria ({', '.join(record.criterion for record in records)}) and do not compare")
    hashes = {record.data["validation_set"]["sha256"] for record in records if "validation_set" in record.data}
    counts = {record.float_accuracy.num_images for record in records}
    if len(hashes) > 1 or len(counts) > 1:
        found.append("top-1 is of different validation images")
    found += [
        f"{one.folder.name}: top-1 is {one.record.top1_name}, of {one.record.float_accuracy.num_images:,} images"
        for one in entries
        if one.record is not None and one.record.top1_name != "top1"
    ]
    return found


def _cells(record: RunRecord, result: Result | None) -> tuple[str, str]:
    if result is None:
        return "–", "–"
    top1 = None if result.validation is None else result.validation.top1
    name = "" if record.top1_name == "top1" else f"{record.top1_name} "
    return size_text(result.size_bytes), f"loss {loss_text(result.loss_shipped)}" if top1 is None else name + percent(top1)


def _float(record: RunRecord) -> str:
    name = "" if record.top1_name == "top1" else f"{record.top1_name} "
    return f"{name}{percent(record.float_accuracy.top1)} ({record.float_accuracy.num_images:,})"


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or the whole where two are the same."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]
