"""A folder that runs a deployed network in a runtime, without clado.

network.onnx        the network (the runtime names the file)
predict.py          a loader that needs the runtime, NumPy and Pillow
check.py, check.npz a self-check: images, and the logits that were measured on them
deployment.json     preprocessing, labels, session settings, and what was measured
assignment.json     the bit-width of each layer
README.md           size, accuracy and milliseconds as measured
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clado.data.decoding import Preprocessing
from clado.errors import StoreError
from clado.exporting.runtimes import Runtime
from clado.records.text import markdown_table, percent, write_text

FORMAT = "clado-deployment/1"
FACTS, ASSIGNMENT, PREDICT, CHECK, CHECKED, README = (
    "deployment.json", "assignment.json", "predict.py", "check.py", "check.npz", "README.md",
)  # fmt: skip


@dataclass(frozen=True)
class Served:
    """A network as the runtime runs it, with its measurements."""

    name: str
    """Its name in the table."""
    file_bytes: int
    """The whole file."""
    milliseconds: float
    """Median milliseconds of one image."""
    top1: float
    """Share of images whose first class is the label, or without labels the float network's class."""
    predicted_milliseconds: float | None = None
    """Milliseconds by the table of a profile. None without a table."""


@dataclass(frozen=True)
class Measurement:
    """All measurements, and the machine."""

    networks: tuple[Served, ...]
    """The deployed network, followed by those that it is compared with."""
    num_images: int
    """Number of validation images."""
    has_labels: bool
    """Whether top-1 compares with labels."""
    machine: str
    """The processor, threads and versions, in words."""
    threads: int
    """Threads of the runtime."""


def write_deployment(
    folder: Path,
    runtime: Runtime,
    assignment_document: Mapping[str, Any],
    measurement: Measurement,
    preprocessing: Preprocessing,
    classes: Sequence[str],
    images: NDArray[np.float32],
    logits: NDArray[np.float32],
) -> None:
    """Writes all files except the network, which already exists.

    Args:
        folder: The folder of the network.
        runtime: The runtime that runs it.
        assignment_document: The JSON object that `SearchSpace.to_json` makes.
        measurement: What was measured.
        preprocessing: How images are made from files.
        classes: Names of classes, in order. Empty if they are unknown.
        images: Images of the self-check (N, C, H, W), normalised.
        logits: The logits of the runtime for these images (N, classes).
    """
    network = folder / runtime.file
    facts = {
        "format": FORMAT,
        "file": runtime.file,
        "sha256": hashlib.sha256(network.read_bytes()).hexdigest(),
        "threads": measurement.threads,
        "session": dict(runtime.session_entries(network)),
        "preprocessing": asdict(preprocessing),
        "classes": list(classes),
        "versions": dict(runtime.versions()),
        "measured": asdict(measurement),
    }
    archive = io.BytesIO()
    np.savez_compressed(archive, images=images, logits=logits)
    temporary = folder / f".{CHECKED}.{os.getpid()}.part"
    temporary.write_bytes(archive.getvalue())
    temporary.replace(folder / CHECKED)
    write_text(folder / FACTS, json.dumps(facts, indent=1))
    write_text(folder / ASSIGNMENT, json.dumps(assignment_document, indent=1))
    write_text(folder / PREDICT, runtime.loader)
    write_text(folder / CHECK, CHECK_CODE)
    write_text(folder / README, _readme(measurement, runtime))


def check_folder(folder: Path, assignment_document: Mapping[str, Any]) -> None:
    """Raises StoreError if a folder holds anything but a deployment of this assignment."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        document = json.loads((folder / ASSIGNMENT).read_text(encoding="utf-8")) if (folder / FACTS).is_file() else None
    except (OSError, ValueError):
        document = None
    if document != dict(assignment_document):
        raise StoreError(f"{folder} holds something other than this deployment; name another folder with --output, or remove it")


def table(measurement: Measurement) -> str:
    """Networks with size, accuracy and milliseconds, as Markdown."""
    top1 = "top-1 %" if measurement.has_labels else "float's class %"
    rows = [
        [
            served.name,
            f"{served.file_bytes:,}",
            percent(served.top1),
            f"{served.milliseconds:.3f}",
            "–" if served.predicted_milliseconds is None else f"{served.predicted_milliseconds:.3f}",
        ]
        for served in measurement.networks
    ]
    return markdown_table(["network", "bytes of the file", top1, "ms", "ms predicted"], rows)


def _readme(measurement: Measurement, runtime: Runtime) -> str:
    return f"""# A network for {runtime.title}

{table(measurement)}

- Accuracy is what the runtime computed on {measurement.num_images:,} validation images.
- Milliseconds are medians of one image, in turns: {measurement.machine}.
- Measured on another machine they differ. Run `python {CHECK}` there: it compares outputs, and times them.

    pip install {" ".join(runtime.requirements)}
    python {PREDICT} IMAGE...
    python {CHECK}

`{FACTS}` has the preprocessing and the classes, `{ASSIGNMENT}` the bit-width of each layer.
"""


CHECK_CODE = '''"""Compares this machine's outputs with those that were measured, and fails loudly where they differ."""

import hashlib
import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
FACTS = json.loads((HERE / "deployment.json").read_text(encoding="utf-8"))
if hashlib.sha256((HERE / FACTS["file"]).read_bytes()).hexdigest() != FACTS["sha256"]:
    sys.exit(f"FAILED: {FACTS['file']} is another file than was measured; copy the folder again")

import numpy as np
from predict import run

with np.load(HERE / "check.npz") as archive:
    images, expected = archive["images"], archive["logits"]
logits = run(images)
spread = float(expected.max() - expected.min())
difference = float(np.abs(logits - expected).mean())
same = float((logits.argmax(1) == expected.argmax(1)).mean())
# kernels of another processor may round single codes differently; this is far less than one part in a hundred
if not difference <= 0.01 * spread or same < 0.9:
    sys.exit(
        f"FAILED: outputs differ from those that were measured by {difference:.4g} on average (at most {0.01 * spread:.4g} is "
        f"expected), and {100 * same:.0f} % of the first classes are the same: do not use the network here"
    )
seconds = []
for _ in range(30):
    begin = time.perf_counter()
    run(images[:1])
    seconds.append(time.perf_counter() - begin)
print(f"OK: {len(images)} images, outputs within {difference:.3g}; {1000 * np.median(seconds):.3f} ms an image here")
'''
