"""Deploy: the network chosen for a budget as a folder that a runtime serves, with size, accuracy and time as measured there."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clado.data.decoding import EncodedSlice, Preprocessing
from clado.data.images import KeptSlice
from clado.data.zoo import MEAN, STD
from clado.errors import DataError, StoreError
from clado.exporting.deployment import CHECK, Measurement, Served, check_folder, table, write_deployment
from clado.exporting.runtimes import Logits, Runtime, median_seconds
from clado.records.text import file_name
from clado.run.opened_run import OpenedRun
from clado.space import Assignment
from flows.commands.profile import machine, predicted_seconds
from flows.progress import progress

BATCH_IMAGES = 32
TURNS = 31
CHECKED_IMAGES = 16


def deploy(
    run: OpenedRun, name: str, runtime: Runtime, assignment: Assignment, folder: Path, threads: int, num_images: int
) -> str:
    """Writes the folder, measures the network beside float and uniform 8 bits, and runs the folder's self-check.

    Args:
        run: The opened run.
        name: The runtime's name.
        runtime: The runtime.
        assignment: What is deployed.
        folder: Where to write.
        threads: Threads of the runtime.
        num_images: Validation images that accuracy is counted on, at most.

    Returns:
        What there is to say, for the terminal.

    Raises:
        StoreError: The folder holds something else, or its self-check fails.
        DataError: There is no image to count accuracy on.
    """
    document = run.space.to_json(assignment)
    check_folder(folder, document)
    validation = run.slices.validation
    if not len(validation):
        raise DataError("there are no validation images; expected some, for the accuracy of what is deployed")
    images, labels = validation.load(0, min(num_images, len(validation)))
    shown = images.float().contiguous().numpy()
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as temporary:
        variants = _variants(run, assignment)
        files = {title: Path(temporary) / f"{number}-{runtime.file}" for number, title in enumerate(variants)}
        files["deployed"] = folder / runtime.file
        with progress("deploying", 2 * len(variants) + TURNS) as advance:
            for title, variant in variants.items():
                network, layers = run.preparation.deployed(variant) if variant != run.space.nothing else (run.float_network, {})
                runtime.write(files[title], network, layers, _calibration(run))
                advance(1)
            sessions = {title: runtime.open(file, threads) for title, file in files.items()}
            logits = {}
            for title, session in sessions.items():
                logits[title] = _logits(session, shown)
                advance(1)
            calls = {title: (lambda session=session: session(shown[:1])) for title, session in sessions.items()}
            seconds = median_seconds(calls, TURNS, lambda: advance(1))
        truth = logits["float"].argmax(1) if labels is None else labels.numpy()
        networks = tuple(
            Served(
                title,
                files[title].stat().st_size,
                1000 * seconds[title],
                float((logits[title].argmax(1) == truth).mean()),
                _predicted(run, name, variant),
            )
            for title, variant in variants.items()
        )
    facts, versions = machine(), ", ".join(f"{key} {version}" for key, version in runtime.versions().items())
    where = f"{facts['processor']}, {threads} thread{'s' if threads > 1 else ''}, {versions}"
    measurement = Measurement(networks, len(shown), labels is not None, where, threads)
    classes = getattr(_source(run), "classes", None) or ()
    checked = shown[:CHECKED_IMAGES]
    write_deployment(
        folder, runtime, document, measurement, preprocessing_of(run), classes, checked, logits["deployed"][:CHECKED_IMAGES]
    )
    return f"{table(measurement)}\n{len(shown):,} validation images; {where}\n{self_check(folder)}"


def self_check(folder: Path) -> str:
    """Runs a folder's self-check in a process of its own, and gives what it says. StoreError if it fails."""
    result = subprocess.run(
        [sys.executable, str(folder.resolve() / CHECK)], capture_output=True, text=True, check=False, cwd=folder.resolve()
    )
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise StoreError(f"the self-check of {folder} fails: {lines[-1] if lines else 'it says nothing'}")
    return result.stdout.strip()


def preprocessing_of(run: OpenedRun) -> Preprocessing:
    """How the run's images are made of files."""
    source = _source(run)
    if isinstance(source, EncodedSlice):
        return source.preprocessing
    channels, height, width = run.float_network.image_shape
    return Preprocessing((channels, height, width), max(height, width), (MEAN,) * channels, (STD,) * channels)


def _source(run: OpenedRun) -> object:
    validation = run.slices.validation
    return validation.source if isinstance(validation, KeptSlice) else validation


def _variants(run: OpenedRun, assignment: Assignment) -> dict[str, Assignment]:
    """What is measured: the deployed network, float, and the widest uniform one of at most eight bits."""
    uniform = [candidate for bits, candidate in run.space.uniform_assignments() if bits <= 8]
    widest = {f"uniform {max(b or 0 for b in uniform[-1].bits)} bits": uniform[-1]} if uniform else {}
    return {"deployed": assignment, "float": run.space.nothing, **widest}


def _calibration(run: OpenedRun) -> Tensor:
    batches = run.preparation.calibration
    return torch.cat(batches) if batches else run.slices.sensitivity.load(0, min(64, len(run.slices.sensitivity)))[0]


def _logits(session: Logits, images: NDArray[np.float32]) -> NDArray[np.float32]:
    batches: Iterable[NDArray[np.float32]] = (images[k : k + BATCH_IMAGES] for k in range(0, len(images), BATCH_IMAGES))
    return np.concatenate([session(batch) for batch in batches])


def _predicted(run: OpenedRun, name: str, assignment: Assignment) -> float | None:
    """Milliseconds by the table of the run's constraint `latency`, or by the profile in its folder; None without one."""
    if not run.space.chosen_options(assignment):
        return None
    paths = [Path(settings.path) for settings in run.config.constraints if settings.name == "latency" and settings.path]
    path = next((path for path in [*paths, run.folder / "profile" / f"{file_name(name)}.csv"] if path.is_file()), None)
    return None if path is None else 1000 * predicted_seconds(path, run.space, assignment)
