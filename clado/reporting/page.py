"""The page of a run: one HTML file, made from a run's folder.

Nothing here measures, or needs torch or matplotlib.

Everything is inside the file: style, charts (SVG), matrices, and the small script that zooms into
them. A content policy in its head keeps it from loading anything.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from clado.bits import FLOAT_BITS, bits_text
from clado.errors import StoreError
from clado.records.results import CHOSEN, UNIFORM, Result
from clado.records.run_record import RunRecord
from clado.records.text import REPORT, percent, short_names, size_text, write_text
from clado.reporting import summary, tables
from clado.reporting.glossary import WORDS
from clado.settings.redaction import redact

ROBUST_PERCENTILE = 98.0
# Colours of Okabe & Ito, as in plots.py. `chosen` has the colour of the page's text, dark or light.
COLOURS = {UNIFORM: "#8a8a8a", "layerwise": "#e69f00", "pairwise": "#0072b2", "gauss_newton": "#009e73", CHOSEN: "currentColor"}
OTHERS = ("#d55e00", "#cc79a7", "#56b4e9", "#8c510a", "#5e3c99")
SHADES = ("#ffffcc", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#0c2c84")  # ColorBrewer YlGnBu
LEFT, RIGHT, TOP, BOTTOM, WIDTH, HEIGHT = 58.0, 16.0, 14.0, 44.0, 660.0, 340.0  # size of a chart, in its own units


@dataclass(frozen=True)
class Point:
    """A result in a chart."""

    x: float
    """Horizontal position in the chart's units."""
    y: float
    """Vertical position in the chart's units."""
    text: str
    """Text that is shown at the point."""
    below: bool = False
    """Whether the value lies under the lower edge."""


@dataclass(frozen=True)
class Line:
    """The results of a method in a chart."""

    method: str
    """Name of the method."""
    colour: str
    """CSS colour."""
    points: tuple[Point, ...]
    """Points, ordered by size."""
    width: float = 1.8
    """Width of the line."""

    @property
    def path(self) -> str:
        """The line as SVG path.

        `uniform` is drawn in steps, because there is nothing between two uniform widths.
        """
        segment = "H{0:.1f}V{1:.1f}" if self.method == UNIFORM else "L{0:.1f} {1:.1f}"
        first, *others = self.points
        return f"M{first.x:.1f} {first.y:.1f}" + "".join(segment.format(point.x, point.y) for point in others)


@dataclass(frozen=True)
class Chart:
    """A quantity against the size of the searched weights."""

    title: str
    """Title."""
    y_label: str
    """Quantity and unit."""
    x_label: str
    """Size and unit."""
    lines: tuple[Line, ...]
    """One line for each method."""
    x_ticks: tuple[tuple[float, str], ...]
    """(position, text)."""
    y_ticks: tuple[tuple[float, str], ...]
    """(position, text)."""
    reference: float | None
    """Vertical position of the float network's value."""
    reference_label: str
    """Text of the reference."""


