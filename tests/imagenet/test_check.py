"""Real ImageNet weights on real ImageNet photos, from photos to an exported network: proves the path, not the accuracy.

With `PHOTOS` from a folder of photographs, else on the twenty that foolbox has.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient

from clado.data.sources import load_data, load_network
from clado.records.results import CHOSEN
from clado.records.run_record import RunRecord
from clado.settings.loading import parse_config
from tests.imagenet.efficientnet import CALIBRATION, MEAN, SENSITIVITY, SHAPE, STD, VALIDATION, photos

pytestmark = [pytest.mark.imagenet, pytest.mark.timeout(1800), pytest.mark.filterwarnings("default")]
ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "imagenet"
BUDGET = 5.0
PUBLISHED = 0.75
"""Top-1 of EfficientNet-Lite0 on ImageNet's validation images; a subset of n is off by four standard errors at most."""


def document(folder: Path) -> dict[str, object]:
    return {
        "network": {"source": "factory", "name": "clado.data.factories:efficientnet_lite0"},
        "data": {
            "source": "folder", "path": str(photos(folder / "photos")), "mean": list(MEAN), "std": list(STD),
            "resize": 224, "interpolation": "bicubic",
            "calibration_images": CALIBRATION, "sensitivity_images": SENSITIVITY, "validation_images": VALIDATION,
            "sample_blocks": 3,
        },
        "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
        "bits": [4, 8],
        "activations": {"bits": [8]},
        "corrections": [],
        "criterion": "kl_to_float",
        "estimators": ["layerwise", "gauss_newton"],
        "budgets": {"average_bits": [BUDGET, 6.0]},
        "cluster": {"workers": 1},
        "folder": str(folder / "run"),
    }  # fmt: skip


def clado(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        capture_output=True, text=True, timeout=1500, cwd=ROOT, env=dict(os.environ), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_float_network_knows_the_photos(tmp_path: Path) -> None:
    config = parse_config(document(tmp_path))
    loaded = load_network(config.network)
    assert loaded.image_shape == SHAPE
    slices = load_data(config.data, loaded.image_shape)
    assert slices.imagenet
    right, count = 0, CALIBRATION + SENSITIVITY + VALIDATION
    for images in (slices.calibration, slices.sensitivity, slices.validation):
        x, labels = images.load(0, len(images))
        with torch.inference_mode():
            right += int((loaded.model(x).argmax(1) == labels).sum())
    print(f"\nEfficientNet-Lite0, float: {right} of {count} photos right")
    assert right >= PUBLISHED * count - 4 * (count * PUBLISHED * (1 - PUBLISHED)) ** 0.5


def test_measured_solved_evaluated_and_exported(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document(tmp_path)))
    shown = clado("run", str(tmp_path / "run.yaml"))
    print(f"\n{shown}")
    record = RunRecord.load(tmp_path / "run" / "record.json")
    assert len(record.layer_names) > 40
    assert (record.criterion, record.float_accuracy.num_images, record.top1_name) == ("kl_to_float", VALIDATION, "top1_subset")
    assert any("proves the path, not the accuracy" in note for note in record.notes)
    assert f"top1_subset % of {VALIDATION}" in shown
    chosen = record.find(f"{BUDGET:g} bits", CHOSEN)
    assert chosen is not None
    assert chosen.average_bits <= BUDGET
    assert chosen.validation is not None
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    metrics = [set(run.data.metrics) for run in runs]
    assert any({"float_top1_subset", "float_top1_subset_images"} <= names for names in metrics)
    assert any({"top1_subset", "top1_subset_images"} <= names for names in metrics)
    assert not any({"top1", "float_top1"} & names for names in metrics)
    for kind in ("packed", "onnx"):
        told = clado("export", str(tmp_path / "run"), "--budget", str(BUDGET), "--format", kind, "-o", str(tmp_path / kind))
        print(told)
        assert any((tmp_path / kind).rglob("*.*"))


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "efficientnet_lite0"))
def test_a_recipe_runs_to_the_last_step_with_random_weights_on_few_photos(name: str, tmp_path: Path) -> None:
    few = [
        "network.weights=random", "network.weights_name=null", f"data.path={photos(tmp_path / 'photos')}",
        "data.class_balanced=false", "data.calibration_images=4", "data.sensitivity_images=4", "data.validation_images=4",
        "data.sample_blocks=2", "estimators=[layerwise]", "budgets.average_bits=[4]", "cluster.kind=local", "cluster.workers=1",
        "measure.memory_limit_mb=4000", f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}", f"folder={tmp_path / 'run'}",
    ]  # fmt: skip
    recipe = str(RECIPES / f"{name}.yaml")
    planned = clado("plan", recipe, *few)
    clado("run", recipe, *few)
    record = RunRecord.load(tmp_path / "run" / "record.json")
    assert f"{len(record.layer_names)} layers" in planned
    chosen = record.find("4 bits", CHOSEN)
    assert chosen is not None
    assert chosen.average_bits <= 4
    clado("export", str(tmp_path / "run"), "--budget", "4", "--format", "packed", "-o", str(tmp_path / "packed"))
    size = (tmp_path / "packed" / "packed.safetensors").stat().st_size
    assert chosen.size_bytes <= size <= 1.1 * chosen.size_bytes + 4 * sum(tensor[1] for tensor in record.unsearched)
