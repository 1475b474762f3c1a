"""The page of a run: one self-contained HTML file. Reads a run's folder; nothing here measures, or needs torch or matplotlib.

Everything is inside the file: style, pictures (SVG, drawn here), the matrices and the small script that zooms into them. A
content policy in its head forbids it to load anything.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from clado.errors import StoreError
from clado.records import CHOSEN, UNIFORM, Result, RunRecord, percent, short_names, size_text, write_text
from clado.reporting import tables
from clado.settings.redaction import redact
from clado.space import bits_text

PAGE = "report.html"
ROBUST_PERCENTILE = 98.0
# Okabe & Ito's, as in plots.py; `chosen` takes the ink of the page, which is dark on light and light on dark
COLOURS = {UNIFORM: "#8a8a8a", "layerwise": "#e69f00", "pairwise": "#0072b2", "gauss_newton": "#009e73", CHOSEN: "currentColor"}
OTHERS = ("#d55e00", "#cc79a7", "#56b4e9", "#8c510a", "#5e3c99")
SHADES = ("#ffffcc", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#0c2c84")  # ColorBrewer YlGnBu
LEFT, RIGHT, TOP, BOTTOM, WIDTH, HEIGHT = 58.0, 16.0, 14.0, 44.0, 660.0, 340.0  # of a chart, in its own units


@dataclass(frozen=True)
class Point:
    """A result in a chart, in the chart's units; `below` says that it lies under the lower edge."""

    x: float
    y: float
    text: str
    below: bool = False


@dataclass(frozen=True)
class Line:
    """The results of a method in a chart."""

    method: str
    colour: str
    points: tuple[Point, ...]

    @property
    def path(self) -> str:
        """As SVG draws it; between two uniform widths there is nothing, so `uniform` goes by steps."""
        middle = "H{0:.1f}V{1:.1f}" if self.method == UNIFORM else "L{0:.1f} {1:.1f}"
        first, *others = self.points
        return f"M{first.x:.1f} {first.y:.1f}" + "".join(middle.format(point.x, point.y) for point in others)


@dataclass(frozen=True)
class Chart:
    """Something against the size of the searched weights."""

    title: str
    y_label: str
    x_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    reference: float | None
    reference_label: str


def write(folder: Path) -> Path:
    """Writes tables.html into a run's folder and returns it; StoreError where the folder holds no finished run."""
    path = folder / PAGE
    write_text(path, render(folder))
    return path


