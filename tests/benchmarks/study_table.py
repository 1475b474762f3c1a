"""STUDY.md and its plots from study.jsonl: `python -m tests.benchmarks.study_table`. Needs no torch."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from clado.records.text import markdown_table
from tests.benchmarks.pages import filled

HERE = Path(__file__).parent
DATA, TABLE, PLOTS = HERE / "study.jsonl", HERE / "STUDY.md", HERE.parents[1] / "docs"
CONFIRMATION = HERE / "study_confirmation.jsonl"
# In the first cells only. `_plainest`: as `chosen` and `chosen_full` were before the Brier score, the least sum of singles within
# a standard error of the least loss; `chosen_full_least`: everything but the tempered estimators, and the least loss.
EARLIER = {"chosen_plainest", "chosen_full_plainest", "chosen_full_least"}
METHODS = (
    *("uniform", "layerwise", "blockwise", "pairwise", "pairwise_raw", "gauss_newton"),
    *("tempered2", "tempered4", "tempered8", "hawq", "mpqco", "fisher"),
    *("chosen", "chosen_plainest", "chosen_least", "chosen_full", "chosen_full_plainest", "chosen_full_least"),
)
SETTINGS = ("plain", "corrected")
SINGLE = tuple(method for method in METHODS if not method.startswith("chosen"))
LOW = (2.25, 2.5, 3, 3.5)  # the budgets of the goals
MARGIN = 0.5  # points of top-1
NUM_CALIBRATION = 512  # images
KINDS = ("singles", "pairs", "gram", "gradients", "trace")  # of tiles
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


def confirmed(cells: Figures, path: Path = CONFIRMATION) -> tuple[Figures, int]:
    """The same with top-1 on the images of study_confirm.py, where it is known, and how many images these are."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    top1: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for line in lines:
        top1[line["network"], line["space"], line["setting"]] |= line["top1"]
    answers = {
        cell: {name: [rest[BITS], top1[cell[:3]][rest[BITS]], *rest[LOSS:]] for name, rest in a.items() if rest[BITS] in known}
        for cell, a in cells.items()
        if (known := top1.get(cell[:3]))
    }
    return answers, max((line["images"] for line in lines), default=0)


