"""ImageNet's 50,000 validation images, generated: decoding, tasks, memory and resuming; writes FOLDER.md. Run: make bench-folder.

A recipe of `recipes/imagenet` runs on a folder in ImageNet's layout: train/SYNSET/*.JPEG and 50 images of each synset in
val/SYNSET. The network has random weights and sees 64 pixels, so that decoding and handing out take their share. The run is
killed in the middle of its evaluation, and run again. Needs 3 GB of disk.
"""

import argparse
import io
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from clado.data.decoding import imagenet_numbers
from clado.records.run_record import RunRecord
from clado.records.text import markdown_table
from clado.run.opened_run import open_run
from clado.settings.loading import load_run_config
from tests.benchmarks.bench_measure import machine

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECIPE = ROOT / "recipes" / "imagenet" / "mobilenet_v3_large.yaml"
DISTINCT, OF_A_CLASS, TRAINING = 500, 50, 2
WIDTH, HEIGHT, QUALITY = 500, 375, 90
OVERRIDES = (
    "network.name=mobilenet_v3_small", "network.weights=random", "network.weights_name=null", "network.image_shape=[3, 64, 64]",
    "data.resize=72", "data.sensitivity_images=32", "data.calibration_images=64", "data.class_balanced=false",
    "estimators=[layerwise]", "budgets.average_bits=[4]", "cluster.kind=local", "cluster.workers=2",
    "measure.memory_limit_mb=2000",
)  # fmt: skip


def jpeg(seed: int) -> bytes:
    """A file of ImageNet's usual size, with edges and grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 12, (HEIGHT, WIDTH, 3))
    pixels = np.clip(np.asarray(coarse, dtype=np.float64) + grain, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def generate(folder: Path) -> int:
    """Writes the folder, and gives its bytes."""
    files, size = [jpeg(seed) for seed in range(DISTINCT)], 0
    for k, synset in enumerate(imagenet_numbers()):
        for part, count in (("train", TRAINING), ("val", OF_A_CLASS)):
            place = folder / part / synset
            place.mkdir(parents=True)
            for i in range(count):
                content = files[(k * OF_A_CLASS + i) % DISTINCT]
                (place / f"{part}_{k * OF_A_CLASS + i + 1:08d}.JPEG").write_bytes(content)
                size += len(content)
    return size


def start(folder: Path, *overrides: str) -> "subprocess.Popen[str]":
    """A run of the recipe, in a session of its own."""
    command = [
        sys.executable, "-m", "flows.cli", "run", str(RECIPE), f"data.path={folder / 'imagenet'}", f"folder={folder / 'run'}",
        f"tracking.uri=sqlite:///{folder / 'mlflow.db'}", *OVERRIDES, *overrides,
    ]  # fmt: skip
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def batches_of(folder: Path) -> int:
    """Evaluation batches whose counts are kept."""
    return len(list((folder / "run" / "evaluations" / "validation" / "parts").glob("*")))


def family(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """A process and all below it."""
    try:
        top = psutil.Process(process.pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def resident(process: "subprocess.Popen[str]") -> float:
    """MB of the largest process of a run."""
    sizes = [0.0]
    for each in family(process):
        try:
            sizes.append(each.memory_info().rss / 1e6)
        except psutil.NoSuchProcess:
            continue
    return max(sizes)


def killed_half_way(folder: Path, num_batches: int) -> int:
    """Kills a run and its workers when a number of batches is kept. Returns the number that is kept then."""
    process = start(folder)
    while batches_of(folder) < num_batches:
        if process.poll() is not None:
            raise RuntimeError(process.communicate()[1][-4000:])
        time.sleep(0.2)
    for each in family(process):
        each.send_signal(signal.SIGKILL)
    process.communicate()
    return batches_of(folder)


def finished(folder: Path, *overrides: str) -> tuple[float, float]:
    """(seconds, MB of its largest process at most) of a run to its end."""
    begin, most = time.perf_counter(), 0.0
    process = start(folder, *overrides)
    while True:
        try:
            _, errors = process.communicate(timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            most = max(most, resident(process))
    if process.returncode:
        raise RuntimeError(errors[-4000:])
    return time.perf_counter() - begin, most


def decoding_rate(folder: Path) -> float:
    """Images a second of one process."""
    images = open_run(load_run_config(folder / "run")).slices.validation
    images.load(0, 16)
    begin, count = time.perf_counter(), 512
    images.load(1_000, 1_000 + count)
    return count / (time.perf_counter() - begin)


def main() -> None:
    """Generates, runs, kills, resumes, and writes the page."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path, help="where the images are written; it is removed at the end")
    folder = options.parse_args().folder.resolve()
    size = generate(folder / "imagenet")
    num_kept = killed_half_way(folder, num_batches=40)
    again, memory = finished(folder)
    record = RunRecord.load(folder / "run" / "record.json")
    run = open_run(load_run_config(folder / "run"))
    tasks = len(run.evaluation.batches)
    rate = decoding_rate(folder)
    shutil.rmtree(folder / "run")
    finished(folder, "data.validation_images=2000")
    subset = RunRecord.load(folder / "run" / "record.json")
    networks = len({row.assignment for row in record.results if row.validation is not None}) + 1
    seconds = record.seconds["evaluation"]
    rows = [
        ["files", f"{len(imagenet_numbers()) * OF_A_CLASS:,} of {WIDTH} x {HEIGHT} pixels, {size / 1e9:.1f} GB with train/"],
        ["decoded by one process", f"{rate:.0f} images/s"],
        ["networks evaluated", f"{networks} (float, uniform, layerwise and chosen, equal ones once)"],
        ["tasks: evaluation batches", f"{tasks}"],
        ["kept when killed", f"{num_kept} of {tasks} batches"],
        ["the run that went on", f"{again:.0f} s, of them evaluation {seconds:.0f} s"],
        ["largest process", f"{memory:,.0f} MB"],
        [f"accuracy of {record.float_accuracy.num_images:,} images is named", f"`{record.top1_name}`"],
        [f"accuracy of {subset.float_accuracy.num_images:,} images is named", f"`{subset.top1_name}`"],
    ]
    page = (
        "# 50,000 images in ImageNet's layout\n\nWritten by `make bench-folder`: "
        f"`clado run recipes/imagenet/{RECIPE.name}` with `{' '.join(OVERRIDES)}`.\n\nMachine: {machine()}.\n\n"
        + markdown_table(["what", "measured"], rows)
        + "\n"
    )
    (HERE / "FOLDER.md").write_text(page, encoding="utf-8")
    print(page)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
