"""STUDY.md and its plots from study.jsonl: `python -m tests.benchmarks.study_table`. Needs no torch."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from clado.records import markdown_table

HERE = Path(__file__).parent
DATA, TABLE, PLOTS = HERE / "study.jsonl", HERE / "STUDY.md", HERE.parents[1] / "docs"
# In the first cells only. `_plainest`: as `chosen` and `chosen_full` were before the Brier score, the least sum of singles within
# a standard error of the least loss; `chosen_full_least`: everything but the tempered estimators, and the least loss.
EARLIER = {"chosen_plainest", "chosen_full_plainest", "chosen_full_least"}
METHODS = (
    *("uniform", "layerwise", "blockwise", "pairwise", "pairwise_raw", "gauss_newton"),
    *("tempered2", "tempered4", "tempered8", "hawq", "mpqco", "fisher"),
    *("chosen", "chosen_plainest", "chosen_least", "chosen_full", "chosen_full_plainest", "chosen_full_least"),
)
SETTINGS = ("plain", "corrected")
SHOWN = ("uniform", "layerwise", "pairwise", "gauss_newton", "mpqco", "chosen")
LOW = (2.25, 2.5, 3, 3.5)  # the budgets of the goals
MARGIN = 0.5  # points of top-1
Cell = tuple[str, str, str, int, int]  # network, space, setting, images, draw
Figures = Mapping[Cell, Mapping[tuple[str, float], Sequence[Any]]]  # what each method answers to each budget: values in order of
BITS, TOP1, LOSS, MEASURED, PREDICTED = range(5)  # top-1 and loss on the test images, losses on the sensitivity set


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a cell is of."""
    return tuple(row[k] for k in ("network", "space", "setting", "images", "draw"))


def lines(path: Path = DATA) -> list[dict[str, Any]]:
    """What was measured so far: a line a cell, and a further one for methods that came later."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rows(path: Path = DATA) -> list[dict[str, Any]]:
    """The cells so far, each with all of its methods."""
    return merged(lines(path))


def merged(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each cell, with the methods of all of its lines."""
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        device = f"{line['device']} (torch {line['torch']})"
        cell = cells.get(key(line), {**line, "rows": [], "devices": []})
        costs = {cost: cell[cost] | line[cost] for cost in ("forward_images", "backward_images")}
        cells[key(line)] = {**cell, **costs, "rows": cell["rows"] + line["rows"], "devices": [*cell["devices"], device]}
    return list(cells.values())


def methods(row: Mapping[str, Any]) -> frozenset[str]:
    """Methods of a cell."""
    return frozenset(method for method, *_ in row["rows"])


def figures(rows: Iterable[Mapping[str, Any]]) -> Figures:
    """Every cell's answers by method and budget."""
    return {
        (r["network"], r["space"], r["setting"], r["images"], r["draw"]): {(m, b): rest for m, b, *rest in r["rows"]}
        for r in rows
    }


def chose_the_defaults(cell: Cell) -> bool:
    """Whether the rule of `chosen` was picked on a cell (notebooks/LOG.md); the others confirm it."""
    _, _, setting, images, _ = cell
    return setting == "plain" and images < 1024


def differences(found: Figures, setting: str, one: str, other: str, budgets: Iterable[float]) -> dict[tuple[Cell, float], float]:
    """Points of top-1 by which a method is above another, in every cell and budget where both are."""
    return {
        (cell, b): 100 * (answers[one, b][TOP1] - answers[other, b][TOP1])
        for cell, answers in found.items()
        if cell[2] == setting
        for b in budgets
        if (one, b) in answers and (other, b) in answers
    }


