"""What corrections are worth, by network, budget, estimator, and whether layers were measured plain or corrected.

    python -m tests.benchmarks.bench_corrections measure [--network NAME] [--draws 3] [--jobs 2]   appends to corrections.jsonl
    python -m tests.benchmarks.bench_corrections again                                       appends to corrections_again.jsonl
    python -m tests.benchmarks.bench_corrections table                                       writes CORRECTIONS.md and its plot

A cell is one line of corrections.jsonl; cells that are there are not measured again. Sensitivity draws are disjoint parts of the
zoo's 1,024 sensitivity images, calibration images are its 1,024 calibration images: no network was trained on either. Top-1 and
cross entropy are of the 10,000 test images, which nothing chooses on.
"""

import argparse
import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clado.choosing import solvers
from clado.choosing.proposals import budgets_of, propose
from clado.data.images import DataSlices, ImageSlice
from clado.data.sources import load_data, load_network
from clado.evaluation import count
from clado.interaction import estimators
from clado.interaction.estimators import Measured
from clado.interaction.matrix import InteractionMatrix
from clado.measuring.measurements import measure_tile
from clado.measuring.plan import Plan, sample_blocks
from clado.measuring.workbench import Workbench, rows_per_tile
from clado.network.network import Network
from clado.quantization.preparation import Prepared, Recipe, calibration_batches, equalized, layer_inputs, observed, prepare_layer
from clado.records.text import markdown_table
from clado.settings.schema import DataSettings, NetworkSettings
from clado.space import Assignment
from clado.storage.prepared_layers import PreparedLayers
from tests.benchmarks.pages import filled

HERE = Path(__file__).parent
DATA, TABLE, PLOT = HERE / "corrections.jsonl", HERE / "CORRECTIONS.md", HERE.parents[1] / "docs" / "corrections.png"
AGAIN = HERE / "corrections_again.jsonl"
CHANGED = ("gptq", "output_statistics", "batchnorm_reestimation", "all")  # what `again` measures, since they are prepared anew
NETWORKS = ("resnet20_fashion_mnist", "mobilenetv2_fashion_mnist", "vit_fashion_mnist")
BUDGETS = (2.25, 2.5, 3, 3.5, 4, 5)
METHODS = ("layerwise", "pairwise", "gauss_newton")
ALL = ("equalization", "gptq", "output_statistics", "batchnorm_reestimation")
SHIPPED: dict[str, tuple[str, ...]] = {
    "none": (),
    "equalization": ("equalization",),
    "gptq": ("gptq",),
    "adaround": ("adaround",),
    "output_statistics": ("output_statistics",),
    "batchnorm_reestimation": ("batchnorm_reestimation",),
    "all": ALL,
}
BITS = (2, 4, 8)
NUM_SENSITIVITY, NUM_CALIBRATION, NUM_BLOCKS = 256, 1024, 16
ADAROUND_STEPS = 500
NOTICEABLE = 0.2  # points of top-1: about one standard error of a difference
FOLDER = Path("runs/corrections")  # prepared layers, kept between runs


def prepared(network: Network, name: str, variant: str, slices: DataSlices) -> Prepared:
    """Every layer at every candidate under one choice of corrections; made once, kept on disk."""
    recipe = Recipe(corrections=SHIPPED[variant], adaround_steps=ADAROUND_STEPS)
    space = network.search_space(BITS)
    images = calibration_batches(slices.calibration.load(0, NUM_CALIBRATION)[0].to(network.device))
    prepared_layers = PreparedLayers(FOLDER / name / variant)
    if not prepared_layers.network_file.exists():
        prepared_layers.write_network(*equalized(network, recipe, [observed(network, recipe, images)]))
    tensors, _ = prepared_layers.read_network(network.device)
    network = network.updated(tensors) if tensors else network
    missing = prepared_layers.missing(space.num_layers)
    inputs = layer_inputs(network, space, recipe, images) if missing else {}
    for layer in missing:
        prepared_layers.write_layer(layer, *prepare_layer(network, space, recipe, layer, inputs.get(layer)))
    layers = [rounded for layer in range(space.num_layers) for rounded in prepared_layers.read_layer(layer, network.device)[0]]
    return Prepared(network, space, recipe, tuple(layers), images)


