"""Seconds of each phase of a run, compared with the least time of its forward passes; writes RUN.md. Run: make bench-run.

    make bench-run                        # the demo
    make bench-run PHOTOS=FOLDER          # EfficientNet-Lite0 on a folder of ImageNet photographs, too
    make bench-run PHOTOS=FOLDER MCT=1    # and MCT on the same images at one budget

The floor is the number of whole forward passes that the run counts, divided by the machine's best rate. The rate is measured in
the same run: as many processes as workers, one thread each, all at once, at the best batch. Tiles resume runs in the middle of
the network; they count by their multiply-accumulates.

Beside it stands what `clado plan --probe` predicted before the run, and how far the ETA of the progress lines was off after a
tenth of each phase.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from clado.network.network import Network
from clado.records.results import CHOSEN
from clado.records.run_record import RunRecord
from clado.records.text import markdown_table
from clado.run.opened_run import OpenedRun, open_run
from clado.settings.loading import load_config, parse_config
from tests.benchmarks.bench_measure import machine
from tests.benchmarks.pages import filled

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE, FOLDER = HERE / "RUN.md", ROOT / ".cache" / "bench-run"
BATCHES = (4, 8, 16, 32, 64, 128)
RATE_IMAGES, ROUNDS = 128, 3
MCT_BITS = 3.0
BUDGETS = [3, 3.5, 4, 5]
LONG = 5.0
"""Seconds of a phase above which its prediction counts."""
PROGRESS = re.compile(r"^([\w -]+): +([\d.]+) %, (\d+) s, ETA (\d+) s$", re.MULTILINE)
"""A line of progress: title, share, seconds, ETA."""
EFFICIENTNET: dict[str, Any] = {
    "network": {"source": "factory", "name": "clado.data.factories:efficientnet_lite0"},
    "data": {
        "source": "folder", "mean": [127 / 255] * 3, "std": [128 / 255] * 3, "resize": 256, "interpolation": "bicubic",
        "calibration_images": 256, "sensitivity_images": 128, "validation_images": 616,
    },
    "budgets": {"average_bits": BUDGETS},
}  # fmt: skip


def settings(name: str, photos: Path | None) -> dict[str, Any]:
    """The settings of a run in a folder of its own."""
    if name == "demo":
        demo: dict[str, Any] = yaml.safe_load((ROOT / "demo.yaml").read_text())
        document = {**demo, "budgets": {"average_bits": [2.25, 2.5, 3, 4]}}  # as `make run`
    else:
        document = {**EFFICIENTNET, "data": {**EFFICIENTNET["data"], "path": str(photos)}}
    tracking = {"uri": f"sqlite:///{FOLDER / name}.db"}
    return {**document, "tracking": tracking, "folder": str(FOLDER / name)}


def clado(*arguments: str) -> tuple[float, str, str]:
    """Seconds of a command, what it printed, and its lines of progress."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "flows.cli", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return time.perf_counter() - begin, done.stdout, done.stderr


def predicted(path: Path) -> dict[str, float]:
    """Seconds by phase, and of the whole, as `clado plan --probe` says before the run."""
    _, text, _ = clado("plan", str(path), "--probe")
    line = next(line for line in text.splitlines() if "ETA: about" in line)
    named = {name: float(seconds) for name, seconds in re.findall(r"(preparing|measuring|evaluation|shutdown) (\d+)", line)}
    return {**named, "whole": float(re.findall(r"about (\d+) s", line)[0])}


@dataclass(frozen=True)
class Line:
    """A line of progress."""

    title: str
    share: float
    seconds: float
    eta: float


def reports(lines: str) -> list[list[Line]]:
    """The lines of each report of progress in turn. Several may have one title."""
    found: list[list[Line]] = []
    for title, *numbers in PROGRESS.findall(lines):
        line = Line(title, *map(float, numbers))
        if not found or found[-1][-1].title != title or found[-1][-1].share == 100:
            found.append([])
        found[-1].append(line)
    return found


def seconds_of(title: str, lines: str) -> float:
    """Seconds of all reports of a title."""
    return sum(report[-1].seconds for report in reports(lines) if report[-1].title == title)


def off_after_a_tenth(lines: str) -> dict[str, float]:
    """The worst factor between the end that progress lines expect and the one that came, of those after a tenth of the work."""
    worst: dict[str, float] = {}
    for report in reports(lines):
        took = report[-1].seconds
        for line in report:
            if line.share >= 10 and took > LONG:
                factor = (line.seconds + line.eta) / took
                worst[line.title] = max(worst.get(line.title, 1.0), factor, 1 / factor)
    return worst


