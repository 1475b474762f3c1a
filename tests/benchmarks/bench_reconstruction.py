"""Measures what reconstruction gains: the same runs with `effort: fast` and with more. Writes RECONSTRUCTION.md.

    python -m tests.benchmarks.bench_reconstruction measure [--networks NAME ...] [--efforts best] [--draws 1] [--photos FOLDER]
    python -m tests.benchmarks.bench_reconstruction table

A cell is one network, one draw of images and one effort. It is a line of reconstruction.jsonl, and is not run again. A run
with more effort continues in the folder of the fast run, so both have the same measurements. Accuracies are of images that no
choice has read. Differences are paired.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from clado.evaluation import compared
from clado.quantization.reconstruction import EFFORTS
from clado.records.interval import Interval
from clado.records.results import CHOSEN, FLOAT
from clado.records.run_record import RunRecord
from clado.records.text import markdown_table
from clado.run.opened_run import open_run
from clado.settings.loading import load_run_config
from tests.benchmarks.bench_measure import machine
from tests.benchmarks.pages import filled

HERE = Path(__file__).parent
ROOT, DATA, PAGE = HERE.parents[1], HERE / "reconstruction.jsonl", HERE / "RECONSTRUCTION.md"
ZOO = ("resnet20_fashion_mnist", "mobilenetv2_fashion_mnist", "vit_fashion_mnist")
PHOTOS = "efficientnet_lite0"
RECIPE = ROOT / "recipes" / "imagenet" / "efficientnet_lite0.yaml"
SETTINGS = ("data.sensitivity_images=256", "data.calibration_images=1024", "budgets.average_bits=[2.25, 2.5, 3]")
PHOTO_SETTINGS = ("budgets.average_bits=[3, 3.5, 4]",)


def folder_of(network: str, draw: int) -> Path:
    """Where the runs of a network and a draw are kept."""
    return ROOT / ".cache" / "reconstruction" / f"{network}-{draw}"


def run(network: str, draw: int, effort: str, photos: Path | None) -> dict[str, Any]:
    """Runs one cell, and returns its results."""
    folder = folder_of(network, draw)
    if network == PHOTOS:
        if photos is None:
            raise SystemExit(f"{PHOTOS} needs --photos FOLDER")
        settings = [str(RECIPE), f"data.path={photos}", *PHOTO_SETTINGS]
    else:
        settings = [str(ROOT / "demo.yaml"), f"network.name={network}", "estimators=[layerwise, gauss_newton]", *SETTINGS]
    command = [
        sys.executable, "-m", "flows.cli", "run", *settings, f"data.seed={draw}", f"effort={effort}", "cluster.kind=inline",
        f"folder={folder}", f"tracking.uri=sqlite:///{folder.parent / 'mlflow.db'}",
    ]  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return cell_of(folder, network, draw, effort)


def cell_of(folder: Path, network: str, draw: int, effort: str) -> dict[str, Any]:
    """The figures of a finished run for the page, with paired differences from the fast run's choices."""
    record, opened = RunRecord.load(folder / "record.json"), open_run(load_run_config(folder))
    fast = {row["budget"]: row for cell in cells() if cell["key"] == [network, draw, "fast"] for row in cell["rows"]}
    rows = []
    for budget in record.budgets:
        chosen, against = record.find(budget, CHOSEN), record.comparison(budget, CHOSEN, FLOAT)
        assert chosen is not None
        assert chosen.validation is not None
        row: dict[str, Any] = {
            "budget": budget,
            "method": chosen.winner,
            "corrected": chosen.assignment.corrected,
            "assignment": opened.space.to_json(chosen.assignment),
            "bytes": chosen.size_bytes,
            "decision": chosen.loss_deployed,
            "top1": chosen.validation.top1,
            "kl": chosen.validation.kl,
            "below": None if against is None else listed(against.top1),
        }
        if effort != "fast":
            before = opened.space.from_json(fast[budget]["assignment"])
            counts = opened.evaluation.validation_counts(
                [chosen.assignment, before], lambda items: map(opened.evaluation.count_batch, items)
            )
            difference = compared(budget, effort, "fast", counts[chosen.assignment], counts[before])
            row |= {"gain": None, "gain_kl": None}
            if difference is not None and chosen.assignment != before:
                row |= {"gain": listed(difference.top1), "gain_kl": listed(difference.kl)}
        rows.append(row)
    return {
        "key": [network, draw, effort],
        "machine": machine(),
        "float": record.float_accuracy.top1,
        "images": {name: part["num_images"] for name, part in record.data.items()},
        "seconds": {name: round(value, 1) for name, value in record.seconds.items()},
        "networks": record.forwards.get("reconstruction", 0) // (EFFORTS[effort].trained_images if effort in EFFORTS else 1),
        "rows": rows,
    }