def matrices(ready: Prepared, sensitivity: ImageSlice, first: int) -> dict[str, InteractionMatrix]:
    """Every estimator's matrix on NUM_SENSITIVITY images from `first` on; their singles are measured once."""
    blocks = tuple((first + a, first + b) for a, b in sample_blocks(NUM_SENSITIVITY, NUM_BLOCKS))
    bench = Workbench(ready, "kl_to_float", blocks, sensitivity.load)
    plan = Plan(
        ready.space, blocks, estimators.kinds_of(METHODS), rows_per_tile(ready.network, ready.space, bench.batching, None)
    )
    tiles: dict[str, list[Any]] = {kind: [] for kind in plan.kinds}
    for tile in plan.tiles:
        tiles[tile.kind].append(measure_tile(bench, tile))
    counts = np.array([stop - start for start, stop in blocks])
    sums = {kind: np.concatenate(parts).reshape(len(blocks), -1, *parts[0].shape[1:]) for kind, parts in tiles.items()}
    measured = Measured(ready.space, "kl_to_float", counts, sums)
    return {name: estimators.estimate(name, measured) for name in METHODS}


def cells(name: str, draw: int, singly: bool) -> Iterator[dict[str, Any]]:
    """Yields the lines of one network and draw that are not in the data yet."""
    torch.set_num_threads(1)
    loaded = load_network(NetworkSettings(source="zoo", name=name))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = Network(loaded.model.to(device), loaded.example_input.to(device))
    slices = load_data(DataSettings(sensitivity_images=1024, calibration_images=NUM_CALIBRATION), loaded.image_shape)
    variants = [v for v in SHIPPED if singly or v in ("none", "all")]
    if not network.engine.norms:
        variants = [v for v in variants if v != "batchnorm_reestimation"]
    known = [row for row in rows() if (row["network"], row["draw"]) == (name, draw)]
    cases = list(product(("plain", "corrected"), METHODS, BUDGETS))
    done = {(row["measured"], row["method"], row["budget"], row["deployed"]) for row in known}
    variants = [variant for variant in variants if not done >= {(*question, variant) for question in cases}]
    if not variants:
        return
    # what was chosen before stands: a machine with another torch may break a near tie the other way
    answers = {(row["measured"], row["method"], row["budget"]): Assignment(tuple(row["bits"])) for row in known}
    unanswered = {
        m: b for m, b in (("plain", "none"), ("corrected", "all")) if not answers.keys() >= {q for q in cases if q[0] == m}
    }
    ready = {variant: prepared(network, name, variant, slices) for variant in {*variants, *unanswered.values()}}
    for measured, base in unanswered.items():
        by_estimator = matrices(ready[base], slices.sensitivity, draw * NUM_SENSITIVITY)
        proposals = propose(by_estimator, budgets_of(average_bits=BUDGETS), lambda program: solvers.prepare(program, "scip"))
        for proposal in proposals:
            if proposal.method in METHODS:
                answers.setdefault((measured, proposal.method, proposal.budget.bound), proposal.assignment)
    counted = {(tuple(row["bits"]), row["deployed"]): row for row in rows() if row["network"] == name}
    for (measured, method, budget), assignment in answers.items():
        for variant in variants:
            if (measured, method, budget, variant) in done:
                continue
            key = (assignment.bits, variant)
            if key not in counted:
                begin = time.perf_counter()
                shipped = ready[variant].deployed(assignment)
                accuracy = count(*shipped, slices.validation, 0, len(slices.validation)).accuracy()
                counted[key] = {"top1": accuracy.top1, "loss": accuracy.loss, "seconds": round(time.perf_counter() - begin, 2)}
            row = {k: counted[key][k] for k in ("top1", "loss", "seconds")}
            yield {
                "network": name,
                "draw": draw,
                "measured": measured,
                "method": method,
                "budget": budget,
                "deployed": variant,
                "bits": list(assignment.bits),
                "size_bytes": ready[variant].space.size_bytes(assignment),
                **row,
                "torch": torch.__version__,
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            }


def rows() -> list[dict[str, Any]]:
    """The data so far."""
    return read(DATA)


def work(job: tuple[str, int, bool]) -> None:
    """Measures one network and draw; each cell is appended as soon as it is known."""
    for row in cells(*job):
        with DATA.open("a") as file:  # one short line at a time: appended whole
            file.write(json.dumps(row) + "\n")
    print(*job, "done", flush=True)


