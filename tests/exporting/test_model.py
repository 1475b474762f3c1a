"""The model that MLflow gets: its outputs are those of fake quantization, its requirements are pinned, nothing is unpickled."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from clado.data.sources import load_network
from clado.errors import StoreError
from clado.exporting.model import PackedModel, export_model, name_of, read_model
from clado.network.network import Network
from clado.quantization.preparation import Recipe, prepare
from clado.quantization.quantizers import WeightQuantizer
from clado.records.run_record import RunRecord
from clado.run.opened_run import open_run
from clado.settings.schema import NetworkSettings
from clado.space import Layer
from flows.commands.stored import StoredRun
from tests import tolerance

ZOO = NetworkSettings(source="zoo", name="resnet20_fashion_mnist")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, torch.Tensor, torch.Tensor, tuple[Layer, ...]]:
    """(folder, images, the logits of fake quantization, layers) of the zoo's network at 2 and 4 bits in turn."""
    loaded = load_network(ZOO)
    network = Network(loaded.model, loaded.example_input)
    space = network.search_space((2, 4))
    prepared = prepare(network, space, Recipe(WeightQuantizer()), [])
    assignment = space.narrowest
    for layer in range(0, space.num_layers, 2):
        assignment = assignment.replace(layer, 4)
    images = torch.randn(5, *loaded.image_shape, generator=torch.Generator().manual_seed(1))
    chosen = prepared.chosen(assignment)
    folder = tmp_path_factory.mktemp("model")
    export_model(folder, prepared.network, chosen, ZOO)
    return folder, images, network.logits(images, chosen), network.layers


def test_its_outputs_are_those_of_fake_quantization_for_any_batch(written):
    folder, images, expected, layers = written
    model = PackedModel(folder)
    for count in (1, 2, 5):
        actual = torch.tensor(model.predict(images[:count].numpy()))
        tolerance.assert_close(actual, expected[:count], tolerance.of_layers(layers))


def test_it_says_what_it_takes_gives_and_needs(written):
    document = read_model(written[0])
    assert document["image_shape"] == [1, 28, 28]
    assert document["num_classes"] == 10
    assert {line.partition("==")[0] for line in document["requirements"]} == {"clado", "torch", "numpy", "safetensors"}
    assert all(re.fullmatch(r"[\w-]+==[0-9a-z.]+", line) for line in document["requirements"])  # no +cpu: no index has it
    assert {file.name for file in written[0].iterdir()} == {"packed.safetensors", "model.json"}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (ZOO, "zoo.resnet20_fashion_mnist"),
        (NetworkSettings(source="factory", name="mine.networks:make"), "factory.mine.networks.make"),
        (
            NetworkSettings(source="torchvision", name="resnet18", weights=Path("weights/resnet18-f37072fd.pth")),
            "torchvision.resnet18.resnet18-f37072fd",
        ),
        (NetworkSettings(source="timm", name="resnet50.a1_in1k", weights="random"), "timm.resnet50.a1_in1k.random"),
    ],
)
def test_a_networks_name_is_one_that_mlflow_takes(settings, name):
    from mlflow.utils.validation import _validate_model_name

    assert name_of(settings) == name
    _validate_model_name(name)


@pytest.mark.parametrize("text", ["", "[]", '{"format": "clado-model/0"}'])
def test_another_folder_is_refused(text, tmp_path):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(StoreError, match="expected clado-model/1"):
        read_model(tmp_path)


def test_every_budgets_registered_model_is_the_network_that_was_chosen(finished):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's import complains of its own type hints
        from mlflow import MlflowClient, pyfunc
    client = MlflowClient(finished.receipt.uri)
    run = open_run(StoredRun.open(finished.folder).config)
    record = RunRecord.load(finished.folder / "record.json")
    images, _ = run.slices.validation.load(0, 20)
    aliases = client.get_registered_model("zoo.resnet20_fashion_mnist").aliases
    assert len(aliases) == len(record.budgets)
    for version in aliases.values():
        model_version = client.get_model_version("zoo.resnet20_fashion_mnist", version)
        model = pyfunc.load_model(model_version.source)
        result = record.find(model_version.tags["budget"], "chosen")
        assert result is not None
        network, layers = run.preparation.deployed(result.assignment)
        np.testing.assert_allclose(model.predict(images.numpy()), network.logits(images, layers).numpy(), rtol=1e-4, atol=1e-4)
        with pytest.raises(Exception, match="shape"):  # the signature is checked
            model.predict(images[:, :, :20].numpy())


LOADS = """
import json, sys, numpy as np, pickle, torch
def refuse(*arguments, **named): raise AssertionError("something was unpickled")
pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(f"models:/zoo.resnet20_fashion_mnist@{sys.argv[2]}")
print(json.dumps(model.predict(np.load(sys.argv[3])).tolist()))
"""


@pytest.mark.system
def test_a_fresh_process_loads_a_model_by_its_alias_and_unpickles_nothing(finished, tmp_path):
    run = open_run(StoredRun.open(finished.folder).config)
    images, _ = run.slices.validation.load(0, 3)
    np.save(tmp_path / "images.npy", images.numpy())
    script = [sys.executable, "-c", LOADS, finished.receipt.uri, "3_bits", tmp_path / "images.npy"]
    told = subprocess.run(script, capture_output=True, text=True, check=False, timeout=400, cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    result = RunRecord.load(finished.folder / "record.json").find("3 bits", "chosen")
    assert result is not None
    network, layers = run.preparation.deployed(result.assignment)
    np.testing.assert_allclose(json.loads(told.stdout), network.logits(images, layers).numpy(), rtol=1e-4, atol=1e-4)
