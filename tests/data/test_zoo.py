"""The zoo ships whole files, images that no network was trained on, and a network as good as its manifest says."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clado.data import zoo
from clado.data.images import check_slice
from clado.data.sources import load_data, load_network
from clado.data.zoo import composites
from clado.network.network import Network
from clado.settings.schema import DataSettings, NetworkSettings, zoo_networks

DATA_FILES = sorted([*zoo.ZOO.glob("*.npz"), *zoo.ZOO.glob("*.safetensors")])
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
LIMIT_BYTES = 8_000_000
PARTS = ("calibration", "sensitivity")
CLASSIFIERS = sorted(set(zoo.NETWORKS) - zoo.SEGMENTING)


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((zoo.ZOO / "manifest.json").read_text())
    return document


@pytest.fixture(scope="module")
def shipped() -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for file in zoo.ZOO.glob("*.npz"):
        with np.load(file) as archive:
            arrays |= {key: archive[key] for key in archive.files}
    return arrays


def test_the_files_are_those_of_the_manifest(manifest: dict[str, Any]) -> None:
    assert {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in DATA_FILES} == manifest["sha256"]
    assert len(DATA_FILES) == 2 + len(zoo.NETWORKS)
    assert set(manifest["networks"]) == set(zoo.NETWORKS) == set(zoo_networks())


def test_the_zoo_is_small_and_has_its_licence() -> None:
    files = [file for file in zoo.ZOO.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= LIMIT_BYTES
    licence = (zoo.ZOO / "LICENSE.fashion-mnist").read_text()
    assert "Zalando SE" in licence
    assert "Permission is hereby granted, free of charge" in licence
    assert 'THE SOFTWARE IS PROVIDED "AS IS"' in licence


def test_images_and_labels_have_their_shapes(shipped: dict[str, np.ndarray]) -> None:
    for part, n in (("calibration", 1024), ("sensitivity", 1024), ("test", 10_000)):
        assert shipped[f"{part}_images"].shape == (n, 28, 28)
        assert shipped[f"{part}_images"].dtype == np.uint8
        assert shipped[f"{part}_labels"].shape == (n,)
        assert set(shipped[f"{part}_labels"].tolist()) == set(range(10))
    assert np.bincount(shipped["test_labels"]).tolist() == [1000] * 10


def test_no_training_image_is_in_two_slices(shipped: dict[str, np.ndarray]) -> None:
    indices = np.concatenate([shipped[f"{part}_index"] for part in PARTS])
    assert len(set(indices.tolist())) == 2048
    assert 0 <= indices.min() < indices.max() < 60_000


def test_the_shipped_slices_are_those_that_the_script_keeps_out_of_training(shipped: dict[str, np.ndarray]) -> None:
    from clado.data.zoo.train import split_training_images

    slices = split_training_images()
    assert set(slices) == {"calibration", "sensitivity", "selection", "training"}
    for part in PARTS:
        assert slices[part].tolist() == shipped[f"{part}_index"].tolist()
    everything = np.concatenate(list(slices.values()))
    assert np.array_equal(np.sort(everything), np.arange(60_000))


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_shipped_images_are_fashion_mnists(shipped: dict[str, np.ndarray]) -> None:
    from clado.data.zoo.train import read_fashion_mnist

    original = read_fashion_mnist(DEBIAN)
    for kind in ("images", "labels"):
        assert np.array_equal(shipped[f"test_{kind}"], original[f"test_{kind}"])
        for part in PARTS:
            assert np.array_equal(shipped[f"{part}_{kind}"], original[f"train_{kind}"][shipped[f"{part}_index"]])


def test_the_source_serves_the_shipped_images(shipped: dict[str, np.ndarray]) -> None:
    """Normalised, each with its own label; all of them when all are asked for."""
    slices = load_data(DataSettings(sensitivity_images=1024, calibration_images=1024), (1, 28, 28))
    for name, part in (("calibration", slices.calibration), ("sensitivity", slices.sensitivity), ("test", slices.validation)):
        check_slice(part, (1, 28, 28), 10)
        images, labels = part.load(0, len(part))
        assert labels is not None
        pixels = ((images[:, 0] * zoo.STD + zoo.MEAN) * 255).round().to(torch.uint8).numpy()
        served = sorted((image.tobytes(), int(label)) for image, label in zip(pixels, labels, strict=True))
        expected = zip(shipped[f"{name}_images"], shipped[f"{name}_labels"], strict=True)
        assert served == sorted((image.tobytes(), int(label)) for image, label in expected)
    assert torch.equal(slices.validation.load(0, 3)[1], torch.from_numpy(shipped["test_labels"][:3].astype(np.int64)))


def test_the_normalisation_is_that_of_the_training_images(shipped: dict[str, np.ndarray]) -> None:
    pixels = np.concatenate([shipped[f"{part}_images"] for part in PARTS]) / 255
    assert abs(pixels.mean() - zoo.MEAN) < 0.005
    assert abs(pixels.std() - zoo.STD) < 0.005


@pytest.mark.parametrize(
    ("name", "num_layers", "num_weights"),
    [
        ("resnet20_fashion_mnist", 22, 270_608),
        ("mobilenetv2_fashion_mnist", 23, 95_392),
        ("vit_fashion_mnist", 26, 198_272),
        ("unet_fashion_mnist", 13, 29_216),
    ],
)
def test_the_network_is_the_architecture_described(name: str, num_layers: int, num_weights: int) -> None:
    loaded = load_network(NetworkSettings(name=name))
    layers = Network(loaded.model, loaded.example_input).layers
    assert (len(layers), sum(layer.num_weights for layer in layers)) == (num_layers, num_weights)
    assert (zoo.ZOO / f"{name}.safetensors").stat().st_size <= 2_000_000


@pytest.mark.system
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_network_is_as_good_as_the_manifest_claims(name: str, manifest: dict[str, Any]) -> None:
    """All 10,000 test images; another processor's rounding may turn a few of them."""
    model = load_network(NetworkSettings(name=name)).model
    validation = load_data(DataSettings(), (1, 28, 28)).validation
    correct = 0
    with torch.inference_mode():
        for start in range(0, len(validation), 500):
            images, labels = validation.load(start, start + 500)
            assert labels is not None
            correct += int((model(images).argmax(1) == labels).sum())
    assert correct / 10_000 >= 0.9
    assert abs(correct / 10_000 - manifest["networks"][name]["test_top1"]) <= 5e-4


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_readme_states_the_manifests_figures(name: str, manifest: dict[str, Any]) -> None:
    facts = manifest["networks"][name]
    row = next(line for line in (zoo.ZOO / "README.md").read_text().splitlines() if line.startswith(f"| `{name}` |"))
    selection, test = (f"{100 * facts[key]:.2f} %" for key in ("selection_top1", "test_top1"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [selection, test, f"{facts['best_epoch']} of {facts['epochs']}"]


@pytest.mark.parametrize("name", sorted(zoo.SEGMENTING))
def test_the_readme_states_the_manifests_mean_iou(name: str, manifest: dict[str, Any]) -> None:
    facts = manifest["networks"][name]
    row = next(line for line in (zoo.ZOO / "README.md").read_text().splitlines() if line.startswith(f"| `{name}` |"))
    figures = (f"{facts[key]:.3f}" for key in ("selection_mean_iou", "test_mean_iou"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [*figures, f"{facts['best_epoch']} of {facts['epochs']}"]


def test_the_segmenting_network_is_as_good_as_the_manifest_claims(manifest: dict[str, Any]) -> None:
    """On the first 100 of 2,500 composites of test images: within five standard errors of the mean of all."""
    (name,) = zoo.SEGMENTING
    loaded = load_network(NetworkSettings(name=name))
    images, masks = load_data(DataSettings(), loaded.image_shape).validation.load(0, 100)
    with torch.inference_mode():
        ious = composites.mean_iou(loaded.model(images), masks)
    error = float(ious.std()) / 100**0.5
    assert abs(float(ious.mean()) - manifest["networks"][name]["test_mean_iou"]) <= 5 * error


def test_a_composite_shows_garments_over_one_another_and_names_each_pixel(shipped: dict[str, np.ndarray]) -> None:
    """Drawn again by hand, pixel by pixel: the last garment whose ink covers a pixel gives it its value and its class."""
    garments, labels = shipped["test_images"][:30], shipped["test_labels"][:30]
    canvases, masks = composites.composites(garments, labels, 10, seed=3)
    assert canvases.shape == masks.shape == (10, 48, 48)
    for canvas, mask in zip(canvases, masks, strict=True):
        assert set(mask[canvas == 0].tolist()) == {composites.BACKGROUND}
        assert (canvas[mask != composites.BACKGROUND] > composites.INK).all()
        assert 1 <= len(set(mask.flatten().tolist()) - {composites.BACKGROUND}) <= composites.GARMENTS
    assert np.array_equal(composites.composites(garments, labels, 4, seed=3)[0], canvases[:4])
    assert not np.array_equal(composites.composites(garments, labels, 4, seed=4)[0], canvases[:4])


def test_mean_iou_is_that_of_the_classes_of_the_mask() -> None:
    masks = torch.tensor([[[0, 0], [1, 2]], [[1, 1], [1, 1]]])
    predicted = torch.tensor([[[0, 1], [1, 1]], [[1, 1], [1, 1]]])
    outputs = torch.nn.functional.one_hot(predicted, 4).permute(0, 3, 1, 2).float()
    assert composites.mean_iou(outputs, masks).tolist() == pytest.approx([(1 / 2 + 1 / 3 + 0) / 3, 1.0])


def test_the_composites_of_each_set_are_of_its_own_images(shipped: dict[str, np.ndarray]) -> None:
    slices = load_data(DataSettings(sensitivity_images=1024, calibration_images=1024), composites.IMAGE_SHAPE)
    for name, part, count in (("calibration", slices.calibration, 1024), ("test", slices.validation, 2500)):
        images, masks = part.load(0, len(part))
        assert images.shape == (count, 1, 48, 48)
        expected = composites.composites(shipped[f"{name}_images"], shipped[f"{name}_labels"], count)
        pixels = ((images[:, 0] * zoo.STD + zoo.MEAN) * 255).round().to(torch.uint8).numpy()
        pairs = zip(pixels, masks.numpy(), strict=True)
        served = sorted(image.tobytes() + mask.tobytes() for image, mask in pairs)
        assert served == sorted(image.tobytes() + mask.tobytes() for image, mask in zip(*expected, strict=True))


def test_the_readme_names_every_file() -> None:
    named = set(re.findall(r"^\| `([^`]+)` \| ", (zoo.ZOO / "README.md").read_text(), re.MULTILINE)) - set(zoo.NETWORKS)
    files = {file.name for file in zoo.ZOO.iterdir() if file.is_file()}
    assert named == files - {"README.md", "__init__.py"}