def interval(values: Mapping[tuple[Cell, float], float], resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): the 95 % bootstrap interval of the mean over networks and, within each, over draws."""
    groups: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for ((network, _, _, _, draw), _), value in values.items():
        groups[network][draw].append(value)
    rng = np.random.default_rng(seed)
    networks = [np.array([[sum(part), len(part)] for _, part in sorted(draws.items())]) for _, draws in sorted(groups.items())]
    totals = np.zeros((resamples, 2))  # sum and number of the values drawn
    chosen = rng.integers(len(networks), size=(resamples, len(networks)))
    for number, draws in enumerate(networks):
        for column in chosen.T:
            here = column == number
            again = rng.integers(len(draws), size=(int(here.sum()), len(draws)))
            totals[here] += draws[again].sum(axis=1)
    low, high = np.quantile(totals[:, 0] / totals[:, 1], (0.025, 0.975))
    return float(np.mean(list(values.values()))), float(low), float(high)


def comparison(found: Figures, setting: str, method: str) -> list[list[str]]:
    """A row for each opponent: the mean difference with its interval, the cells lost by more than the margin, the worst."""
    lines = []
    for other in METHODS:
        values = differences(found, setting, method, other, LOW) if other != method else {}
        if not values:
            continue
        mean, low, high = interval(values)
        lost = [value for value in values.values() if value < -MARGIN]
        share, worst = f"{100 * len(lost) / len(values):.0f} %", f"{min(values.values()):+.2f}"
        lines.append([other, str(len(values)), f"{mean:+.2f}", f"{low:+.2f} to {high:+.2f}", share, worst])
    return lines


def losing(found: Figures, setting: str, method: str) -> list[list[str]]:
    """Every answer by which the method loses more than the margin, the worst first: `chosen` to any single method, the others to
    layerwise or pairwise."""
    single = [other for other in METHODS if not other.startswith("chosen")]
    rows = [
        (value, other, cell, budget)
        for other in (single if method == "chosen" else ("layerwise", "pairwise"))
        for (cell, budget), value in differences(found, setting, method, other, LOW).items()
        if value < -MARGIN
    ]
    return [
        [network, space, str(images), str(draw), f"{budget:g}", other, f"{value:+.2f}"]
        for value, other, (network, space, _, images, draw), budget in sorted(rows)
    ]


def top1_table(found: Figures, network: str, space: str, setting: str, images: int) -> str:
    """Methods × budgets: mean top-1 in percent over draws, with the standard deviation where there are several."""
    cells = [answers for (n, s, c, k, _), answers in found.items() if (n, s, c, k) == (network, space, setting, images)]
    budgets = sorted({b for answers in cells for _, b in answers})
    lines = []
    for method in METHODS:
        values = [[100 * answers[method, b][TOP1] for answers in cells if (method, b) in answers] for b in budgets]
        if any(values):
            lines.append([method, *(_figure(part) for part in values)])
    draws = "one draw" if len(cells) == 1 else f"{len(cells)} draws"
    return f"### {network}, {space}, {images} images, {draws}\n\n" + markdown_table(
        ["method", *(f"{b:g} bits" for b in budgets)], lines
    )


def _figure(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values):.2f}" if len(values) > 1 else "")


def costs(rows: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Forward images of each method as a share of pairwise's, and its backward images."""
    shares: dict[str, list[float]] = defaultdict(list)
    backward: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for method, spent in row["forward_images"].items():
            shares[method].append(spent / row["forward_images"]["pairwise"])
            backward[method].append(row["backward_images"].get(method, 0) / row["images"])
    return [
        [method, f"{100 * min(part):.1f} to {100 * max(part):.1f} %", f"{np.mean(backward[method]):.0f}"]
        for method, part in shares.items()
    ]


INTRODUCTION = f"""# The study's figures

Written by `python -m tests.benchmarks.study_table` from study.jsonl, which `python -m tests.benchmarks.study measure` appends to
(`make study` does both). What they say: docs/where-interactions-help.md.

Top-1 on the 10,000 test images, which nothing chose on. Comparisons: mean difference of top-1 in points over all cells and the
budgets of 2.25 to 3.5 bits, paired; 95 % bootstrap interval over networks and draws; cells lost by more than {MARGIN} points.
"""


def page(rows: list[dict[str, Any]]) -> str:
    """STUDY.md."""
    found = figures(rows)
    parts = [INTRODUCTION]
    count: dict[tuple[str, int], int] = defaultdict(int)
    for _, space, _, images, _ in found:
        count[space, images] += 1
    devices = sorted({device for row in rows for device in row["devices"]})
    parts.append(f"{len(found)} cells, on {', '.join(devices)}: " + "; ".join(
        f"{n} of {space} with {images} images" for (space, images), n in sorted(count.items())) + ".\n")  # fmt: skip
    headers = ["against", "cells", "mean", "95 % interval", f"lost by > {MARGIN}", "worst"]
    fresh = {cell: answers for cell, answers in found.items() if not chose_the_defaults(cell)}
    if compared := comparison(fresh, "plain", "chosen"):
        parts.append("## `chosen` against the others, plain, on cells that its rule was not picked on\n")
        parts.append(markdown_table(headers, compared) + "\n")
    for setting in SETTINGS:
        for method in (m for m in METHODS if m.startswith("chosen")):
            if not (compared := comparison(found, setting, method)):
                continue
            parts.append(f"## `{method}` against the others, {setting}\n")
            parts.append(markdown_table(headers, compared) + "\n")
            lost = losing(found, setting, method)
            if lost:
                to = "a single method" if method == "chosen" else "layerwise or pairwise"
                parts.append(f"Lost by more than {MARGIN} points to {to}:\n\n" + markdown_table(
                    ["network", "space", "images", "draw", "bits", "to", "points"], lost) + "\n")  # fmt: skip
    parts.append("## What a method costs\n\n" + markdown_table(
        ["method", "forward images, of pairwise's", "backward passes an image"], costs(rows)) + "\n")  # fmt: skip
    for setting in SETTINGS:
        parts.append(f"## Top-1 in percent, {setting}\n")
        for network, space, images in sorted({(n, s, k) for n, s, c, k, _ in found if c == setting}):
            parts.append(top1_table(found, network, space, setting, images) + "\n")
    return "\n".join(parts)


