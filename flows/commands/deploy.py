"""Deploy: writes the network of a budget as a folder for a runtime, with its size, accuracy and time in the runtime."""

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from clado.data.decoding import EncodedSlice, Preprocessing
from clado.data.images import KeptSlice
from clado.data.zoo import MEAN, STD
from clado.errors import DataError, StoreError
from clado.exporting.deployment import CHECK, check_folder, write_deployment
from clado.exporting.runtimes import Runtime
from clado.run.opened_run import OpenedRun
from clado.space import Assignment
from flows.phases.serve import run_in

DEPLOYED = "deployed"
CHECKED_IMAGES = 16


def deploy(
    run: OpenedRun, name: str, runtime: Runtime, assignment: Assignment, folder: Path, threads: int, num_images: int
) -> str:
    """Writes the folder, measures the network, float and uniform 8 bits, and runs the folder's self-check.

    Args:
        run: The opened run.
        name: The runtime's name.
        runtime: The runtime.
        assignment: The network to deploy.
        folder: Where to write.
        threads: Threads of the runtime.
        num_images: Most validation images to count accuracy on.

    Returns:
        The measurements and the result of the self-check, for the terminal.

    Raises:
        StoreError: The folder holds something else, or its self-check fails.
        DataError: There is no image to count accuracy on.
    """
    document = run.space.to_json(assignment)
    check_folder(folder, document)
    validation = run.slices.validation
    if not len(validation):
        raise DataError("there are no validation images; expected some, for the accuracy of what is deployed")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as temporary:
        serving, files = run_in(run, name, runtime, {DEPLOYED: assignment}, Path(temporary), threads, num_images)
        shutil.copyfile(files[DEPLOYED], folder / runtime.file)
    checked = validation.load(0, min(CHECKED_IMAGES, len(validation)))[0].float().contiguous().numpy()
    logits = runtime.open(folder / runtime.file, threads)(checked)
    classes = getattr(_source(run), "classes", None) or ()
    write_deployment(folder, runtime, document, serving, preprocessing_of(run), classes, checked, logits)
    return f"{serving.table()}\n{serving.caption()}\n{self_check(folder)}"


def self_check(folder: Path) -> str:
    """Runs a folder's self-check in a separate process, and returns its output. Raises StoreError if it fails."""
    result = subprocess.run(
        [sys.executable, str(folder.resolve() / CHECK)], capture_output=True, text=True, check=False, cwd=folder.resolve()
    )
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise StoreError(f"the self-check of {folder} fails: {lines[-1] if lines else 'it says nothing'}")
    return result.stdout.strip()


def preprocessing_of(run: OpenedRun) -> Preprocessing:
    """How the run's images are made from files."""
    source = _source(run)
    if isinstance(source, EncodedSlice):
        return source.preprocessing
    channels, height, width = run.float_network.image_shape
    return Preprocessing((channels, height, width), max(height, width), (MEAN,) * channels, (STD,) * channels)


def _source(run: OpenedRun) -> object:
    validation = run.slices.validation
    return validation.source if isinstance(validation, KeptSlice) else validation
