"""EfficientNet-Lite0 on ImageNet photographs, cell by cell; writes IMAGENET.md. Run: make study-imagenet PHOTOS=FOLDER.

A cell is one setting and one draw of calibration, sensitivity and validation photographs: one `clado run` of the recipe. What it
reports is kept as a small JSON file in `imagenet/`. Cells that are there are not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from clado.records.results import CHOSEN
from clado.records.run_record import RunRecord
from clado.records.text import markdown_table
from tests.benchmarks.bench_measure import machine
from tests.benchmarks.pages import filled

HERE = Path(__file__).parent
ROOT, CELLS, PAGE = HERE.parents[1], HERE / "imagenet", HERE / "IMAGENET.md"
RECIPE = ROOT / "recipes" / "imagenet" / "efficientnet_lite0.yaml"
SETTINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "default, A8": ("activations.bits=[8]",),
    "plain, A8": ("corrections=[]", "activations.bits=[8]"),
    "plain": ("corrections=[]",),
    "per tensor": ("quantizer.granularity=per_tensor",),
    "bits 3 4 6 8": ("bits=[3, 4, 6, 8]", "budgets.average_bits=[3.5, 4, 5]"),
    "bits 4 6 8": ("bits=[4, 6, 8]", "budgets.average_bits=[4.5, 5]"),
    "64 sensitivity images": ("data.sensitivity_images=64",),
    "256 sensitivity images": ("data.sensitivity_images=256", "data.validation_images=488"),
}
"""What differs from the recipe."""


def file_of(setting: str, draw: int) -> Path:
    """Where a cell is kept."""
    return CELLS / f"{setting.replace(', ', '-').replace(' ', '-').lower()}-{draw}.json"


def folder_of(setting: str, draw: int) -> Path:
    """The run of a cell."""
    return ROOT / ".cache" / "study-imagenet" / file_of(setting, draw).stem


def keep_cell(setting: str, draw: int, photos: Path) -> None:
    """Runs a cell and keeps what it found. A run that was finished is only read."""
    CELLS.mkdir(exist_ok=True)
    document = json.dumps(run_cell(setting, draw, photos), indent=1) + "\n"
    file_of(setting, draw).write_text(document, encoding="utf-8")


def run_cell(setting: str, draw: int, photos: Path) -> dict[str, Any]:
    """Runs one cell, and gives what it found."""
    folder = folder_of(setting, draw)
    command = [
        sys.executable, "-m", "flows.cli", "run", str(RECIPE), f"data.path={photos}", f"data.seed={draw}", f"folder={folder}",
        f"tracking.uri=sqlite:///{folder.parent / 'mlflow.db'}", *SETTINGS[setting],
    ]  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return cell_of(RunRecord.load(folder / "record.json"), setting, draw)


def cell_of(record: RunRecord, setting: str, draw: int) -> dict[str, Any]:
    """What a study needs of a record."""
    return {
        "setting": setting,
        "draw": draw,
        "machine": machine(),
        "images": {name: part["num_images"] for name, part in record.data.items()},
        "float": {"top1": record.float_accuracy.top1, "bytes": record.float_bytes},
        "rows": [
            {
                "budget": row.budget, "method": row.method, "bytes": row.size_bytes, "corrected": row.assignment.corrected,
                "loss_decision_set": row.loss_deployed, "winner": row.winner,
                "top1": row.validation.top1, "kl": row.validation.kl, "agreement": row.validation.agreement,
                "top1_plain": None if row.validation_plain is None else row.validation_plain.top1,
            }
            for row in record.results
            if row.validation is not None
        ],
        "comparisons": [
            {
                "budget": row.budget, "method": row.method, "other": row.other,
                "kl": [row.kl.mean, row.kl.low, row.kl.high],
                "top1": None if row.top1 is None else [row.top1.mean, row.top1.low, row.top1.high],
            }
            for row in record.comparisons
        ],
    }  # fmt: skip


def cells() -> list[dict[str, Any]]:
    """All cells that are kept, by setting and draw."""
    documents = [json.loads(file.read_text(encoding="utf-8")) for file in CELLS.glob("*.json")]
    return sorted(documents, key=lambda cell: (list(SETTINGS).index(cell["setting"]), cell["draw"]))


def mean_text(values: list[float], scale: float = 100.0, digits: int = 1) -> str:
    """A mean over draws, with its 95 % interval by Student's t where there are several draws."""
    mean = scale * statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    reach = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}[len(values)] * scale * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return f"{mean:.{digits}f} ± {reach:.{digits}f}"


