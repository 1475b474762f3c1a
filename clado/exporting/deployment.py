"""A folder that runs a deployed network in a runtime, without clado.

network.onnx        the network; the runtime decides the file's name
loader.py           loads the network in the runtime
predict.py          classifies image files; it also needs NumPy and Pillow
check.py, check.npz a self-check: images, and the logits that were measured on them
deployment.json     preprocessing, labels, session settings and measurements
assignment.json     the bit-width of each layer
README.md           the measured size, accuracy and milliseconds
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clado.data.decoding import Preprocessing
from clado.errors import StoreError
from clado.exporting.runtimes import Runtime
from clado.records.serving import Serving
from clado.records.text import write_text

FORMAT = "clado-deployment/1"
FACTS, ASSIGNMENT, LOADER, PREDICT, CHECK, CHECKED, README = (
    "deployment.json", "assignment.json", "loader.py", "predict.py", "check.py", "check.npz", "README.md",
)  # fmt: skip


def write_deployment(
    folder: Path,
    runtime: Runtime,
    assignment_document: Mapping[str, Any],
    serving: Serving,
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
        serving: The measurements.
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
        "threads": serving.threads,
        "session": dict(runtime.session_entries(network)),
        "preprocessing": asdict(preprocessing),
        "classes": list(classes),
        "versions": dict(runtime.versions()),
        "measured": asdict(serving),
    }
    archive = io.BytesIO()
    np.savez_compressed(archive, images=images, logits=logits)
    temporary = folder / f".{CHECKED}.{os.getpid()}.part"
    temporary.write_bytes(archive.getvalue())
    temporary.replace(folder / CHECKED)
    write_text(folder / FACTS, json.dumps(facts, indent=1))
    write_text(folder / ASSIGNMENT, json.dumps(assignment_document, indent=1))
    write_text(folder / LOADER, runtime.loader)
    write_text(folder / PREDICT, PREDICT_CODE)
    write_text(folder / CHECK, CHECK_CODE)
    write_text(folder / README, _readme(serving, runtime))


def check_folder(folder: Path, assignment_document: Mapping[str, Any]) -> None:
    """Raises StoreError if a folder holds something other than a deployment of this assignment."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        document = json.loads((folder / ASSIGNMENT).read_text(encoding="utf-8")) if (folder / FACTS).is_file() else None
    except (OSError, ValueError):
        document = None
    if document != dict(assignment_document):
        raise StoreError(f"{folder} holds something other than this deployment; name another folder with --output, or remove it")


def _readme(serving: Serving, runtime: Runtime) -> str:
    return f"""# A network for {runtime.title}

{serving.table()}

- Accuracy is what the runtime computed on {serving.num_images:,} validation images.
- Milliseconds are medians of one image, in turns: {serving.machine}.
- Measured on another machine they differ. Run `python {CHECK}` there: it compares outputs, and times them.

    pip install {" ".join((*runtime.requirements, "numpy", "pillow"))}
    python {PREDICT} IMAGE...
    python {CHECK}

`{FACTS}` has the preprocessing and the classes, `{ASSIGNMENT}` the bit-width of each layer.
"""


PREDICT_CODE = '''"""Classifies images: python predict.py IMAGE..."""

import sys

import numpy as np
from loader import FACTS, run
from PIL import Image


def read(path):
    """An image as the network takes it: the shorter side resized, the centre cropped, normalised; (C, H, W)."""
    steps = FACTS["preprocessing"]
    (channels, height, width), side = steps["image_shape"], steps["resize"]
    image = Image.open(path).convert({1: "L", 3: "RGB"}[channels])
    longer = int(side * max(image.size) / min(image.size))
    size = (side, longer) if image.width <= image.height else (longer, side)
    image = image.resize(size, Image.Resampling[steps["interpolation"].upper()])
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32).reshape(height, width, channels)
    return ((pixels / 255 - np.float32(steps["mean"])) / np.float32(steps["std"])).transpose(2, 0, 1)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        number = int(run(read(path)[None])[0].argmax())
        print(path, FACTS["classes"][number] if FACTS["classes"] else number)
'''
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
from loader import run

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