def render(folder: Path) -> str:
    """The page of a run's folder, as text."""
    record = RunRecord.load(folder / "record.json")
    environment = Environment(
        loader=PackageLoader("clado.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    chosen = [result for result in record.results if result.method == CHOSEN]
    return environment.get_template("page.html").render(
        record=record,
        caption=tables.caption(record),
        verdict=tables.verdict(record),
        chosen=chosen,
        charts=charts(record),
        colours=_colours(record),
        rows={budget: list(tables.rows(record, budget)) for budget in record.budgets},
        bits=_bits_table(record, chosen),
        widths=_shades(chosen),
        matrices=[heat_map(path) for path in sorted((folder / "matrices").glob("*.npz"))],
        winners=tables.winners(record),
        solver=tables.solver_line(record),
        coverage=_coverage(record),
        provenance=_provenance(record),
        settings=_settings(folder / "config.yaml"),
        percent=percent,
        size_text=size_text,
        loss_text=tables.loss_text,
        frame={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM},
    )


def charts(record: RunRecord) -> list[Chart]:
    """Top-1 (where there are labels) and measured loss against size."""
    top1 = {r: 100 * r.validation.top1 for r in record.results if r.validation is not None and r.validation.top1 is not None}
    loss = {r: r.loss_deployed for r in record.results if math.isfinite(r.loss_deployed)}
    found = []
    if top1:
        images = record.float_accuracy.num_images
        reference = None if record.float_accuracy.top1 is None else 100 * record.float_accuracy.top1
        found.append(
            _chart(
                record,
                f"Accuracy: {record.top1_title} on {images:,} validation images",
                f"{record.top1_title} (%)",
                top1,
                reference,
            )
        )
    if loss:
        title = f"Measured loss ({record.criterion}), lower is better"
        found.append(
            _chart(record, title, "loss", loss, record.baseline if 0 < record.baseline < math.inf else None, logarithmic=True)
        )
    return found


def _chart(
    record: RunRecord,
    title: str,
    label: str,
    values: Mapping[Result, float],
    reference: float | None,
    logarithmic: bool = False,
) -> Chart:
    logarithmic = logarithmic and min(values.values()) > 0
    unit, letters = (1e6, "MB") if max(r.size_bytes for r in values) >= 1_000_000 else (1e3, "kB")
    sizes = [r.size_bytes / unit for r in values]
    # one bad uniform assignment would flatten everything else
    kept = [value for result, value in values.items() if result.method != UNIFORM] or list(values.values())
    kept += [] if reference is None else [reference]
    if logarithmic:
        kept = [math.log10(value) for value in [*values.values(), *([] if reference is None else [reference])]]
    low, high = min(kept), max(kept)
    pad = max(0.08 * (high - low), 1e-6 * max(abs(high), 1.0), 0.0 if logarithmic else 0.02 * abs(high) * (high == low))
    floor, ceiling = low - (1.0 if logarithmic else 3.0) * pad, high + pad
    x_pad = max(0.05 * (max(sizes) - min(sizes)), 0.02 * max(sizes))
    start, stop = max(0.0, min(sizes) - x_pad), max(sizes) + x_pad

    def across(size: float) -> float:
        return LEFT + (size - start) / (stop - start) * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        height = math.log10(value) if logarithmic else value
        return HEIGHT - BOTTOM - (max(height, floor) - floor) / (ceiling - floor) * (HEIGHT - TOP - BOTTOM)

    lines = []
    for method, colour in _colours(record).items():
        of_method = {result.size_bytes: result for result in values if result.method == method}
        points = [
            Point(
                across(size / unit),
                up(values[result]),
                f"{method} at {result.budget}: {size_text(size)}, {label} {_number(values[result])}",
                not logarithmic and values[result] < floor,
            )
            for size, result in sorted(of_method.items())
        ]
        if points:
            lines.append(Line(method, colour, tuple(points)))
    y_values = _decades(floor, ceiling) if logarithmic else _ticks(floor, ceiling)
    return Chart(
        title,
        label,
        f"searched weights ({letters})",
        tuple(lines),
        tuple((across(tick), f"{tick:g}") for tick in _ticks(start, stop)),
        tuple((up(tick), f"{tick:g}") for tick in y_values),
        None if reference is None else up(reference),
        f"float, {size_text(record.float_bytes)}",
    )


def _ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers within a range: steps of 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10((high - low) / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= most)
    return [round(step * k, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Round numbers between two powers of ten: every decade, and 2 and 5 of each where there are few."""
    factors = (1, 2, 5) if high - low < 3 else (1,)
    exponents = range(math.floor(low), math.ceil(high) + 1)
    return [f * 10.0**e for e in exponents for f in factors if low <= math.log10(f * 10.0**e) <= high]


def _number(value: float) -> str:
    return f"{value:.4g}"


def _colours(record: RunRecord) -> dict[str, str]:
    """The colour of each method of the record."""
    others = iter(OTHERS * (1 + len(record.methods) // len(OTHERS)))
    return {method: COLOURS.get(method) or next(others) for method in record.methods}


def _shades(chosen: Sequence[Result]) -> dict[int, tuple[str, str]]:
    """(paper, ink) of each bit-width that was chosen, pale to dark."""
    widths = sorted({bits for result in chosen for bits in result.assignment.bits if bits is not None})
    spread = np.linspace(1, len(SHADES) - 1, len(widths)).round().astype(int) if len(widths) != 1 else [2]
    return {b: (SHADES[k], "#111" if k < 4 else "#fff") for b, k in zip(widths, spread, strict=True)}


def _bits_table(record: RunRecord, chosen: Sequence[Result]) -> list[dict[str, Any]]:
    """A row a layer: its name, its share of the weights, and (width, text) of each chosen assignment."""
    most, names = max(record.layer_weights, default=1), short_names(record.layer_names)
    return [
        {
            "name": name,
            "num_weights": count,
            "share": 100 * count / most,
            "cells": [
                (r.assignment.bits[i], bits_text(*r.assignment.pairs[i]) if r.assignment.bits[i] else "float") for r in chosen
            ],
        }
        for i, (name, count) in enumerate(zip(names, record.layer_weights, strict=True))
    ]


def heat_map(path: Path) -> dict[str, Any]:
    """A saved matrix as the page's script reads it, without what no choice may have; StoreError where the file is damaged.

    `limit` is the value of full colour: a high percentile of the magnitudes between layers that are not zero, or else of the
    diagonal.
    """
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            values: NDArray[np.float64] = file["values"]
            errors: NDArray[np.float64] = file["standard_error"]
            options = [str(option).rpartition(":") for option in file["options"]]
            quarantined, forbidden, ranking_only = (file[name] for name in ("quarantined", "forbidden", "ranking_only"))
        names = [name for name, _, _ in options]
        counts = Counter(names)
        between = np.array([[one != other for other in names] for one in names])
        magnitudes = np.abs(values[between] if values[between].any() else np.diag(values))
    except (OSError, ValueError, KeyError, IndexError, EOFError, BadZipFile) as error:
        raise StoreError(
            f"{path} is damaged ({error}); delete it and run `clado run` again: nothing is measured twice"
        ) from error
    magnitudes = magnitudes[magnitudes > 0]
    allowed = between | np.eye(len(values), dtype=bool)
    allowed[list(quarantined), :] = allowed[:, list(quarantined)] = False
    for one, other in forbidden:
        allowed[one, other] = allowed[other, one] = False
    return {
        "name": path.stem,
        "ranking_only": bool(ranking_only),
        "layers": [[name, count] for name, count in zip(short_names(list(counts)), counts.values(), strict=True)],
        "bits": [bits for _, _, bits in options],
        "limit": float(np.percentile(magnitudes, ROBUST_PERCENTILE)) if len(magnitudes) else 1.0,
        # four digits are more than an eye can tell, and half the file
        "values": [
            [float(f"{v:.4g}") if ok else None for v, ok in zip(*row, strict=True)] for row in zip(values, allowed, strict=True)
        ],
        "errors": [[float(f"{v:.3g}") for v in row] for row in errors] if errors.ndim == 2 else None,
    }


def _coverage(record: RunRecord) -> dict[str, Any]:
    """What is searched, and what is not: grouped by why, largest first."""
    reasons: dict[str, list[tuple[str, int]]] = {}
    for name, size, why in record.unsearched:
        reasons.setdefault(why, []).append((name, size))
    groups = [
        {"why": why, "bytes": sum(size for _, size in found), "parameters": found}
        for why, found in sorted(reasons.items(), key=lambda item: -sum(size for _, size in item[1]))
    ]
    left = sum(size for _, size, _ in record.unsearched)
    return {"groups": groups, "bytes": left, "share": record.float_bytes / (record.float_bytes + left)}


def _provenance(record: RunRecord) -> list[tuple[str, str]]:
    """(what, value) of where the numbers come from."""
    rows = [("fingerprint", record.fingerprint), ("criterion", record.criterion), ("corrections", record.corrections)]
    rows += [(name.replace("_", " "), value) for name, value in record.provenance.items() if value]
    rows += [(name.replace("_", " "), f"{d['num_images']:,} images, sha256 {d['sha256']}") for name, d in record.data.items()]
    return [(name, redact(value)) for name, value in rows]


def _settings(path: Path) -> str:
    """The run's settings as YAML, without passwords."""
    return redact(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else "not kept"