def measure_again(name: str) -> None:
    """Deploys every second of the stored assignments of draw 0 with today's corrections, and appends both accuracies."""
    torch.set_num_threads(1)
    loaded = load_network(NetworkSettings(source="zoo", name=name))
    network = Network(loaded.model, loaded.example_input)
    slices = load_data(DataSettings(sensitivity_images=1024, calibration_images=NUM_CALIBRATION), loaded.image_shape)
    stored = {(row["deployed"], tuple(row["bits"])): row for row in rows() if (row["network"], row["draw"]) == (name, 0)}
    done = {(row["deployed"], tuple(row["bits"])) for row in read(AGAIN) if row["network"] == name}
    for variant in CHANGED:
        chosen = sorted(key for key in stored if key[0] == variant)[::2]
        ready = prepared(network, name, variant, slices) if set(chosen) - done else None
        for key in chosen:
            if key in done or ready is None:
                continue
            deployed = ready.deployed(Assignment(key[1]))
            accuracy = count(*deployed, slices.validation, 0, len(slices.validation)).accuracy()
            before = {f"{column}_before": stored[key][column] for column in ("top1", "loss")}
            row = {"network": name, "deployed": variant, "bits": list(key[1]), **before}
            with AGAIN.open("a") as file:
                file.write(json.dumps({**row, "top1": accuracy.top1, "loss": accuracy.loss, "torch": torch.__version__}) + "\n")
    print(name, "done", flush=True)


def again_table() -> str:
    """Markdown: today's accuracies minus the stored ones, of the same bits on the same images."""
    lines = []
    for name, variant in product(NETWORKS, CHANGED):
        mine = [row for row in read(AGAIN) if (row["network"], row["deployed"]) == (name, variant)]
        if mine:
            points = [100 * (row["top1"] - row["top1_before"]) for row in mine]
            losses = [row["loss"] - row["loss_before"] for row in mine]
            spread = f"{np.mean(points):+.2f} ({min(points):+.2f} to {max(points):+.2f})"
            lines.append([name, variant, str(len(mine)), spread, f"{np.mean(losses):+.4f}"])
    return markdown_table(["network", "corrections", "assignments", "points of top-1: mean (range)", "mean loss"], lines)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of cells."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def float_figures() -> dict[str, tuple[float, float]]:
    """(top-1, loss) of the float networks on the test images."""
    figures = {}
    for name in NETWORKS:
        loaded = load_network(NetworkSettings(source="zoo", name=name))
        slices = load_data(DataSettings(), loaded.image_shape)
        network = Network(loaded.model, loaded.example_input)
        accuracy = count(network, {}, slices.validation, 0, len(slices.validation)).accuracy()
        figures[name] = (accuracy.top1 or 0.0, accuracy.loss)
    return figures


def table() -> str:
    """Markdown: mean top-1 in percent over draws, with the standard deviation where there are several."""
    data, floats = rows(), float_figures()
    parts = [(__doc__ or "").split("\n\n")[0] + "\n"]
    parts.append("Top-1 in percent on the 10,000 test images, mean ± standard deviation over sensitivity draws of "
                 f"{NUM_SENSITIVITY} images. A single figure is of one draw. {NUM_CALIBRATION} calibration images, no training. "
                 f"Columns are the corrections that are deployed; `all` is {' + '.join(ALL)}. The column \"measured\" says "
                 "whether the matrix describes layers rounded to nearest or corrected ones.\n")  # fmt: skip
    for name in NETWORKS:
        mine = [row for row in data if row["network"] == name]
        if not mine:
            continue
        variants = [v for v in SHIPPED if any(row["deployed"] == v for row in mine)]
        top1, loss = floats[name]
        parts.append(f"## {name}: float {100 * top1:.2f} %, loss {loss:.4f}\n")
        lines = []
        for budget, measured, method in product(BUDGETS, ("plain", "corrected"), METHODS):
            by_variant = {v: [r["top1"] for r in mine
                         if (r["budget"], r["measured"], r["method"], r["deployed"]) == (budget, measured, method, v)]
                     for v in variants}  # fmt: skip
            if any(by_variant.values()):
                lines.append([f"{budget:g} bits", measured, method, *[_figure(values) for values in by_variant.values()]])
        parts.append(markdown_table(["budget", "measured", "method", *variants], lines) + "\n")
        parts.append(_verdicts(mine, top1))
    if AGAIN.exists():
        parts.append(
            "## The same bits, prepared again\n\nCorrections are prepared from moments of one sweep since the cells above were "
            "measured. Every second assignment of draw 0 is deployed again. Today's accuracy minus the stored one, on the same "
            "10,000 images (standard error of one accuracy: 0.23 points).\n"
        )
        parts.append(again_table() + "\n")
    machines = Counter((row.get("device", "cpu"), row["torch"]) for row in data)
    parts.append("Cells by machine: " + "; ".join(f"{n:,} on {d}, torch {t}" for (d, t), n in machines.most_common()) + ".\n")
    return filled("\n".join(parts))