def listed(interval: Interval | None) -> list[float] | None:
    """An interval as three numbers."""
    return None if interval is None else [interval.mean, interval.low, interval.high]


def cells() -> list[dict[str, Any]]:
    """All cells that were measured."""
    return [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()] if DATA.exists() else []


def points(interval: list[float] | None) -> str:
    """A difference in points of top-1, with its interval."""
    return "same" if interval is None else f"{100 * interval[0]:+.2f} ({100 * interval[1]:+.2f} to {100 * interval[2]:+.2f})"


def network_table(network: str, draw: int, of_network: list[dict[str, Any]]) -> str:
    """Budgets × efforts of one network and draw."""
    by_effort = {cell["key"][2]: cell for cell in of_network}
    fast = {row["budget"]: row for row in by_effort["fast"]["rows"]}
    floats, table = by_effort["fast"]["float"], []
    for effort, cell in by_effort.items():
        for row in cell["rows"]:
            before = fast[row["budget"]]
            gap, gap_now = floats - before["top1"], floats - row["top1"]
            closed = "" if effort == "fast" else f"{100 * (1 - gap_now / gap):.0f} %" if gap > 0 else "–"
            change = 1 - row["kl"] / before["kl"]
            cells_of_row = [row["budget"], effort, f"{row['bytes']:,}", f"{row['method']}, {row['corrected']}"]
            cells_of_row += [f"{100 * row['top1']:.2f}", f"{100 * gap_now:+.2f}", closed, f"{row['kl']:.4f}"]
            table.append(cells_of_row + (["", ""] if effort == "fast" else [f"{100 * change:.0f} %", points(row.get("gain"))]))
    header = [
        "budget", "effort", "bytes", "chosen", "top-1", "below float", "of the gap closed", "KL from float", "of it removed",
        "top-1 against fast (95 %)",
    ]  # fmt: skip
    seconds = ", ".join(
        f"{effort} {cell['seconds'].get('reconstructing', 0):.0f} s for {cell['networks']} networks, one after another"
        for effort, cell in by_effort.items()
        if effort != "fast"
    )
    images = ", ".join(f"{count:,} {name.removesuffix('_set')}" for name, count in by_effort["fast"]["images"].items())
    return (
        f"## {network}, draw {draw}\n\nFloat {100 * floats:.2f}. Images: {images}. {by_effort['fast']['machine']}. "
        f"Reconstructing took {seconds}; the machine was shared with other work.\n\n{markdown_table(header, table)}\n"
    )


def write_page() -> None:
    """Writes the page from all measured cells."""
    efforts = "; ".join(
        f"`{name}` {effort.proposals} answers a budget, {effort.block_steps} steps a block, {effort.network_steps} of the whole"
        for name, effort in EFFORTS.items()
    )
    introduction = (
        "Written by `python -m tests.benchmarks.bench_reconstruction table` from reconstruction.jsonl. Chosen networks of runs "
        "with `effort: fast` and with more, at the same budgets. Top-1 in percent of validation images that no choice has seen, "
        "differences paired image by image. One draw of images says nothing of other draws. Efforts: "
    )
    parts = [f"# Reconstruction\n\n{introduction}{efforts}.\n"]
    by_network: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for cell in cells():
        by_network.setdefault((cell["key"][0], cell["key"][1]), []).append(cell)
    parts += [network_table(network, draw, of_network) for (network, draw), of_network in by_network.items()]
    PAGE.write_text(filled("\n".join(parts)), encoding="utf-8")


def main() -> None:
    """Measures the missing cells, or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("measure", "table"))
    parser.add_argument("--networks", nargs="*", default=list(ZOO), choices=[*ZOO, PHOTOS])
    parser.add_argument("--efforts", nargs="*", default=["best"], choices=list(EFFORTS))
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--photos", type=Path)
    arguments = parser.parse_args()
    for draw in range(arguments.draws if arguments.command == "measure" else 0):
        for network in arguments.networks:
            for effort in ("fast", *arguments.efforts):
                if all(cell["key"] != [network, draw, effort] for cell in cells()):
                    cell = run(network, draw, effort, arguments.photos)
                    with DATA.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(cell) + "\n")
    write_page()


if __name__ == "__main__":
    main()
