"""A plug-in is one file in a folder, or an object that a dotted name names. It is listed, used, and checked."""

import subprocess
import sys
from importlib import import_module
from itertools import count
from pathlib import Path

import pytest

from clado.errors import ConfigurationError
from clado.plugins import FOLDERS, PACKAGE, available, load
from clado.records.run_record import RunRecord
from tests.running import config, run_pipeline

NUMBERS = count()
WITH_INTERFACE = [folder for folder, place in FOLDERS.items() if place.interface]

ESTIMATOR = '''
"""Increases of single layers, none below zero."""
import numpy as np
from clado.interaction.estimators import Estimator, diagonal_matrix

def estimate(measured):
    return diagonal_matrix(measured, 2 * np.maximum(measured.increases(), 0.0))

estimator = Estimator(estimate, kinds=("singles",))
'''
CRITERION = '''
"""Squared distance of the softmax from that of the float network."""
from clado.criteria import Criterion

def distance(outputs, float_outputs, targets):
    return (outputs.softmax(-1) - float_outputs.softmax(-1)).square().sum(-1)

criterion = Criterion(distance)
'''
CONSTRAINT = '''
"""Weights of more than two bits."""
from clado.choosing.constraints import Constraint, ConstraintKind

def build(space, bound):
    costs = tuple(float(space.layers[i].num_weights * (bits > 2)) for i, bits, _ in space.options)
    return Constraint("wide_weights", "weights", costs, float(bound))

constraint = ConstraintKind(build)
'''
TEXTS = {"estimators": ESTIMATOR, "criteria": CRITERION, "constraints": CONSTRAINT}
MOST_WIDE = 100_000


@pytest.fixture
def names(request, tmp_path, monkeypatch) -> dict[str, str]:
    """The three plug-ins, as files of their folders or as modules below the working folder: folder -> name in the settings."""
    names = {}
    for folder, text in TEXTS.items():
        place = FOLDERS[folder]
        name = f"extra_{place.noun}_{next(NUMBERS)}"
        if request.param == "a file in the folder":
            package, home = import_module(place.package), tmp_path / folder
            home.mkdir()
            monkeypatch.setattr(package, "__path__", [*package.__path__, str(home)])
            names[folder] = name
        else:
            home, names[folder] = tmp_path, f"{name}:{place.noun}"
        (home / f"{name}.py").write_text(text)
    return names


@pytest.mark.parametrize("names", ["a file in the folder", "a dotted name"], indirect=True)
def test_a_run_uses_a_new_estimator_criterion_and_constraint(names, tmp_path):
    document = config(
        tmp_path / "run",
        data={"sensitivity_images": 8, "sample_blocks": 2, "calibration_images": 0, "validation_images": 8},
        corrections=[],
        estimators=["layerwise", names["estimators"]],
        criterion=names["criteria"],
        constraints=[{"kind": names["constraints"], "bound": MOST_WIDE}],
        budgets={"average_bits": [3.0]},
        search={"evaluations": 0},
    )
    run_pipeline(document, tracked=False)
    record = RunRecord.load(tmp_path / "run" / "record.json")
    assert record.criterion == names["criteria"]
    assert names["estimators"] in record.methods
    assert 0 < record.results[0].loss_deployed <= 2  # a Brier score
    shapes = load_shapes(record)
    for result in record.results:
        assert sum(shapes[k] for k, bits in enumerate(result.assignment.bits) if bits > 2) <= MOST_WIDE


def load_shapes(record: RunRecord) -> list[int]:
    """Weights of each layer of the shipped network."""
    from clado.data.sources import load_network
    from clado.settings.schema import NetworkSettings

    state = load_network(NetworkSettings(name="resnet20_fashion_mnist")).model.state_dict()
    return [state[name].numel() for name in record.layer_names]


@pytest.mark.parametrize("names", ["a file in the folder"], indirect=True)
def test_a_new_file_is_listed_without_being_imported(names):
    for folder, name in names.items():
        assert name in available(folder)
        assert f"{FOLDERS[folder].package}.{name}" not in sys.modules
        with pytest.raises(ConfigurationError, match=rf"did you mean '{name}'"):
            load(folder, name[:-1] + "x")


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_plugins_of_a_folder_are_its_public_files(folder):
    files = (PACKAGE.parent / FOLDERS[folder].package.replace(".", "/")).glob("*.py")
    assert available(folder) == tuple(sorted(file.stem for file in files if not file.stem.startswith("_")))


@pytest.mark.parametrize(("folder", "name"), [(folder, name) for folder in WITH_INTERFACE for name in available(folder)])
def test_each_file_defines_an_object_of_its_folders_interface(folder, name):
    place = FOLDERS[folder]
    assert isinstance(load(folder, name), getattr(import_module(place.package), place.interface))
    assert load(folder, f"{place.package}.{name}:{place.noun}") is load(folder, name)


@pytest.mark.parametrize("folder", WITH_INTERFACE)
def test_a_wrong_object_is_refused_with_what_it_is_and_what_is_expected(folder, tmp_path: Path):
    module = f"wrong_{next(NUMBERS)}"
    (tmp_path / f"{module}.py").write_text("thing = 3\n")
    place = FOLDERS[folder]
    interface = f"{place.package}.{place.interface}"
    expected = f"{place.noun} '{module}:thing' is an object of type int; expected an object of the class {interface}"
    with pytest.raises(ConfigurationError, match=expected):
        load(folder, f"{module}:thing")
    with pytest.raises(ConfigurationError, match=rf"{module} has no name 'thong' \(did you mean 'thing'\?\)"):
        load(folder, f"{module}:thong")


def test_listing_imports_nothing():
    script = (
        "import sys; from clado.plugins import FOLDERS, available; [available(f) for f in FOLDERS]; "
        "print(*(set(sys.modules) & {'numpy', 'torch', 'flows', 'clado.criteria', 'clado.interaction', 'clado.choosing'}))"
    )
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert result.stdout.strip() == ""