def plot(rows: list[dict[str, Any]]) -> None:
    """docs/study-size.png, study-forwards.png, study-predicted.png."""
    import matplotlib

    matplotlib.use("Agg")
    found = figures(rows)
    _plot_size(found)
    _plot_forwards(rows)
    _plot_predicted(found)


def _plot_size(found: Figures) -> None:
    from matplotlib import pyplot

    networks = sorted({cell[0] for cell in found})
    figure, axes = pyplot.subplots(2, len(networks), figsize=(4.6 * len(networks), 7), squeeze=False)
    for (row, setting), (column, network) in product(enumerate(SETTINGS), enumerate(networks)):
        axis = axes[row][column]
        cells = [answers for (n, s, c, _, _), answers in found.items() if (n, s, c) == (network, "w248", setting)]
        for method in SHOWN:
            budgets = sorted({b for answers in cells for m, b in answers if m == method})
            values = [[100 * answers[method, b][TOP1] for answers in cells if (method, b) in answers] for b in budgets]
            width = 2 if method == "chosen" else 1
            means, spreads = [np.mean(v) for v in values], [np.std(v) for v in values]
            axis.errorbar(budgets, means, spreads, label=method, capsize=2, lw=width, marker="o", markersize=3)
        top = max((100 * rest[TOP1] for answers in cells for rest in answers.values()), default=100.0)
        axis.set(title=f"{network.split('_')[0]}, {setting}", xlabel="average bits", ylabel="top-1 %")
        axis.set_ylim(top - (40 if setting == "plain" else 6), top + 0.5)
    axes[0][0].legend(fontsize=8)
    _save(figure, "study-size")


def _plot_forwards(rows: list[dict[str, Any]]) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, setting in zip(axes, SETTINGS, strict=True):
        for method in METHODS:
            mine = [row for row in rows if row["setting"] == setting and method in row["forward_images"]]
            spent = [(r["forward_images"][method] + 2 * r["backward_images"].get(method, 0)) / r["images"] for r in mine]
            top1 = [100 * answer[2 + TOP1] for r in mine for answer in r["rows"] if answer[0] == method and answer[1] in LOW]
            if mine:
                x, y = float(np.mean(spent)), float(np.mean(top1))
                axis.plot(x, y, "o")
                axis.annotate(method, (x, y), fontsize=8, xytext=(4, 4), textcoords="offset points")
        axis.set(xscale="log", xlabel="forwards for each image (a backward counts as two)", title=setting)
        axis.set_ylabel("mean top-1 %, 2.25 to 3.5 bits")
    _save(figure, "study-forwards")


def _plot_predicted(found: Figures) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, setting in zip(axes, SETTINGS, strict=True):
        for method in ("layerwise", "pairwise", "gauss_newton"):
            answers = [rest for cell, a in found.items() if cell[2] == setting for (m, _), rest in a.items() if m == method]
            points = [(rest[PREDICTED], rest[MEASURED]) for rest in answers if rest[PREDICTED] and rest[MEASURED]]
            if points:
                axis.plot(*zip(*points, strict=True), ".", label=method, markersize=4)
        ends = axis.get_xlim()
        axis.plot(ends, ends, color="black", lw=0.8)
        axis.set(xscale="log", yscale="log", xlabel="predicted loss", ylabel="measured loss, sensitivity set", title=setting)
    axes[0].legend(fontsize=8)
    _save(figure, "study-predicted")


def _save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(PLOTS / f"{name}.png", dpi=100)


def main() -> None:
    """Writes the page and its plots."""
    found = rows()
    TABLE.write_text(page(found))
    plot(found)


if __name__ == "__main__":
    main()