def setting_table(of_setting: list[dict[str, Any]]) -> str:
    """Means over the draws of one setting, one row for each budget."""
    budgets = list(dict.fromkeys(row["budget"] for row in of_setting[0]["rows"]))
    methods = list(dict.fromkeys(row["method"] for row in of_setting[0]["rows"]))
    table = []
    for budget in budgets:
        rows = {m: [r for cell in of_setting for r in cell["rows"] if (r["budget"], r["method"]) == (budget, m)] for m in methods}
        drops = [
            cell["float"]["top1"] - row["top1"]
            for cell in of_setting
            for row in cell["rows"]
            if (row["budget"], row["method"]) == (budget, CHOSEN)
        ]
        chosen = rows[CHOSEN]
        table.append(
            [
                budget,
                f"{statistics.fmean(row['bytes'] for row in chosen) / 1e6:.2f} MB",
                *(mean_text([row["top1"] for row in rows[method]]) for method in methods),
                *([mean_text([row["top1_plain"] for row in chosen])] if chosen[0]["top1_plain"] is not None else []),
                mean_text(drops, digits=2),
                " ".join(sorted({str(row["winner"]) for row in chosen})),
            ]
        )
    plain = ["chosen, plain"] if of_setting[0]["rows"][-1]["top1_plain"] is not None else []
    return markdown_table(["budget", "chosen: size", *methods, *plain, "drop from float", "proposed by"], table)


def comparison_table(of_setting: list[dict[str, Any]]) -> str:
    """Chosen minus every other method in each draw: how often better or worse beyond the paired interval, and the mean."""
    comparisons = [row for cell in of_setting for row in cell["comparisons"] if row["method"] == CHOSEN]
    table = []
    for budget, other in dict.fromkeys((row["budget"], row["other"]) for row in comparisons):
        rows = [row for row in comparisons if (row["budget"], row["other"]) == (budget, other)]
        top1, kl = ([row[name] for row in rows] for name in ("top1", "kl"))
        table.append(
            [
                budget, other, str(len(rows)),
                f"{100 * statistics.fmean(mean for mean, _, _ in top1):+.2f}",
                f"{sum(low > 0 for _, low, _ in top1)}, {sum(high < 0 for _, _, high in top1)}",
                f"{statistics.fmean(mean for mean, _, _ in kl):+.4f}",
                f"{sum(high < 0 for _, _, high in kl)}, {sum(low > 0 for _, low, _ in kl)}",
            ]
        )  # fmt: skip
    return markdown_table(["budget", "other", "draws", "top-1 points", "better, worse", "KL", "better, worse"], table)


def write_page() -> None:
    """Writes the page from the cells that are there."""
    all_cells = cells()
    parts = [
        "# EfficientNet-Lite0 on ImageNet photographs\n\nWritten by `make study-imagenet PHOTOS=FOLDER` from the cells in "
        "`tests/benchmarks/imagenet/`. 224 pixels, the recipe's settings but for what a section names. Top-1 in percent of "
        "validation photographs that no choice has seen; means over draws with 95 % intervals by Student's t.\n",
    ]
    for setting in SETTINGS:
        of_setting = [cell for cell in all_cells if cell["setting"] == setting]
        if not of_setting:
            parts.append(f"## {setting}\n\nNot measured yet.\n")
            continue
        images = ", ".join(f"{count:,} {name.removesuffix('_set')}" for name, count in of_setting[0]["images"].items())
        floats = mean_text([cell["float"]["top1"] for cell in of_setting])
        machines = ", ".join(dict.fromkeys(cell["machine"] for cell in of_setting))
        parts.append(
            f"## {setting}\n\n{len(of_setting)} draws of {images} photographs; float {floats}. "
            f"Machine: {machines}.\n\n{setting_table(of_setting)}\n\nChosen minus others on the same photographs; in how many "
            f"draws beyond the paired 95 % interval.\n\n{comparison_table(of_setting)}\n"
        )
    PAGE.write_text(filled("\n".join(parts)), encoding="utf-8")


def main() -> None:
    """Runs what is absent of the wanted cells, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, help="a folder of ImageNet photographs; without it the page alone is written")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--draws", type=int, default=5)
    arguments = parser.parse_args()
    for draw in range(arguments.draws if arguments.photos else 0):
        for setting in arguments.settings:
            if not file_of(setting, draw).exists():
                keep_cell(setting, draw, arguments.photos.resolve())
                write_page()
    write_page()


if __name__ == "__main__":
    main()
