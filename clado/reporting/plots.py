"""Pictures of a run: the interaction heat map, bits per layer, and accuracy and loss against size.

Figures are drawn without pyplot, so that no global state changes and any thread can draw.
Colour-blind readers can tell all colours apart: Okabe and Ito's for methods, pale to dark for
bit-widths, blue to red through white for signed numbers.
"""

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from clado.bits import FLOAT_BITS, bits_text
from clado.choosing.pareto import Front
from clado.interaction.matrix import InteractionMatrix
from clado.records.results import CHOSEN, UNIFORM, Result
from clado.records.run_record import RunRecord
from clado.records.text import short_names, size_text
from clado.space import Assignment, SearchSpace

DOTS_PER_INCH = 150
ROBUST_PERCENTILE = 98.0
INK, PALE = "#222222", "#d9d9d9"
# Okabe & Ito 2008, without the pale yellow, which is faint on white
STYLES: dict[str, tuple[str, str]] = {
    UNIFORM: ("#7f7f7f", "s"),
    "layerwise": ("#e69f00", "v"),
    "pairwise": ("#0072b2", "^"),
    "gauss_newton": ("#009e73", "D"),
    CHOSEN: ("#000000", "o"),
}
OTHER_STYLES = (("#d55e00", "P"), ("#cc79a7", "X"), ("#56b4e9", "<"), ("#8c510a", ">"), ("#5e3c99", "*"))