@cache
def folded_network(path: str) -> Network:
    """The float network of settings as it is measured, batch norms folded. A process opens it once."""
    return open_run(load_config(Path(path))).float_network.folded()[0]


def rate_of(path: str, batch: int, num_images: int) -> float:
    """Images a second of one process with one thread: the float network as it is measured, batch norms folded."""
    torch.set_num_threads(1)
    network = folded_network(path)
    x = torch.randn(num_images, *network.image_shape)
    network.logits(x[:batch])
    begin = time.perf_counter()
    for part in x.split(batch):
        network.logits(part)
    return num_images / (time.perf_counter() - begin)


def best_rate(path: Path, workers: int) -> tuple[float, int]:
    """(images a second of all workers together, at the best batch; this batch).

    The batches are timed in turns, and the median of each counts.
    """
    rates: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for _ in range(ROUNDS):
            for batch, measured in rates.items():
                parts = [pool.submit(rate_of, str(path), batch, RATE_IMAGES) for _ in range(workers)]
                measured.append(sum(part.result() for part in parts))
    medians = {batch: float(np.median(measured)) for batch, measured in rates.items()}
    best = max(medians, key=lambda batch: medians[batch])
    return medians[best], best


def counted(run: OpenedRun, record: RunRecord) -> dict[str, float]:
    """Whole forward passes of one image by phase."""
    plan, network = run.plan, run.float_network
    tiles = sum(plan.macs(tile, run.workload) for tile in plan.tiles) / network.macs
    total = record.forwards
    evaluation, searching = ("proposals", "batchnorm_reestimation", "validation"), ("local_search", "other_corrections")
    sweeps, reference = 1 + run.preparation.observes, run.preparation.images_per_reestimation
    return {
        "preparing": float(sweeps * len(run.slices.calibration) + reference),
        "measuring": tiles,
        "evaluation": float(sum(total.get(name, 0) for name in evaluation) - reference),
        "searching": float(sum(total.get(name, 0) for name in searching)),
    }