def differences(cells: Figures, setting: str, one: str, other: str, budgets: Iterable[float]) -> dict[tuple[Cell, float], float]:
    """Points of top-1 by which a method is above another, in every cell and budget where both are."""
    return {
        (cell, b): 100 * (answers[one, b][TOP1] - answers[other, b][TOP1])
        for cell, answers in cells.items()
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


def spread(values: Mapping[tuple[Cell, float], float]) -> str:
    """The mean of differences and its interval, as text."""
    if not values:
        return "–"
    mean, low, high = interval(values)
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def comparison(cells: Figures, setting: str, unseen: Figures | None = None) -> list[list[str]]:
    """`chosen` against each other method: mean difference with its interval, answers lost by more than the margin, the worst.
    With `unseen` also the mean difference on the images that no rule was picked on."""
    lines = []
    for other in (method for method in METHODS if method not in ("chosen", *EARLIER)):
        if values := differences(cells, setting, "chosen", other, LOW):
            lost = sum(value < -MARGIN for value in values.values()) / len(values)
            line = [other, str(len(values)), spread(values), f"{100 * lost:.1f} %", f"{min(values.values()):+.2f}"]
            lines.append(line + ([] if unseen is None else [spread(differences(unseen, setting, "chosen", other, LOW))]))
    return lines


def by_network(cells: Figures, spent: Mapping[str, Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): mean points above layerwise of each method on each network, ResNet-20 with five bit-widths on its own; and
    what the method costs (`costs`)."""
    cases = sorted({(SETTINGS.index(setting), network, space == "w23468") for network, space, setting, _, _ in cells})
    names = [f"{network.split('_')[0]}{', 5 widths' if five else ''}, {SETTINGS[number]}" for number, network, five in cases]
    lines = []
    for method in (m for m in METHODS if m != "layerwise"):
        means = []
        for number, network, five in cases:
            mine = {cell: a for cell, a in cells.items() if cell[0] == network and (cell[1] == "w23468") == five}
            values = differences(mine, SETTINGS[number], method, "layerwise", LOW)
            means.append(f"{np.mean(list(values.values())):+.2f}" if values else "–")
        lines.append([method, *means, *spent.get(method, ("–", "–"))])
    return ["method", *names, "forward images, of pairwise's", "backward passes an image"], lines


def ways(cells: Figures) -> tuple[list[str], list[list[str]]]:
    """(header, rows): points of top-1 of each way of choosing above layerwise, pairwise and `chosen`."""
    others = ("layerwise", "pairwise", "chosen")
    lines = [
        [method, *(spread(differences(cells, s, method, other, LOW)) for s in SETTINGS for other in others if other != method)]
        for method in METHODS
        if method.startswith("chosen_")
    ]
    return ["method", *(f"above {other}, {setting}" for setting in SETTINGS for other in others)], lines


def top1(figures_of: Figures, shown: Sequence[str], budgets: Iterable[float] = (2.25, 3, 4)) -> list[list[str]]:
    """Mean top-1 in percent over the draws of 256 images, bits (2, 4, 8), with the standard deviation of the draws."""
    lines = []
    for setting, network, budget in product(SETTINGS, sorted({cell[0] for cell in figures_of}), budgets):
        cells = [a for (n, s, c, k, _), a in figures_of.items() if (n, s, c, k) == (network, "w248", setting, 256)]
        parts = [[100 * a[method, budget][TOP1] for a in cells if (method, budget) in a] for method in shown]
        if any(parts):
            cell = [f"{np.mean(part):.2f} ± {_deviation(part):.2f}" if part else "–" for part in parts]
            lines.append([f"{network.split('_')[0]}, {setting}", f"{budget:g}", *cell])
    return lines


def _deviation(values: Sequence[float]) -> float:
    """Sample standard deviation of the draws; 0 for a single draw."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def costs(rows: Iterable[Mapping[str, Any]], settings: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Method -> its forward images as a share of pairwise's, and its backward passes an image."""
    shares: dict[str, list[float]] = defaultdict(list)
    backward: dict[str, list[float]] = defaultdict(list)
    for row in (row for row in rows if row["setting"] in settings):
        for method, spent in row["forward_images"].items():
            shares[method].append(spent / row["forward_images"]["pairwise"])
            backward[method].append(row["backward_images"].get(method, 0) / row["images"])
    return {
        method: (f"{100 * min(part):.1f} to {100 * max(part):.1f} %", f"{np.mean(backward[method]):.0f}")
        for method, part in shares.items()
    }


def with_statistics(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A corrected cell with the calibration images counted that batch-norm statistics are measured on again for each assignment
    that `chosen` measures; other cells as they are."""
    spent = row["forward_images"]
    if row["setting"] == "plain" or row["network"].startswith("vit") or not {"chosen", "gauss_newton"} <= spent.keys():
        return row
    measured = (spent["chosen"] - spent["gauss_newton"]) // row["images"]  # assignments
    return {**row, "forward_images": {**spent, "chosen": spent["chosen"] + measured * NUM_CALIBRATION}}


def seconds(lines: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Mean seconds of measuring each kind of tile on 64 images with bits (2, 4, 8)."""
    times: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if (line["images"], line["space"]) == (64, "w248"):
            for kind, spent in line["measuring"].items():
                times[line["device"], line["network"].split("_")[0]][kind].append(spent)
    return [
        [device, network, *(f"{np.mean(of[kind]):.1f}" if kind in of else "–" for kind in KINDS)]
        for (device, network), of in sorted(times.items())
    ]


INTRODUCTION = """# The study's figures

Written by `python -m tests.benchmarks.study_table` from study.jsonl, which holds every answer.
`python -m tests.benchmarks.study measure` appends to it, and `make study` does all.
[Where interactions help](../../docs/where-interactions-help.md) says what the figures mean.

Top-1 is of the 10,000 test images, where nothing else is said. No answer was chosen on them, but the rule of `chosen` was
picked by them. "Unseen" are images that no rule was picked on. A difference is a mean in points of top-1 over all cells and
the budgets of 2.25 to 3.5 bits. It is paired, with its 95 % bootstrap interval over networks and draws. After ± is the
standard deviation of draws. w248 are the bits (2, 4, 8), w23468 the bits (2, 3, 4, 6, 8), a8 activations of 8 bits.
"""


def page(lines: list[dict[str, Any]]) -> str:
    """STUDY.md."""
    rows = merged(lines)
    cells_of = figures(rows)
    unseen, num_unseen = confirmed(cells_of)
    count: dict[tuple[str, int], int] = defaultdict(int)
    for _, space, _, images, _ in cells_of:
        count[space, images] += 1
    spaces, sizes = (sorted({key[part] for key in count}) for part in (0, 1))
    cells = [[space, *(str(count.get((space, size), "–")) for size in sizes)] for space in spaces]
    devices = ", ".join(sorted({device for row in rows for device in row["devices"]}))
    spent, (again, _) = costs(rows, SETTINGS), costs(map(with_statistics, rows), ["corrected"])["chosen"]
    headers = ["against", "answers", "points above it", f"lost by > {MARGIN}", "worst"]
    shown = ("uniform", "layerwise", "pairwise", "gauss_newton", "chosen")
    parts = [
        INTRODUCTION,
        f"{len(cells_of)} cells, on {devices}.\n",
        markdown_table(["cells", *(f"{size} images" for size in sizes)], cells) + "\n",
        "## `chosen` against the others, plain\n",
        markdown_table([*headers, f"{num_unseen:,} unseen images"], comparison(cells_of, "plain", unseen)),
        "\n## `chosen` against the others, corrected\n",
        markdown_table(headers, comparison(cells_of, "corrected")),
        "\n## Other ways of choosing\n",
        markdown_table(*ways(cells_of)),
        "\n## Points above layerwise by network, and what a method costs\n",
        markdown_table(*by_network(cells_of, spent)),
        f"\nLayerwise takes {spent['layerwise'][0]} of pairwise's forward images. In the corrected cells `chosen` takes {again}.",
        f"There the {NUM_CALIBRATION} calibration images count on which it measures batch-norm statistics for every assignment.",
        "Pairs are measured without that.\n\nSeconds of measuring 64 images (on a CPU: one thread):\n",
        markdown_table(["device", "network", *KINDS], seconds(lines)),
        "\n## Top-1 in percent, 256 images, bits (2, 4, 8)\n",
        markdown_table(["network", "bits", *shown], top1(cells_of, shown)),
    ]
    return filled("\n".join(parts) + "\n")


def plot(rows: list[dict[str, Any]]) -> None:
    """docs/study-size.png, study-forwards.png, study-predicted.png."""
    import matplotlib

    matplotlib.use("Agg")
    cells = figures(rows)
    _plot_size(cells)
    _plot_forwards(rows)
    _plot_predicted(cells)


def _plot_size(figures_of: Figures) -> None:
    """Means and deviations over the draws of one size: 256 images, or 64 for what is measured on no more in most cells."""
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, NullLocator

    networks, methods = sorted({cell[0] for cell in figures_of}), (*SINGLE, "chosen")
    budgets = sorted({b for answers in figures_of.values() for _, b in answers})
    figure, axes = pyplot.subplots(2, len(networks), figsize=(5.4 * len(networks), 10), squeeze=False)
    for (row, setting), (column, network) in product(enumerate(SETTINGS), enumerate(networks)):
        axis, known = axes[row][column], []
        cells = [(k, a) for (n, s, c, k, _), a in figures_of.items() if (n, s, c) == (network, "w248", setting) and k < 1024]
        for number, method in enumerate(methods):
            size = 64 if method == "hawq" else 256
            values = [[100 * a[method, b][TOP1] for k, a in cells if k == size and (method, b) in a] for b in budgets]
            places = [place + 0.065 * (number - (len(methods) - 1) / 2) for place in range(len(budgets))]
            color, marker = ("black", "D") if method == "chosen" else (f"C{number % 10}", "os^"[number // 10])
            label = method + (" (64 images)" if size == 64 else "")
            means, deviations = [float(np.mean(v)) for v in values], [_deviation(v) for v in values]
            axis.errorbar(places, means, deviations, ls="none", capsize=2, color=color, marker=marker, markersize=4, label=label)
            known += means
        # even steps of the logarithm of what is wrong: half as many wrong images are as far apart everywhere
        axis.set_yscale("function", functions=(lambda y: -np.log(np.maximum(101 - y, 0.1)), lambda y: 101 - np.exp(-y)))
        low, high = max(30.0, min(known) - 0.3), max(known) + 0.3
        ticks = [y for y in (30, 40, 50, 60, 70, 80, 85, 88, *range(90, 96)) if low <= y <= high]
        axis.yaxis.set_major_locator(FixedLocator(ticks))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_ylim(low, high)
        axis.grid(axis="y", lw=0.4)
        axis.set_xticks(range(len(budgets)), [f"{b:g}" for b in budgets])
        for border in range(1, len(budgets)):
            axis.axvline(border - 0.5, color="lightgrey", lw=0.8)
        axis.set(title=f"{network.split('_')[0]}, {setting}, 256 images", xlabel="average bits", ylabel="top-1 %")
    axes[0][-1].legend(fontsize=8, loc="lower right")
    _save(figure, "study-size")


def _plot_forwards(rows: list[dict[str, Any]]) -> None:
    """Points above layerwise in the same cells, so that methods of more and of fewer cells can be compared."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5))
    markers = "osD^v<>PX*hdp"
    for axis, setting in zip(axes, SETTINGS, strict=True):
        for number, method in enumerate((*SINGLE, "chosen_least", "chosen")):
            mine = [row for row in rows if row["setting"] == setting and method in row["forward_images"]]
            gains = differences(figures(mine), setting, method, "layerwise", LOW)
            spent = [(r["forward_images"][method] + 2 * r["backward_images"].get(method, 0)) / r["images"] for r in mine]
            if mine:
                x, y = float(np.mean(spent)), float(np.mean(list(gains.values())))
                axis.plot(
                    x, y, markers[number % len(markers)], color="black" if method == "chosen" else f"C{number % 10}", label=method
                )
        axis.set(xscale="log", xlabel="forwards for each image (a backward counts as two)", title=setting)
        axis.set_ylabel("points of top-1 above layerwise, 2.25 to 3.5 bits")
        axis.axhline(0, color="grey", lw=0.8)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, "study-forwards")


def _plot_predicted(cells: Figures) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, setting in zip(axes, SETTINGS, strict=True):
        for method in ("layerwise", "pairwise", "gauss_newton"):
            answers = [rest for cell, a in cells.items() if cell[2] == setting for (m, _), rest in a.items() if m == method]
            known = [(rest[PREDICTED], rest[MEASURED]) for rest in answers if rest[PREDICTED] is not None and rest[MEASURED]]
            points = [(predicted, measured) for predicted, measured in known if predicted > 0]
            if points:
                below = len(known) - len(points)
                label = method + (f" ({below} predicted at or below 0, not shown)" if below else "")
                axis.plot(*zip(*points, strict=True), ".", label=label, markersize=4)
        ends = axis.get_xlim()
        axis.plot(ends, ends, color="black", lw=0.8)
        axis.set(xscale="log", yscale="log", xlabel="predicted loss", ylabel="measured loss, sensitivity set", title=setting)
        axis.legend(fontsize=8)
    _save(figure, "study-predicted")


def _save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(PLOTS / f"{name}.png", dpi=100)


def main() -> None:
    """Writes the page and its plots."""
    data = lines()
    TABLE.write_text(page(data))
    plot(merged(data))


if __name__ == "__main__":
    main()