def save_all(record: RunRecord, matrices: Mapping[str, InteractionMatrix], folder: Path) -> list[Path]:
    """Draws every picture of a run as PNG.

    Args:
        record: The record.
        matrices: Interaction matrices, by the name that their files get.
        folder: Folder of the files.

    Returns:
        The files.
    """
    figures = {f"heat_map_{name}": heat_map(matrix) for name, matrix in matrices.items()}
    if CHOSEN in record.methods:
        figures["bits_per_layer"] = bits_per_layer(record)
    if record.float_accuracy.top1 is not None:
        figures["accuracy_against_size"] = accuracy_against_size(record)
    if record.metric_name is not None:
        figures["metric_against_size"] = metric_against_size(record)
    figures["loss_against_size"] = loss_against_size(record)
    return [save(figure, folder / f"{name}.png") for name, figure in figures.items()]


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure as PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH, facecolor="white")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def heat_map(matrix: InteractionMatrix) -> Figure:
    """The interaction matrix, with options grouped by layer.

    Pairs that cannot be chosen (two options of a layer) are grey.
    """
    space = matrix.space
    edges = np.array(space.offsets) - 0.5
    centres = (edges[:-1] + edges[1:]) / 2
    values = matrix.values.copy()
    values[matrix.in_layer_mask() & ~np.eye(len(values), dtype=bool)] = np.nan
    values[list(matrix.quarantined), :] = values[:, list(matrix.quarantined)] = np.nan
    for row, column in matrix.forbidden:
        values[row, column] = values[column, row] = np.nan
    limit = colour_limit(matrix)

    side = max(5.2, 0.165 * space.num_layers)  # in inches; a label needs 0.16
    names = short_names(space.names)
    label_inches = 0.062 * max(map(len, names))
    figure, axes = _figure(side + label_inches + 1.3, side + label_inches + 0.9)
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad=PALE)
    image = axes.imshow(values, cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")
    axes.xaxis.set_major_locator(FixedLocator(list(centres)))
    axes.yaxis.set_major_locator(FixedLocator(list(centres)))
    size = 8.0 if space.num_layers <= 32 else 7.0
    axes.set_xticklabels(names, rotation=90, fontsize=size)
    axes.set_yticklabels(names, fontsize=size)
    axes.tick_params(length=2, color=PALE)
    for edge in edges[1:-1]:
        axes.axhline(edge, color=PALE, linewidth=0.4)
        axes.axvline(edge, color=PALE, linewidth=0.4)
    clipped = bool((np.abs(values[~np.isnan(values)]) > limit).any())
    bar = figure.colorbar(image, ax=axes, extend="both" if clipped else "neither", fraction=0.04, pad=0.02)
    bar.ax.tick_params(labelsize=8)
    bar.set_label("Ĝ (ranks assignments, is not a loss)" if matrix.ranking_only else "Ĝ (twice the loss increase)", fontsize=9)
    images = f"{matrix.num_samples:,} images" if matrix.num_samples != 1 else "1 image"
    _title(axes, f"Interaction matrix by {matrix.estimator}", f"{matrix.criterion}, {images}; {_bits_sentence(matrix)}")
    return figure


def colour_limit(matrix: InteractionMatrix) -> float:
    """The value of full colour.

    It is a high percentile of the nonzero magnitudes between layers, or else of the diagonal.
    """
    magnitudes = np.abs(matrix.values[~matrix.in_layer_mask()])
    if not magnitudes.any():
        magnitudes = np.abs(np.diag(matrix.values))
    magnitudes = magnitudes[magnitudes > 0]
    return float(np.percentile(magnitudes, ROBUST_PERCENTILE)) if len(magnitudes) else 1.0


def bits_per_layer(record: RunRecord) -> Figure:
    """Bits of each layer for each budget's chosen assignment, next to the layer's weights.

    Layers are in execution order.

    Colours are of the weights' bits. If the run's activations have several widths, cells read
    weight bits/activation bits.

    Args:
        record: A record with at least one chosen assignment.
    """
    columns = [result for budget in record.budgets if (result := record.find(budget, CHOSEN)) is not None]
    labels = [f"{result.budget}\n{size_text(result.size_bytes)}" for result in columns]
    activation_widths = {a for result in record.results for a in result.assignment.activation_bits if a is not None}
    assignments = [result.assignment for result in columns]
    title = f"Bits per layer, {record.network}"
    return _bits_figure(record.layer_names, record.layer_weights, labels, assignments, title, activation_widths)


def bits_of_assignments(space: SearchSpace, assignments: Mapping[str, Assignment]) -> Figure:
    """Bits of each layer of some assignments, by their titles, next to the layers' weights."""
    labels = [f"{title}\n{size_text(space.size_bytes(assignment))}" for title, assignment in assignments.items()]
    weights = [layer.num_weights for layer in space.layers]
    activation_widths = {width for width in space.activation_widths if width is not None}
    return _bits_figure(space.names, weights, labels, list(assignments.values()), "Bits per layer", activation_widths)


def _bits_figure(
    layer_names: Sequence[str],
    layer_weights: Sequence[int],
    labels: Sequence[str],
    assignments: Sequence[Assignment],
    title: str,
    activation_widths: Collection[int],
) -> Figure:
    """A column of coloured cells for each assignment, and a bar for each layer."""
    names, num_columns = short_names(layer_names), max(len(assignments), 2)
    width = 0.075 * max(map(len, names)) + 0.78 * num_columns + 2.4
    figure = _canvas(width, max(3.2, 0.2 * len(names) + 1.3))
    axes, side = figure.subplots(1, 2, sharey=True, width_ratios=(num_columns * 0.78, 1.5))
    _draw_cells(axes, assignments, with_activations=len(activation_widths) > 1)
    axes.set_xticks(range(len(assignments)), labels, fontsize=7.5)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.tick_params(length=0)
    _draw_weights(side, layer_weights)
    for axis in (axes, side):
        axis.spines[:].set_visible(False)
    if len(activation_widths) == 1:
        title += f", activations at {next(iter(activation_widths))} bits"
    elif activation_widths:
        title += ", weights/activations"
    axes.set_title(title, fontsize=11, fontweight="bold", color=INK, loc="left", pad=14)
    return figure


def _draw_cells(axes: Axes, assignments: Sequence[Assignment], with_activations: bool) -> None:
    """One coloured cell with its bits for each layer (row) and assignment (column)."""
    bits = np.array([[b or FLOAT_BITS for b in assignment.bits] for assignment in assignments], dtype=np.int64).T
    widths = sorted(set(bits.ravel().tolist()))
    shades = matplotlib.colormaps["YlGnBu"](np.linspace(0.15, 0.9, max(len(widths), 2)))[: len(widths)]
    colour = dict(zip(widths, shades, strict=True))
    cells = np.array([[colour[b] for b in row] for row in bits.tolist()])
    axes.imshow(cells, aspect="auto", interpolation="nearest")
    for i, row in enumerate(bits.tolist()):
        for k, b in enumerate(row):
            pair = assignments[k].pairs[i]
            text = bits_text(*pair) if with_activations else bits_text(pair[0])
            axes.text(k, i, text, ha="center", va="center_baseline", fontsize=7.5, color=_ink_on(colour[b]))
    for k in range(1, len(assignments)):
        axes.axvline(k - 0.5, color="white", linewidth=2)
    for i in range(1, len(bits)):
        axes.axhline(i - 0.5, color="white", linewidth=0.6)


def _draw_weights(axes: Axes, layer_weights: Sequence[int]) -> None:
    """One bar for each layer."""
    axes.barh(range(len(layer_weights)), [count / 1000 for count in layer_weights], color="#8f8f8f", height=0.7)
    axes.set_title("thousand weights", fontsize=8, color=INK)
    axes.tick_params(axis="x", labelsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=PALE, linewidth=0.5)
    axes.set_axisbelow(True)


def accuracy_against_size(record: RunRecord) -> Figure:
    """Top-1 on the validation set against the size of the searched weights."""
    points = _points(record, _top1_percent)
    reference = None if record.float_accuracy.top1 is None else 100 * record.float_accuracy.top1
    figure = _against_size(record, points, reference, f"{record.top1_title} (%)")
    axes = figure.axes[0]
    # one bad uniform assignment would make all other differences invisible, so it is marked at the lower edge
    others = [y for method, line in points.items() if method != UNIFORM for _, y in line]
    others += [] if reference is None else [reference]
    if others:
        low, high = min(others), max(others)
        margin = max(0.08 * (high - low), 0.1)
        floor = low - 3 * margin
        outliers = [(x, y) for x, y in points.get(UNIFORM, []) if y < floor]
        colour, marker = STYLES[UNIFORM]
        for x, y in outliers:
            axes.plot([x], [floor], marker=marker, color=colour, clip_on=False, markersize=6, zorder=3)
            _note(axes, f"uniform {y:.1f} %  ↓", (x, floor), (8, 5))
        if outliers:
            axes.set_ylim(floor, high + margin)
        axes.set_ylim(top=min(axes.get_ylim()[1], 100.0))
    images = record.float_accuracy.num_images
    _title(axes, f"Accuracy against size, {record.network}", f"{images:,} validation images")
    return figure


def metric_against_size(record: RunRecord) -> Figure:
    """A user-defined metric on the validation set against the size of the searched weights."""
    points = _points(record, lambda result: None if result.validation is None else result.validation.metric)
    figure = _against_size(record, points, record.float_accuracy.metric, record.metric_name or "")
    images = record.float_accuracy.num_images
    _title(figure.axes[0], f"{record.metric_name} against size, {record.network}", f"{images:,} validation images")
    return figure


def loss_against_size(record: RunRecord) -> Figure:
    """Measured loss on the decision set against the size of the searched weights."""
    points = _points(record, lambda result: result.loss_deployed)
    positive = all(y > 0 for line in points.values() for _, y in line)
    reference = record.baseline if record.baseline > 0 or not positive else None
    figure = _against_size(record, points, reference, f"loss ({record.criterion})")
    axes = figure.axes[0]
    if positive and any(points.values()):
        _logarithmic(axes)
    _title(axes, f"Measured loss against size, {record.network}", "decision set; lower is better")
    return figure


def predicted_front(front: Front) -> Figure:
    """Predicted loss increase against the size of the searched weights, for the answers of a front."""
    figure, axes = _figure(6.4, 3.8)
    sizes = [solution.size_bytes for solution in front.solutions]
    unit, letters = (1e6, "MB") if max(sizes, default=0) >= 1_000_000 else (1e3, "kB")
    increases = [solution.objective for solution in front.solutions]
    colour, marker = STYLES["gauss_newton"]
    axes.plot([size / unit for size in sizes], increases, color=colour, marker=marker, markersize=5)
    if increases and min(increases) > 0:
        _logarithmic(axes)
    axes.set_xlabel(f"searched weights ({letters})")
    axes.set_ylabel("predicted loss increase")
    axes.grid(color=PALE, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    solution = front.solutions[0] if front.solutions else None
    _title(axes, "Predicted front", "" if solution is None else f"{solution.estimator}; lower is better")
    return figure


def _top1_percent(result: Result) -> float | None:
    return None if result.validation is None or result.validation.top1 is None else 100 * result.validation.top1


def _points(record: RunRecord, value: Callable[[Result], float | None]) -> dict[str, list[tuple[float, float]]]:
    """(bytes, value) of each method's results, ordered by size, with each size once."""
    lines: dict[str, dict[float, float]] = {method: {} for method in record.methods}
    for result in record.results:
        if (number := value(result)) is not None and math.isfinite(number):
            lines[result.method][result.size_bytes] = number
    return {method: sorted(line.items()) for method, line in lines.items()}


def _against_size(
    record: RunRecord, points: Mapping[str, Sequence[tuple[float, float]]], reference: float | None, label: str
) -> Figure:
    figure, axes = _figure(7.6, 4.6)
    unit, letters = (1e6, "MB") if max((r.size_bytes for r in record.results), default=0) >= 1_000_000 else (1e3, "kB")
    if reference is not None:
        label_float = f"float ({size_text(record.float_bytes)})"
        axes.axhline(reference, color=INK, linewidth=1, linestyle=(0, (5, 3)), label=label_float, zorder=1)
    others = iter(OTHER_STYLES * (1 + len(points) // len(OTHER_STYLES)))
    for k, (method, line) in enumerate(points.items()):
        colour, marker = STYLES.get(method) or next(others)
        if not line:
            continue
        x, y = zip(*line, strict=True)
        chosen, uniform = method == CHOSEN, method == UNIFORM
        axes.plot(
            x, y, color=colour, marker=marker, label=method, zorder=5 if chosen else 2,
            # earlier lines are wider, so that they are visible below equal later ones
            linewidth=0.9 if uniform else 1.5 + max(0, len(points) - 2 - k),
            # circles without a line, around the point of the method that was chosen
            linestyle="none" if chosen else ":" if uniform else "-",
            # steps, because there is nothing between two uniform widths
            drawstyle="steps-post" if uniform else "default",
            markersize=10 if chosen else 5.5,
            markerfacecolor="none" if chosen else colour,
            markeredgewidth=1.3 if chosen else 0.0,
        )  # fmt: skip
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / unit:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"searched weights ({letters})", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(color=PALE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.05, y=0.08)
    axes.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _logarithmic(axes: Axes) -> None:
    """A vertical axis by powers of ten, labelled at 1, 2 and 5 of each, so that a narrow range has several labels too."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


class Picture(Figure):
    """A figure that notebooks show, whatever the backend."""

    def _repr_png_(self) -> bytes:
        file = BytesIO()
        self.savefig(file, format="png", dpi=100, facecolor="white")
        return file.getvalue()


def _canvas(width: float, height: float) -> Figure:
    figure = Picture(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = _canvas(width, height)
    return figure, figure.subplots()


def _title(axes: Axes, title: str, subtitle: str) -> None:
    axes.set_title(title, fontsize=11, fontweight="bold", color=INK, loc="left", pad=22)
    _note(axes, subtitle, (0, 1), (0, 8), "axes fraction")


def _note(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], coordinates: str = "data") -> None:
    """Small grey text. Its offset is in points."""
    axes.annotate(text, at, offset, xycoords=coordinates, textcoords="offset points", fontsize=8.5, color="#555555")


def _bits_sentence(matrix: InteractionMatrix) -> str:
    space = matrix.space
    candidates = {space.candidates(layer) for layer in range(space.num_layers)}
    if len(candidates) > 1:
        return "in each layer narrow bits first"
    with_activations = len(space.activation_widths) > 1
    texts = [bits_text(b, a if with_activations else None) for b, a in candidates.pop()]
    unit = "bits of weights/activations" if with_activations else "bits"
    return f"in each layer {', '.join(texts)} {unit} from the left and the top"


def _ink_on(colour: NDArray[np.float64]) -> str:
    """Black or white, so that text is legible on the colour.

    The decision uses the approximate relative luminance of sRGB.
    """
    return "black" if float(np.dot(colour[:3], (0.299, 0.587, 0.114))) > 0.5 else "white"