def measure(name: str, photos: Path | None) -> dict[str, Any]:
    """Runs it, and once more with one more budget."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings(name, photos)))
    subprocess.run(["rm", "-rf", str(FOLDER / name), str(FOLDER / f"{name}.db")], check=True)
    expected = predicted(path)
    seconds, _, lines = clado("run", str(path))
    (FOLDER / f"{name}.log").write_text(lines)
    record, config = RunRecord.load(FOLDER / name / "record.json"), load_config(path)
    run = open_run(config)
    rate, batch = best_rate(path, config.cluster.workers)
    floor = {phase: passes / rate for phase, passes in counted(run, record).items()}
    again: float | None = None
    validating: float | None = None
    if name != "demo":
        budgets = [*BUDGETS, 3.25]
        again, _, more = clado("run", str(path), f"budgets.average_bits={budgets}")
        validating = seconds_of("evaluating", more)
    return {
        "name": name, "seconds": seconds, "phases": record.seconds, "passes": counted(run, record), "rate": rate, "batch": batch,
        "floor": sum(floor.values()), "further": again, "further_validation": validating,
        "preparing_images": len(run.slices.calibration), "predicted": expected, "off": off_after_a_tenth(lines),
        "validating": record.forwards.get("validation", 0) / seconds_of("evaluating", lines),
    }  # fmt: skip


def with_mct(photos: Path, python: str) -> dict[str, Any]:
    """MCT's own network at one budget, on the same images."""
    config = parse_config(settings("efficientnet_lite0", photos))
    run = open_run(config)
    calibration, _ = run.slices.calibration.load(0, len(run.slices.calibration))
    images, labels = run.slices.validation.load(0, len(run.slices.validation))
    assert labels is not None
    file = FOLDER / "images.safetensors"
    save_file({"calibration": calibration, "images": images.contiguous(), "labels": labels}, file)
    limit = math.floor(sum(layer.num_weights for layer in run.space.layers) * MCT_BITS / 8)
    command = [python, "-m", "tests.benchmarks.peer_mct_photos", str(file), str(limit)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    theirs = np.array([int(hit) for hit in result["hits"]])
    record = RunRecord.load(FOLDER / "efficientnet_lite0" / "record.json")
    row = record.find(f"{MCT_BITS:g} bits", CHOSEN)
    assert row is not None
    network, layers = run.preparation.deployed(row.assignment)
    folded, replaced = network.folded_with(layers)
    logits = torch.cat([folded.logits(part, replaced) for part in images.split(folded.images_at_once)])
    difference = (logits.argmax(1) == labels).int().numpy() - theirs
    return {**result, "top1": theirs.mean(), "ours": float((logits.argmax(1) == labels).double().mean()),
            "difference": difference.mean(), "error": difference.std(ddof=1) / len(difference) ** 0.5}  # fmt: skip


def page(runs: list[dict[str, Any]], mct: dict[str, Any] | None) -> str:
    """RUN.md."""
    parts = [
        "# A run, by phase\n\nWritten by `make bench-run`. Seconds. The floor is the counted whole forward passes divided by the "
        f"best rate of this machine, which was measured after the run.\n\nMachine: {machine()}.\n"
    ]
    for run in runs:
        rows = [[phase, f"{seconds:.1f}", *_floor(run, phase)] for phase, seconds in run["phases"].items()]
        rows.append(
            ["**whole command**", f"**{run['seconds']:.0f}**", f"{run['floor']:.0f}", f"**{run['seconds'] / run['floor']:.2f}**"]
        )
        goal = f"1.25 × floor + 60 s is {1.25 * run['floor'] + 60:.0f} s."
        parts.append(
            f"\n## {run['name']}\n\nBest rate: {run['rate']:.1f} images/s of all workers, at batches of {run['batch']}. {goal} "
            f"Passes: {', '.join(f'{name} {count:,.0f}' for name, count in run['passes'].items())}.\n\n"
            + markdown_table(["phase", "seconds", "floor", "ratio"], rows)
        )
        parts.append(f"\n{_predictions(run)}\n")
        preparing = run["phases"].get("preparing", 0.0) / (run["preparing_images"] / run["rate"])
        parts.append(
            f"\nPreparing is {preparing:.1f} float forwards over the calibration images. Validation takes "
            f"{run['validating']:.1f} images/s, {run['validating'] / run['rate']:.2f} of the best rate.\n"
        )
        if run["further"] is not None:
            parts.append(
                f"\nOne more budget from the finished run: {run['further']:.0f} s, {run['further_validation']:.0f} s of them "
                "validation.\n"
            )
    if mct is not None:
        ours = runs[-1]
        parts.append(
            f"\n## MCT 2.6.1, EfficientNet-Lite0, {MCT_BITS:g} bits a weight\n\nOne call: {mct['seconds']:.0f} s, top-1 "
            f"{100 * mct['top1']:.1f} %. clado's chosen network of the same bytes: {100 * mct['ours']:.1f} %, a difference of "
            f"{100 * mct['difference']:+.1f} ± {100 * mct['error']:.1f} points, paired over 616 photographs. The whole run "
            f"of {len(BUDGETS)} budgets takes {ours['seconds'] / (len(BUDGETS) * mct['seconds']):.2f} of one MCT call for each "
            f"budget; one more budget takes {(ours['further'] - ours['further_validation']) / mct['seconds']:.2f} of one call, "
            "validation left out.\n"
        )
    return "\n".join(parts)


def _predictions(run: dict[str, Any]) -> str:
    """What was expected of a run before it, and during it."""
    took = {phase: run["phases"].get(phase, 0.0) for phase in ("preparing", "measuring")}
    took["evaluation"] = run["phases"].get("evaluation", 0.0) + run["phases"].get("searching", 0.0)
    rows = [
        [phase, f"{run['predicted'].get(phase, 0.0):.0f}", f"{seconds:.0f}", f"{run['predicted'].get(phase, 0.0) / seconds:.2f}"]
        for phase, seconds in took.items()
        if seconds > LONG
    ]
    rows.append(
        [
            "whole",
            f"{run['predicted']['whole']:.0f}",
            f"{run['seconds']:.0f}",
            f"{run['predicted']['whole'] / run['seconds']:.2f}",
        ]
    )
    factors = ", ".join(f"{title} {factor:.2f}" for title, factor in run["off"].items())
    return (
        "`clado plan --probe` before the run (goal 0.75 to 1.25):\n\n"
        + markdown_table(["phase", "predicted", "took", "ratio"], rows)
        + f"\n\nProgress after a tenth of a phase: the expected end is wrong by a factor of at most {factors} (goal 1.5)."
    )


def _floor(run: dict[str, Any], phase: str) -> list[str]:
    """The floor of a phase and the ratio to it."""
    passes = run["passes"].get(phase)
    if not passes:
        return ["-", "-"]
    floor = passes / run["rate"]
    return [f"{floor:.1f}", f"{run['phases'][phase] / floor:.2f}"]


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, help="a folder of ImageNet photographs")
    parser.add_argument("--mct", help="the python of an environment with MCT 2.6.1")
    arguments = parser.parse_args()
    runs = [measure("demo", None)]
    if arguments.photos is not None:
        runs.append(measure("efficientnet_lite0", arguments.photos.resolve()))
    mct = with_mct(arguments.photos.resolve(), arguments.mct) if arguments.photos is not None and arguments.mct else None
    PAGE.write_text(filled(page(runs, mct)), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
