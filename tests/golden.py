"""Are the numbers of this tree those of another commit, bit for bit?

    make golden BASE=COMMIT
    python -m tests.golden COMMIT

Three small runs are made in both trees, with the same settings and one thread. Compared are every array of the measurement
store, every interaction matrix, every exported tensor, and every figure of the record. RENAMED and DELETED list the
differences that are meant. The figures of COMMIT are kept below `.cache/golden`, so the next comparison needs half the time.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import yaml
import zarr
from PIL import Image
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
KEPT = ROOT / ".cache" / "golden"
Figures = dict[str, Any]

FORMER_SETTINGS: dict[str, str] = {}
"""Keys of settings, `section.key` now -> then."""
RENAMED: dict[str, str] = {
    r"_shipped$": "_deployed",
    r"/record/candidates/": "/record/measured_proposals/",
}
"""Patterns of former keys -> present keys (regular expressions for `re.sub`)."""
DELETED: tuple[str, ...] = (r"/store/gram/changes$",)
"""Patterns of keys that only the other commit has, because a feature was deleted."""
UNLIKE = re.compile(r"seconds|provenance|fingerprint|recorded|notes|record/data")
"""Keys whose values need not be the same: times, versions, words, and hashes of settings."""

COMMON = {
    "measure": {"batch_images": 8, "memory_limit_mb": 2000},
    "cluster": {"kind": "inline", "threads_per_worker": 1},
    "search": {"evaluations": 4},
}
RUNS: dict[str, dict[str, Any]] = {
    # the demo, with two worker processes
    "demo": {
        "network": {"source": "zoo", "name": "resnet20_fashion_mnist"},
        "data": {"sensitivity_images": 32, "sample_blocks": 4, "calibration_images": 64, "validation_images": 100},
        "estimators": ["layerwise", "pairwise", "gauss_newton"],
        "budgets": {"average_bits": [2.5, 3]},
        "cluster": {"kind": "local", "workers": 2, "threads_per_worker": 1},
    },
    # attention, quantized activations, labels, gradients, split weights, several constraints
    "vit": {
        "network": {"source": "zoo", "name": "vit_fashion_mnist", "split": ["*.in_proj_weight"]},
        "data": {"sensitivity_images": 16, "sample_blocks": 2, "calibration_images": 32, "validation_images": 64},
        "activations": {"bits": [8]},
        "criterion": "cross_entropy",
        "corrections": ["equalization", "adaround", "output_statistics"],
        "adaround": {"steps": 20},
        "estimators": ["layerwise", "blockwise", "gauss_newton", "tempered4", "hawq", "mpqco", "fisher"],
        "gradients": {"vectors": 2},
        "budgets": {"average_bits": [3], "bops": [1e9]},
    },
    # a user-defined network on a folder of images, candidate widths of activations, one scale per tensor
    "folder": {
        "network": {"source": "factory", "name": "golden_network:make"},
        "data": {
            "source": "folder",
            "path": "images",
            "sensitivity_images": 16,
            "sample_blocks": 2,
            "calibration_images": 32,
            "validation_images": 40,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
            "resize": 40,
        },
        "bits": [2, 3, 8],
        "quantizer": {"weights": "percentile", "granularity": "per_tensor", "scheme": "affine"},
        "activations": {"bits": [4, 8]},
        "estimators": ["layerwise", "pairwise"],
        "budgets": {"size_bytes": [2000], "percent_of_8_bit": [50]},
        "layers": {"ties": [["body.0.weight", "body.3.weight"]]},
    },
}
NETWORK = '''"""A small convolutional network with random weights from a seed."""

import torch
from torch import nn


def make():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.SiLU(),
        )
        model = nn.Sequential()
        model.body, model.pool, model.flat, model.head = body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 4)
        for norm in (m for m in body if isinstance(m, nn.BatchNorm2d)):
            nn.init.normal_(norm.running_mean, std=0.2)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return model.eval(), torch.randn(2, 3, 32, 32)
'''


def make_folder(folder: Path) -> None:
    """Writes the images and the network of the run `folder`."""
    rng = np.random.default_rng(5)
    for name in ("ant", "bee", "cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        for k in range(30):
            coarse = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((56, 48), Image.Resampling.BICUBIC).save(folder / "images" / name / f"{k:02}.png")
    (folder / "golden_network.py").write_text(NETWORK)


def settings_of(name: str, former: Mapping[str, str]) -> dict[str, Any]:
    """Settings of a run, under the keys of its tree."""
    document: dict[str, Any] = {**COMMON, **RUNS[name], "folder": f"runs/{name}"}
    for now, then in former.items():
        section, _, key = now.partition(".")
        if key in document.get(section, {}):
            values = dict(document[section])
            values[then.partition(".")[2]] = values.pop(key)
            document[section] = values
    return document


def leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(path, value) of what a JSON document holds."""
    if isinstance(value, dict | list):
        for k, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{key}/{k}")
    else:
        yield key, value