def _figure(values: list[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {100 * float(np.std(values)):.2f}" if len(values) > 1 else ""
    return f"{100 * float(np.mean(values)):.2f}{spread}"


def _verdicts(mine: list[dict[str, Any]], float_top1: float) -> str:
    """What measuring under the corrections that ship changes, and how far the result is below float."""
    by = {(r["draw"], r["budget"], r["method"], r["measured"]): r for r in mine if r["deployed"] == "all"}
    pairs = [
        (by[d, b, m, "corrected"], by[d, b, m, "plain"]) for d, b, m, k in by if k == "plain" and (d, b, m, "corrected") in by
    ]
    at_least = sum(a["top1"] >= b["top1"] for a, b in pairs)
    lower = sum(a["loss"] <= b["loss"] for a, b in pairs)
    gains = [100 * (a["top1"] - b["top1"]) for a, b in pairs] or [0.0]
    noticeable = sum(value < -NOTICEABLE for value in gains)
    drops = {b: [float_top1 - r["top1"] for (d, x, m, k), r in by.items() if x == b and m == "gauss_newton" and k == "corrected"]
             for b in BUDGETS}  # fmt: skip
    text = ", ".join(f"{b:g} bits {100 * float(np.mean(v)):.2f}" for b, v in drops.items() if v)
    return (
        "Here all corrections are deployed. Measuring under them is then at least as good as measuring plain in "
        f"{at_least} of {len(pairs)} cells by top-1, and in {lower} by loss. The mean gain is {np.mean(gains):.2f} points. "
        f"In {noticeable} cells it is worse by more than {NOTICEABLE} points, at most by {-min(gains):.2f}. The other losses are "
        "within the noise of 10,000 test images. What the methods choose differs by little more. "
        f"Points of top-1 below float (gauss_newton, measured corrected, all): {text}.\n"
    )


def plot() -> None:
    """Top-1 against budget: no correction, each, all; gauss_newton measured as deployed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    data, floats = rows(), float_figures()
    names = [name for name in NETWORKS if any(row["network"] == name for row in data)]
    figure, axes = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for variant in SHIPPED:
            measured = "plain" if variant == "none" else "corrected"
            mine = [r for r in data if (r["network"], r["deployed"], r["method"], r["measured"])
                    == (name, variant, "gauss_newton", measured)]  # fmt: skip
            points = [(b, 100 * float(np.mean(v))) for b in BUDGETS if (v := [r["top1"] for r in mine if r["budget"] == b])]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=variant, lw=2 if variant == "all" else 1)
        axis.axhline(100 * floats[name][0], color="black", lw=0.8, ls=":", label="float")
        axis.set(title=name, xlabel="average bits", ylabel="top-1 %", ylim=(max(0.0, 100 * floats[name][0] - 25), None))
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("measure", "again", "table"))
    parser.add_argument("--network", choices=NETWORKS, action="append", help="default: all")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--singly", type=int, default=1, help="draws for which each correction alone is shipped too")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if options.what == "table":
        TABLE.write_text("# What corrections are worth\n\n" + table())
        plot()
        return
    names = options.network or NETWORKS
    if options.what == "again":
        with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
            pool.map(measure_again, names, chunksize=1)
        return
    jobs = [(name, draw, draw < options.singly) for draw in range(options.draws) for name in names]
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
        for _ in pool.imap_unordered(work, jobs):
            pass


if __name__ == "__main__":
    main()
