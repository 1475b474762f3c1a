"""Finetune: trains the assignment chosen for a budget, evaluates the result, writes it, and mirrors it to MLflow."""

import json
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clado.data.images import ImageSlice, PickedSlice, check_slice
from clado.errors import DataError
from clado.evaluation import Counts, count
from clado.exporting._torch_module import as_module
from clado.exporting.packed import export_packed
from clado.exporting.safetensors import ASSIGNMENT
from clado.grids import QuantizedLayer
from clado.network.network import Network
from clado.quantization.training import Epoch, FineTuned, Training, finetune
from clado.records.results import Accuracy, Receipt
from clado.records.text import file_name, markdown_table, percent, write_text
from clado.run.checks import too_many_unreadable
from clado.run.opened_run import OpenedRun
from clado.space import Assignment
from clado.tracking import delivery
from clado.tracking.metrics import own_metric
from flows.commands.export import PACKED
from flows.commands.stored import StoredRun, accuracy_of
from flows.progress import progress

RECORD = "finetuned.json"
HELD_OUT, MOST_HELD_OUT = 0.2, 3000  # share of the training images


@dataclass(frozen=True)
class Images:
    """The images of a fine-tuning."""

    training: ImageSlice
    """Images to train on."""
    held_out: ImageSlice
    """Images that decide when training ends. They are not trained on."""
    origin: str
    """Where the images are from."""


def images_of(run: OpenedRun, folder: Path | None, seed: int, most: int | None = None, labels: bool = False) -> Images:
    """The named training set, or else all images of the run that are not for validation. A seeded part is held out.

    Validation images are in neither part. `most` limits the training images. `labels` says whether training reads labels.
    """
    if most is not None and most < 2:
        raise DataError(f"--images is {most}; expected two or more")
    if folder is None:
        slices = run.slices
        everything: ImageSlice = PickedSlice([slices.calibration, slices.sensitivity, run.decision, slices.selection])
        origin = "the run's calibration, sensitivity and selection images"
    else:
        from clado.data.sources._training import load_training

        preprocessing, settings = run.loaded.preprocessing, run.config.data
        settings = settings.model_copy(
            update={key: value for key, value in preprocessing.items() if getattr(settings, key) is None}
        )
        everything = load_training(folder, settings, run.loaded.image_shape, run.slices.validation)
        origin = str(folder)
    outputs = run.num_logits if labels and run.has_classes else None
    if outputs is not None and everything.num_classes is not None and everything.num_classes > outputs:
        raise DataError(
            f"{origin} has labels of {everything.num_classes} classes, the network {outputs} outputs; expected labels that fit"
        )
    if len(everything) < 10:
        raise DataError(f"{origin}: {len(everything)} images; expected ten or more to train on")
    order = np.random.default_rng(seed).permutation(len(everything)).tolist()
    held = max(2, min(MOST_HELD_OUT, int(HELD_OUT * len(order))))
    picked = order if most is None else order[: held + most]
    # the run has checked its own images before it measured
    lost = () if folder is None else _unreadable(run, PickedSlice([everything], picked), outputs, origin)
    training, held_out = ([n for k, n in enumerate(picked) if k not in lost and (k < held) == out] for out in (False, True))
    if not training or not held_out:
        raise DataError(
            f"{origin}: of {len(picked)} images {len(lost)} cannot be read, so too few are left to train on and to hold out"
        )
    return Images(PickedSlice([everything], training), PickedSlice([everything], held_out), origin)


def _unreadable(run: OpenedRun, images: ImageSlice, outputs: int | None, origin: str) -> Collection[int]:
    """The images that cannot be read. Each image is decoded once, before the training takes hours.

    Raises:
        DataError: More images than the run allows cannot be read, or one does not fit the network.
    """
    allowed, unreadable = run.config.data.max_corrupt_images, dict[int, str]()
    check_slice(images, run.loaded.image_shape, outputs, unreadable=unreadable if allowed else None)
    if len(unreadable) > allowed:
        raise too_many_unreadable(origin, list(unreadable.values()), allowed)
    return unreadable


def folder_of(stored: StoredRun, budget: str) -> Path:
    """Where the fine-tuned network of a budget is kept."""
    return stored.folder / "finetuned" / file_name(budget)