def digest(array: Any) -> str:
    """Shape, data type and hash of an array: equal for equal bits."""
    array = np.ascontiguousarray(array)
    return f"{array.dtype}{array.shape} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def figures_of(folder: Path) -> Figures:
    """Everything that a run measured, as flat keys."""
    figures: Figures = {}
    store = zarr.open_group(folder / "store.zarr", mode="r")
    for name, member in store.members(max_depth=None):
        if isinstance(member, zarr.Array):
            figures[f"store/{name}"] = digest(member[...])
    for file in sorted((folder / "matrices").glob("*.npz")):
        with np.load(file) as arrays:
            figures |= {f"matrices/{file.stem}/{key}": digest(array) for key, array in arrays.items()}
    for file in sorted((folder / "exports").rglob("*.safetensors")):
        figures |= {f"exports/{file.parent.name}/{key}": digest(array) for key, array in load_file(file).items()}
    figures |= leaves(json.loads((folder / "record.json").read_text()), "record")
    return {key: value for key, value in figures.items() if not UNLIKE.search(key)}


def run(tree: Path, former: Mapping[str, str]) -> Figures:
    """The figures of all runs, made by the code in a folder."""
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="golden-") as name:
        folder = Path(name)
        make_folder(folder)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tree), str(folder)]),
            "OMP_NUM_THREADS": "1",
            "PREFECT_HOME": str(folder / "prefect"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        }
        for run_name in RUNS:
            file = folder / f"{run_name}.yaml"
            file.write_text(yaml.safe_dump(settings_of(run_name, former)))
            command = [sys.executable, "-c", "from flows.cli import main; main()", "run", file.name]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"the run {run_name} of {tree} failed:\n{done.stdout}\n{done.stderr}")
            figures |= {f"{run_name}/{key}": value for key, value in figures_of(folder / "runs" / run_name).items()}
    return figures


def figures_at(commit: str) -> Figures:
    """The figures of a commit: read where they are kept, else made and kept."""
    sha = git("rev-parse", f"{commit}^{{commit}}")
    settings_hash = hashlib.sha256(json.dumps([RUNS, COMMON, NETWORK]).encode()).hexdigest()[:8]
    file = KEPT / f"{sha[:12]}-{settings_hash}.json"
    if not file.exists():
        with tempfile.TemporaryDirectory(prefix="golden-tree-") as name:
            archive = subprocess.run(["git", "archive", sha, "clado", "flows"], cwd=ROOT, check=True, stdout=subprocess.PIPE)
            subprocess.run(["tar", "-x", "-C", name], input=archive.stdout, check=True)
            figures = run(Path(name), FORMER_SETTINGS)
        KEPT.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(figures))
    return dict(json.loads(file.read_text()))


def git(*arguments: str) -> str:
    """What a git command prints."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def differences(then: Figures, now: Figures) -> list[str]:
    """What is not the same, after renaming; a line for each key."""
    renamed: Figures = {}
    for key, value in then.items():
        if any(re.search(pattern, key) for pattern in DELETED):
            continue
        for pattern, replacement in RENAMED.items():
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    lines = [f"{key}: only then ({renamed[key]})" for key in renamed.keys() - now.keys()]
    lines += [f"{key}: only now ({now[key]})" for key in now.keys() - renamed.keys()]
    lines += [
        f"{key}: {renamed[key]} then, {now[key]} now" for key in renamed.keys() & now.keys() if not same(renamed[key], now[key])
    ]
    return sorted(lines)


def same(one: object, other: object) -> bool:
    """Equal, and NaN equals NaN; JSON gives back every bit of a float."""
    return one == other or (isinstance(one, float) and isinstance(other, float) and isnan(one) and isnan(other))


def main() -> None:
    """Compares this tree with a commit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the commit whose numbers are expected")
    commit = parser.parse_args().commit
    then = figures_at(commit)
    now = json.loads(json.dumps(run(ROOT, {})))
    lines = differences(then, now)
    print(*lines[:50], sep="\n")
    print(f"{len(now)} figures of {len(RUNS)} runs compared with {git('rev-parse', '--short', commit)}: {len(lines)} differ")
    raise SystemExit(bool(lines))


if __name__ == "__main__":
    main()
