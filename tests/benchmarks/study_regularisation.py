"""How much of the measured interactions to believe; writes REGULARISATION.md. Run: make study-regularisation PHOTOS=FOLDER.

The diagonal of a matrix holds what each layer costs alone. The other entries are interactions. G(λ) has the diagonal of
`layerwise` and λ times the interactions of `gauss_newton`. G(0) is `layerwise`. Its answers are compared with `layerwise`'s on
photographs that no answer was fitted to. So are those of other ways to use the interactions.

A cell is one draw of photographs: the run of the study's setting "256 sensitivity images" (see study_imagenet.py). Half of these
photographs measure. Answers are fitted to a half of that half, and to all of it. Cells are kept in `imagenet/regularisation/`.
"""

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clado.choosing import solvers
from clado.choosing.proposals import propose
from clado.criteria.kl_to_float import kl_to_float
from clado.data.images import ImageSlice
from clado.interaction import estimators
from clado.interaction.estimators import Measured
from clado.interaction.matrix import InteractionMatrix
from clado.records.text import markdown_table
from clado.run.opened_run import OpenedRun, open_run
from clado.settings.loading import load_run_config
from clado.space import Assignment
from flows.commands.stored import StoredRun
from tests.benchmarks import study_imagenet
from tests.benchmarks.bench_measure import machine
from tests.benchmarks.pages import filled

PAGE = Path(__file__).parent / "REGULARISATION.md"
SETTING = "256 sensitivity images"
LAMBDAS = (0.25, 0.5, 0.75, 1.0)
FITTED = (64, 128)
"""Photographs that answers are fitted to."""
SECONDS = 10.0
"""Solver time for one budget."""
Array = NDArray[np.float64]


def first_images(measured: Measured, num_images: int) -> Measured:
    """The first sample blocks of a measurement, of about so many images."""
    blocks = int(np.searchsorted(np.cumsum(measured.counts), num_images)) + 1
    sums = {kind: values[:blocks] for kind, values in measured.sums.items() if len(values) == len(measured.counts)}
    return Measured(measured.space, measured.criterion, measured.counts[:blocks], sums)


def matrices_of(measured: Measured) -> dict[str, InteractionMatrix]:
    """Every way to use the interactions, by name."""
    alone, pairs = estimators.estimate("layerwise", measured), estimators.estimate("gauss_newton", measured)
    cross = np.where(pairs.in_layer_mask(), 0.0, pairs.values)
    mixed = {f"λ = {factor:g}": mix(alone, factor * cross) for factor in LAMBDAS}
    shrunk = pairs.shrink()
    return {
        "layerwise": alone,
        **mixed,
        "shrunk (James–Stein)": mix(alone, np.where(pairs.in_layer_mask(), 0.0, shrunk.values)),
        "gauss_newton": pairs,
        "tempered2": estimators.estimate("tempered2", measured),
        "tempered4": estimators.estimate("tempered4", measured),
    }


def mix(alone: InteractionMatrix, cross: Array) -> InteractionMatrix:
    """The diagonal of one matrix with cross terms, made convex by clipping."""
    return InteractionMatrix(
        alone.space, np.diag(np.diag(alone.values)) + cross, "", alone.criterion, alone.baseline, alone.num_samples,
        convexity="clip_psd",
    )  # fmt: skip


def answers_of(run: OpenedRun, measured: Measured) -> dict[tuple[str, str], Assignment]:
    """(method, budget) -> the assignment, deployed with the corrections that were made before measuring."""
    settings = run.config.solver
    proposals = propose(
        matrices_of(measured), run.budgets, lambda program: solvers.prepare(program, settings.name, time_limit=SECONDS)
    )
    return {(p.method, p.budget.name): run.evaluation.representative(p.assignment.with_corrections("static")) for p in proposals}


def divergences(run: OpenedRun, assignment: Assignment, images: ImageSlice, floats: list[torch.Tensor]) -> tuple[Array, Array]:
    """(KL divergence from the float network, whether the top class is the float network's) of each image (n,)."""
    network, layers = run.preparation.deployed(assignment)
    folded, replaced = network.folded_with(layers)
    kl, agreed = [], []
    for batch, floats_of_batch in zip(batches(run, images), floats, strict=True):
        logits = folded.logits(batch, replaced)
        kl.append(kl_to_float(logits, floats_of_batch))
        agreed.append((logits.argmax(1) == floats_of_batch.argmax(1)).double())
    return torch.cat(kl).double().numpy(), torch.cat(agreed).numpy()


def batches(run: OpenedRun, images: ImageSlice) -> tuple[torch.Tensor, ...]:
    """The images of a slice, as many at a time as are fast."""
    return images.load(0, len(images))[0].split(run.float_network.images_at_once)


