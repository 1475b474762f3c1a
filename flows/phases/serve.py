"""Serve: measures time and accuracy of networks in a runtime, for a run and for `clado deploy`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from clado.errors import CladoError
from clado.exporting.runtimes import Runtime, median_seconds, runtime_of
from clado.records.results import CHOSEN, Result
from clado.records.serving import Served, Serving
from clado.run.limits import latency_table
from clado.run.opened_run import OpenedRun
from clado.space import Assignment
from flows.commands.profile import machine, predicted_seconds
from flows.progress import progress

BATCH_IMAGES = 32
TURNS = 31


def serve(run: OpenedRun, results: Sequence[Result]) -> tuple[Serving | None, list[str]]:
    """(measurements of each budget's chosen network in the runtime, notes). None if the settings name no runtime.

    If the runtime refuses a network, the run goes on. A note gives the reason.
    """
    settings = run.config.runtime
    if settings is None:
        return None, []
    runtime = runtime_of(settings.name)
    networks = {row.budget: row.assignment for row in results if row.method == CHOSEN}
    try:
        with TemporaryDirectory() as folder:
            measured, _ = run_in(run, settings.name, runtime, networks, Path(folder), settings.threads, settings.images)
    except CladoError as error:
        return None, [f"{runtime.title} measured nothing: {error}"]
    return measured, []


def run_in(
    run: OpenedRun,
    name: str,
    runtime: Runtime,
    networks: Mapping[str, Assignment],
    folder: Path,
    threads: int,
    num_images: int | None,
) -> tuple[Serving, dict[str, Path]]:
    """Writes networks for a runtime and measures them, and also float and uniform 8 bits.

    Args:
        run: The opened run.
        name: The runtime's name.
        runtime: The runtime.
        networks: Assignments by name.
        folder: The folder for the files.
        threads: Threads of the runtime.
        num_images: Most validation images to count accuracy on. None: all.

    Returns:
        The measurements, and the file of each network.
    """
    variants = {**networks, **_references(run)}
    distinct = list(dict.fromkeys(variants.values()))
    files = {assignment: folder / f"{number}-{runtime.file}" for number, assignment in enumerate(distinct)}
    num_images = min(num_images or len(run.slices.validation), len(run.slices.validation))
    with progress("serving", len(distinct) * (1 + -(-num_images // BATCH_IMAGES)) + TURNS) as advance:
        calibration = _calibration(run)
        for assignment, file in files.items():
            network, layers = (run.float_network, {}) if assignment.is_float else run.preparation.deployed(assignment)
            runtime.write(file, network, layers, calibration)
            advance(1)
        sessions = {assignment: runtime.open(file, threads) for assignment, file in files.items()}
        image = run.slices.validation.load(0, 1)[0].float().contiguous().numpy()
        calls = {str(k): (lambda session=session: session(image)) for k, session in enumerate(sessions.values())}
        seconds = dict(zip(distinct, median_seconds(calls, TURNS, lambda: advance(1)).values(), strict=True))
        hits, has_labels = _hits(run, sessions, num_images, advance)
    versions = ", ".join(f"{key} {version}" for key, version in runtime.versions().items())
    where = f"{machine()['processor']}, {threads} thread{'s' if threads > 1 else ''}, {versions}"
    served = tuple(
        Served(
            title,
            files[assignment].stat().st_size,
            1000 * seconds[assignment],
            hits[assignment] / num_images,
            _predicted_milliseconds(run, name, assignment),
        )
        for title, assignment in variants.items()
    )
    serving = Serving(runtime.title, served, num_images, has_labels, where, threads)
    return serving, {title: files[assignment] for title, assignment in variants.items()}


def _references(run: OpenedRun) -> dict[str, Assignment]:
    """The networks to compare with: float, and the widest uniform one of at most eight bits."""
    uniform = [candidate for bits, candidate in run.space.uniform_assignments() if bits <= 8]
    widest = {f"uniform {max(b or 0 for b in uniform[-1].bits)} bits": uniform[-1]} if uniform else {}
    return {"float": run.space.nothing, **widest}


def _hits(
    run: OpenedRun, sessions: Mapping[Assignment, Callable[..., object]], num_images: int, advance: Callable[[float], None]
) -> tuple[dict[Assignment, int], bool]:
    """(images with the right first class for each network, whether there are labels). Without labels, float counts as right."""
    hits, has_labels = dict.fromkeys(sessions, 0), False
    for start in range(0, num_images, BATCH_IMAGES):
        images, labels = run.slices.validation.load(start, min(start + BATCH_IMAGES, num_images))
        classes = {
            assignment: torch.as_tensor(session(images.float().contiguous().numpy())).argmax(1)
            for assignment, session in sessions.items()
        }
        has_labels = labels is not None
        truth = classes[run.space.nothing] if labels is None else labels
        for assignment, first_class in classes.items():
            hits[assignment] += int((first_class == truth).sum())
        advance(len(sessions))
    return hits, has_labels


def _calibration(run: OpenedRun) -> Tensor:
    batches = run.preparation.calibration
    return torch.cat(batches) if batches else run.slices.sensitivity.load(0, min(64, len(run.slices.sensitivity)))[0]


def _predicted_milliseconds(run: OpenedRun, name: str, assignment: Assignment) -> float | None:
    """Milliseconds according to a table of the run. None without a table, or if a layer is in float without a float candidate."""
    if len(run.space.chosen_options(assignment)) < run.space.num_layers:
        return None
    constrained = [settings.path for settings in run.config.constraints if settings.name == "latency" and settings.path]
    path = next((path for path in (latency_table(run.config, name), *constrained) if path.is_file()), None)
    return None if path is None else 1000 * predicted_seconds(path, run.space, assignment)