def train(
    stored: StoredRun, run: OpenedRun, budget: str, assignment: Assignment, training: Training, images: Images
) -> tuple[str, Receipt | None]:
    """Trains, evaluates on the validation set, and writes RUN/finetuned/BUDGET.

    Returns:
        What to print, and MLflow's receipt. The receipt is None if the run has no record yet.
    """
    begin, folder = time.perf_counter(), folder_of(stored, budget)
    network, layers = run.preparation.deployed(assignment)
    as_module(network, layers)  # a network that cannot be written is refused before the training takes hours
    with progress("training", 1.0) as advance:
        done = 0.0

        def advanced(batches: int, of: int) -> None:
            nonlocal done
            advance(batches / of - done)
            done = batches / of

        tuned = finetune(network, layers, run.float_network, images.training, images.held_out, training, advanced)
    before, after = accuracy_of(run, assignment), accuracy_on_validation(run, tuned.network, tuned.layers)
    size = export_packed(folder / PACKED, tuned.network, tuned.layers)
    write_text(folder / ASSIGNMENT, json.dumps(run.space.to_json(assignment), indent=1))
    document = {
        "format": "clado-finetuned/1",
        "budget": budget,
        **run.space.to_json(assignment),
        "training": asdict(training),
        "images": {
            "origin": images.origin,
            "training": len(images.training),
            "training_sha256": images.training.sha256,
            "held_out": len(images.held_out),
            "held_out_sha256": images.held_out.sha256,
        },
        "epochs": [asdict(epoch) for epoch in tuned.epochs],
        "best_epoch": tuned.best_epoch,
        "validation_before": asdict(before),
        "validation": asdict(after),
        "total_bytes": size.total_bytes,
        "seconds": time.perf_counter() - begin,
    }
    write_text(folder / RECORD, json.dumps(document, indent=1))
    told = text(tuned, before, after, images, folder)
    if not (stored.folder / "record.json").is_file():
        return told, None
    receipt = delivery.track_nested(
        stored.folder,
        f"{budget} fine-tuned",
        record_folder=folder,
        experiment=stored.config.tracking.experiment,
        uri=stored.config.tracking.uri,
        params={"budget": budget, "method": "fine-tuned", "images": images.origin, **_texts(asdict(training))},
        metrics=_metrics(tuned, before, after) | {"total_bytes": size.total_bytes},
        series={"held_out_loss": [(epoch.number, epoch.held_out_loss) for epoch in tuned.epochs]}
        | {"training_loss": [(e.number, e.training_loss) for e in tuned.epochs if e.training_loss is not None]},
        artifacts=[folder / name for name in (PACKED, ASSIGNMENT, RECORD)],
    )
    return told, receipt


def accuracy_on_validation(run: OpenedRun, network: Network, layers: dict[int, QuantizedLayer]) -> Accuracy:
    """Accuracy of a network on the run's validation set."""
    images = run.slices.validation
    batches = (
        count(network, layers, images, *batch, reference=run.float_network, judge=run.judge) for batch in run.evaluation.batches
    )
    return sum(batches, Counts()).accuracy()


def text(tuned: FineTuned, before: Accuracy, after: Accuracy, images: Images, folder: Path) -> str:
    """Epochs, and accuracy before and after, for the terminal."""

    def row(epoch: Epoch) -> list[str]:
        loss = "" if epoch.training_loss is None else f"{epoch.training_loss:.5f}"
        mark = "kept" if epoch.number == tuned.best_epoch else ""
        return [str(epoch.number), loss, f"{epoch.held_out_loss:.5f}", f"{epoch.seconds:.0f}", mark]

    table = markdown_table(["epoch", "training loss", "held-out loss", "seconds", ""], [row(epoch) for epoch in tuned.epochs])
    outcome = (
        "no epoch was better than the start, so the start is kept"
        if tuned.best_epoch == 0
        else f"epoch {tuned.best_epoch} is kept"
    )
    top1 = "" if after.top1 is None else f"top-1 {percent(before.top1)} % before, {percent(after.top1)} % after; "
    if after.metric is not None:
        top1 += f"{after.metric_name} {before.metric:.4g} before, {after.metric:.4g} after; "
    return (
        f"{table}\n{len(images.training):,} training images of {images.origin}; {len(images.held_out):,} held out: {outcome}\n"
        f"validation, {after.num_images:,} images: {top1}"
        f"loss {before.loss:.4f} before, {after.loss:.4f} after\nwritten to {folder}: {PACKED}, {RECORD}"
    )


def _metrics(tuned: FineTuned, before: Accuracy, after: Accuracy) -> dict[str, float | None]:
    return {
        "top1": after.top1,
        "top5": after.top5,
        "validation_loss": after.loss,
        "validation_images": after.num_images,
        "top1_before": before.top1,
        "validation_loss_before": before.loss,
        "best_epoch": tuned.best_epoch,
        **own_metric(after),
    }


def _texts(document: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in document.items()}