@torch.inference_mode()
def measure_cell(folder: Path, draw: int) -> dict[str, Any]:
    """Answers of every method for every budget, and how they do on the decision set and on the validation set."""
    run, measured = open_run(load_run_config(folder)), StoredRun.open(folder).measured
    answers = {fitted: answers_of(run, first_images(measured, fitted)) for fitted in FITTED}
    distinct = list(dict.fromkeys(assignment for of_fit in answers.values() for assignment in of_fit.values()))
    folded, _ = run.float_network.folded()
    seen: dict[str, dict[Assignment, tuple[Array, Array]]] = {}
    for name, images in {"decision": run.decision, "validation": run.slices.validation}.items():
        floats = [folded.logits(batch) for batch in batches(run, images)]
        seen[name] = {assignment: divergences(run, assignment, images, floats) for assignment in distinct}
    rows = []
    for fitted, of_fit in answers.items():
        for (method, budget), assignment in of_fit.items():
            row: dict[str, Any] = {"fitted": fitted, "method": method, "budget": budget}
            for name, of_set in seen.items():
                kl, agreed = of_set[assignment]
                reference_kl, reference_agreed = of_set[of_fit["layerwise", budget]]
                row[name] = {
                    "kl": float(kl.mean()), "difference": float((kl - reference_kl).mean()),
                    "error": float((kl - reference_kl).std(ddof=1) / len(kl) ** 0.5),
                    "agreement": float(agreed.mean()), "agreement_difference": float((agreed - reference_agreed).mean()),
                }  # fmt: skip
            rows.append(row)
    return {"draw": draw, "machine": machine(), "images": {name: len(next(iter(of.values()))[0]) for name, of in seen.items()},
            "rows": rows}  # fmt: skip


def file_of(draw: int) -> Path:
    """Where a cell is kept."""
    return study_imagenet.CELLS / "regularisation" / f"{draw}.json"


def page(cells: list[dict[str, Any]]) -> str:
    """REGULARISATION.md."""
    images = ", ".join(f"{count} {name}" for name, count in cells[0]["images"].items())
    parts = [
        "# How much of the interactions to believe\n\nWritten by `make study-regularisation PHOTOS=FOLDER` from the cells in "
        "`tests/benchmarks/imagenet/regularisation/`. EfficientNet-Lite0, 224 pixels, weights alone, bits 2, 4 and 8, default "
        f"corrections without re-estimation. {len(cells)} draws; {images} photographs, which no answer was fitted to. G(λ) has "
        "the diagonal of `layerwise` and λ times the interactions of `gauss_newton`. The tables give each method's KL divergence "
        "divided by that of `layerwise` on the same validation photographs, as a mean over the draws. They also say in how many "
        "draws it is better and worse by more than two standard errors. "
        f"Machine: {', '.join(dict.fromkeys(cell['machine'] for cell in cells))}.\n"
    ]
    for fitted in FITTED:
        rows = [row for cell in cells for row in cell["rows"] if row["fitted"] == fitted]
        budgets = list(dict.fromkeys(row["budget"] for row in rows))
        methods = [method for method in dict.fromkeys(row["method"] for row in rows) if method not in ("uniform", "layerwise")]
        table = [
            [method, *(_cell([row for row in rows if (row["method"], row["budget"]) == (method, budget)]) for budget in budgets)]
            for method in methods
        ]
        parts.append(f"## Fitted to {fitted} photographs\n\n" + markdown_table(["method", *budgets], table) + "\n")
    parts.append(_by_draw(cells))
    return "\n".join(parts)


def _cell(of_method: list[dict[str, Any]]) -> str:
    better = sum(row["validation"]["difference"] < -2 * row["validation"]["error"] for row in of_method)
    worse = sum(row["validation"]["difference"] > 2 * row["validation"]["error"] for row in of_method)
    ratios = [row["validation"]["kl"] / (row["validation"]["kl"] - row["validation"]["difference"]) for row in of_method]
    return f"{statistics.fmean(ratios):.3f} ({better} better, {worse} worse)"


def _by_draw(cells: list[dict[str, Any]]) -> str:
    """What `layerwise` itself has, so that ratios can be read, and what more photographs give it."""
    table = []
    for budget in dict.fromkeys(row["budget"] for row in cells[0]["rows"]):
        values: Mapping[int, list[float]] = {
            fitted: [
                row["validation"]["kl"]
                for cell in cells
                for row in cell["rows"]
                if (row["fitted"], row["budget"], row["method"]) == (fitted, budget, "layerwise")
            ]
            for fitted in FITTED
        }
        table.append([budget, *(f"{statistics.fmean(of_fit):.4f}" for of_fit in values.values())])
    header = ["budget", *(f"fitted to {fitted}" for fitted in FITTED)]
    return "## KL divergence of `layerwise`\n\nMeans over the draws.\n\n" + markdown_table(header, table) + "\n"


def main() -> None:
    """Measures the draws that are absent, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, help="a folder of ImageNet photographs; without it the page alone is written")
    parser.add_argument("--draws", type=int, default=3)
    arguments = parser.parse_args()
    for draw in range(arguments.draws if arguments.photos else 0):
        if not file_of(draw).exists():
            folder = study_imagenet.folder_of(SETTING, draw)
            if not (folder / "record.json").exists():
                study_imagenet.keep_cell(SETTING, draw, arguments.photos.resolve())
            file_of(draw).parent.mkdir(exist_ok=True)
            file_of(draw).write_text(json.dumps(measure_cell(folder, draw), indent=1) + "\n", encoding="utf-8")
    cells = [json.loads(file_of(draw).read_text(encoding="utf-8")) for draw in range(arguments.draws) if file_of(draw).exists()]
    PAGE.write_text(filled(page(cells)), encoding="utf-8")


if __name__ == "__main__":
    main()