@dataclass(frozen=True)
class Axes:
    """Maps sizes and values to positions in a chart."""

    start: float
    """Size at the left edge."""
    stop: float
    """Size at the right edge."""
    floor: float
    """Value (or its logarithm) at the lower edge."""
    ceiling: float
    """Value (or its logarithm) at the upper edge."""
    logarithmic: bool
    """Whether the value's axis is logarithmic, to base 10."""

    def x(self, size: float) -> float:
        """Horizontal position of a size."""
        return LEFT + (size - self.start) / (self.stop - self.start) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Vertical position of a value. Values below the lower edge are drawn on the edge."""
        height = math.log10(value) if self.logarithmic else value
        fraction = (max(height, self.floor) - self.floor) / (self.ceiling - self.floor)
        return HEIGHT - BOTTOM - fraction * (HEIGHT - TOP - BOTTOM)


def write(folder: Path) -> Path:
    """Writes report.html into a run's folder and returns its path.

    Raises:
        StoreError: The folder holds no finished run, or a damaged matrix.
    """
    path = folder / REPORT
    write_text(path, render(folder))
    return path


def render(folder: Path) -> str:
    """The page of a run's folder as text. It raises as `write` does."""
    record = RunRecord.load(folder / "record.json")
    environment = Environment(
        loader=PackageLoader("clado.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    chosen = [result for result in record.results if result.method == CHOSEN]
    best = summary.recommended(record)
    return environment.get_template("page.html").render(
        record=record,
        caption=tables.caption(record),
        verdict=tables.verdict(record),
        gains=summary.gains(record),
        recommended=best and f"{best.budget}: {summary.why(record, best)}",
        chosen=chosen,
        charts=charts(record),
        colours=_colours(record),
        rows={budget: list(tables.rows(record, budget)) for budget in record.budgets},
        bits=_bits_table(record, chosen),
        widths=_shades(chosen),
        matrices=[heat_map(path) for path in sorted((folder / "matrices").glob("*.npz"))],
        comparisons=[row for row in record.comparisons if row.method == CHOSEN],
        interval_text=tables.interval_text,
        serving=record.serving,
        winners=tables.winners(record),
        solver=tables.solver_line(record),
        coverage=_coverage(record),
        provenance=_provenance(record),
        settings=_settings(folder / "config.yaml"),
        words=WORDS,
        percent=percent,
        size_text=size_text,
        loss_text=tables.loss_text,
        metric_text=tables.metric_text,
        frame={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM},
    )


def charts(record: RunRecord) -> list[Chart]:
    """A user-defined metric and top-1 (if there are labels), and measured loss against size."""
    top1 = {r: 100 * r.validation.top1 for r in record.results if r.validation is not None and r.validation.top1 is not None}
    loss = {r: r.loss_deployed for r in record.results if math.isfinite(r.loss_deployed)}
    metric = {r: r.validation.metric for r in record.results if r.validation is not None and r.validation.metric is not None}
    pictures = []
    if metric:
        title = f"{record.metric_name} on {record.float_accuracy.num_images:,} validation images, higher is better"
        pictures.append(_chart(record, title, record.metric_name or "", metric, record.float_accuracy.metric))
    if top1:
        images, title = record.float_accuracy.num_images, record.top1_title
        reference = None if record.float_accuracy.top1 is None else 100 * record.float_accuracy.top1
        pictures.append(_chart(record, f"Accuracy: {title} on {images:,} validation images", f"{title} (%)", top1, reference))
    if loss:
        title = f"Measured loss ({record.criterion}), lower is better"
        baseline = record.baseline if 0 < record.baseline < math.inf else None
        pictures.append(_chart(record, title, "loss", loss, baseline, logarithmic=True))
    return pictures


def _chart(
    record: RunRecord,
    title: str,
    label: str,
    values: Mapping[Result, float],
    reference: float | None,
    logarithmic: bool = False,
) -> Chart:
    unit, letters = (1e6, "MB") if max(r.size_bytes for r in values) >= 1_000_000 else (1e3, "kB")
    axes = _axes([r.size_bytes / unit for r in values], values, reference, logarithmic and min(values.values()) > 0)
    lines = []
    for method, colour in _colours(record).items():
        by_size = {result.size_bytes: result for result in values if result.method == method}
        points = [
            Point(
                axes.x(size / unit),
                axes.y(values[result]),
                f"{method} at {result.budget}: {size_text(size)}, {label} {values[result]:.4g}",
                not axes.logarithmic and values[result] < axes.floor,
            )
            for size, result in sorted(by_size.items())
        ]
        if points:
            lines.append(Line(method, colour, tuple(points)))
    # earlier lines are wider, so that they are visible below equal later ones
    lines = [replace(line, width=1.8 + 1.4 * max(0, len(lines) - 2 - k)) for k, line in enumerate(lines)]
    y_ticks = _decades(axes.floor, axes.ceiling) if axes.logarithmic else _ticks(axes.floor, axes.ceiling)
    return Chart(
        title,
        label,
        f"searched weights ({letters})",
        tuple(lines),
        tuple((axes.x(tick), f"{tick:g}") for tick in _ticks(axes.start, axes.stop)),
        tuple((axes.y(tick), f"{tick:g}") for tick in y_ticks),
        None if reference is None else axes.y(reference),
        f"float, {size_text(record.float_bytes)}",
    )


def _axes(sizes: Sequence[float], values: Mapping[Result, float], reference: float | None, logarithmic: bool) -> Axes:
    """Axes for all sizes, and for the values that a reader compares."""
    references = [] if reference is None else [reference]
    if logarithmic:
        heights = [math.log10(value) for value in [*values.values(), *references]]
    else:
        # one bad uniform assignment would make all other differences invisible
        heights = [value for result, value in values.items() if result.method != UNIFORM] or list(values.values())
        heights += references
    low, high = min(heights), max(heights)
    margin = max(0.08 * (high - low), 1e-6 * max(abs(high), 1.0), 0.0 if logarithmic else 0.02 * abs(high) * (high == low))
    x_margin = max(0.05 * (max(sizes) - min(sizes)), 0.02 * max(sizes))
    floor = low - (1.0 if logarithmic else 3.0) * margin
    ceiling = high + margin if logarithmic else min(high + margin, max(100.0, high))  # no accuracy is above 100 %
    return Axes(max(0.0, min(sizes) - x_margin), max(sizes) + x_margin, floor, ceiling, logarithmic)


def _ticks(low: float, high: float, max_steps: int = 7) -> list[float]:
    """Round numbers within a range: steps of 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10((high - low) / max_steps))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= max_steps)
    return [round(step * k, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Round numbers between two powers of ten: every decade.

    If there are few, 2 and 5 of each decade too.
    """
    factors = (1, 2, 5) if high - low < 3 else (1,)
    exponents = range(math.floor(low), math.ceil(high) + 1)
    return [f * 10.0**e for e in exponents for f in factors if low <= math.log10(f * 10.0**e) <= high]


def _colours(record: RunRecord) -> dict[str, str]:
    """The colour of each method of the record."""
    others = iter(OTHERS * (1 + len(record.methods) // len(OTHERS)))
    return {method: COLOURS.get(method) or next(others) for method in record.methods}


def _shades(chosen: Sequence[Result]) -> dict[int, tuple[str, str]]:
    """(paper, ink) of each bit-width that was chosen, pale to dark. Float counts 32 bits."""
    widths = sorted({bits or FLOAT_BITS for result in chosen for bits in result.assignment.bits})
    indices = np.linspace(1, len(SHADES) - 1, len(widths)).round().astype(int) if len(widths) != 1 else [2]
    return {b: (SHADES[k], "#111" if k < 4 else "#fff") for b, k in zip(widths, indices, strict=True)}


def _bits_table(record: RunRecord, chosen: Sequence[Result]) -> list[dict[str, Any]]:
    """One row for each layer.

    Its cells are (width, text) of each chosen assignment. `share` is in percent of the largest
    layer.
    """
    largest, names = max(record.layer_weights, default=1), short_names(record.layer_names)
    return [
        {
            "name": name,
            "num_weights": count,
            "share": 100 * count / largest,
            "cells": [(r.assignment.bits[i] or FLOAT_BITS, bits_text(*r.assignment.pairs[i])) for r in chosen],
        }
        for i, (name, count) in enumerate(zip(names, record.layer_weights, strict=True))
    ]


def heat_map(path: Path) -> dict[str, Any]:
    """A saved matrix as the page's script reads it.

    Args:
        path: File of the matrix.

    Returns:
        Layers, bit-widths, values and standard errors. Pairs that cannot be chosen are null.
        `limit` is the value of full colour: a high percentile of the nonzero magnitudes between
        layers, or else of the diagonal.

    Raises:
        StoreError: The file is damaged.
    """
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            values: NDArray[np.float64] = file["values"]
            errors: NDArray[np.float64] = file["standard_error"]
            options = [str(option).rpartition(":") for option in file["options"]]
            quarantined, forbidden, ranking_only = (file[name] for name in ("quarantined", "forbidden", "ranking_only"))
        names = [name for name, _, _ in options]
        between = np.array([[one != other for other in names] for one in names])
        magnitudes = np.abs(values[between] if values[between].any() else np.diag(values))
    except (OSError, ValueError, KeyError, IndexError, EOFError, BadZipFile) as error:
        raise StoreError(
            f"{path} is damaged ({error}); delete it and run `clado run` again. Nothing is measured twice"
        ) from error
    magnitudes, counts = magnitudes[magnitudes > 0], Counter(names)
    allowed = _allowed(between, quarantined, forbidden)
    return {
        "name": path.stem,
        "ranking_only": bool(ranking_only),
        "layers": [[name, count] for name, count in zip(short_names(list(counts)), counts.values(), strict=True)],
        "bits": [bits for _, _, bits in options],
        "limit": float(np.percentile(magnitudes, ROBUST_PERCENTILE)) if len(magnitudes) else 1.0,
        # four digits are enough for the eye, and halve the file
        "values": [
            [float(f"{v:.4g}") if ok else None for v, ok in zip(*row, strict=True)] for row in zip(values, allowed, strict=True)
        ],
        "errors": [[float(f"{v:.3g}") for v in row] for row in errors] if errors.ndim == 2 else None,
    }


def _allowed(between: NDArray[np.bool_], quarantined: NDArray[np.int64], forbidden: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The pairs of options that can be chosen. `between` marks pairs of different layers."""
    allowed = between | np.eye(len(between), dtype=bool)
    allowed[list(quarantined), :] = allowed[:, list(quarantined)] = False
    for one, other in forbidden:
        allowed[one, other] = allowed[other, one] = False
    return allowed


def _coverage(record: RunRecord) -> dict[str, Any]:
    """Parameters that are not searched, by reason. `share` is the fraction that is searched."""
    reasons: dict[str, list[tuple[str, int]]] = {}
    for name, size, reason in record.unsearched:
        reasons.setdefault(reason, []).append((name, size))
    groups = [
        {"why": reason, "bytes": sum(size for _, size in parameters), "parameters": parameters}
        for reason, parameters in sorted(reasons.items(), key=lambda item: -sum(size for _, size in item[1]))
    ]
    unsearched = sum(size for _, size, _ in record.unsearched)
    return {"groups": groups, "bytes": unsearched, "share": record.float_bytes / (record.float_bytes + unsearched)}


def _provenance(record: RunRecord) -> list[tuple[str, str]]:
    """(name, value) of everything that tells the origin of the numbers."""
    rows = [("fingerprint", record.fingerprint), ("criterion", record.criterion), ("corrections", record.corrections)]
    rows += [(name.replace("_", " "), value) for name, value in record.provenance.items() if value]
    rows += [(name.replace("_", " "), f"{d['num_images']:,} images, sha256 {d['sha256']}") for name, d in record.data.items()]
    return [(name, redact(value)) for name, value in rows]


def _settings(path: Path) -> str:
    """The run's settings as YAML, without passwords."""
    return redact(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else "not kept"
