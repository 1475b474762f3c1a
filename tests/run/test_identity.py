"""The identity of a run: other layers, candidate bit-widths or activation widths are another run, and another folder."""

from pathlib import Path
from typing import Any

import pytest

from clado.errors import IdentityMismatch
from clado.run.checks import check
from clado.run.opened_run import OpenedRun, open_run
from clado.settings.identity import fingerprint
from clado.settings.loading import parse_config
from clado.storage.measurement_store import MeasurementStore
from flows.commands.plan import plan_text
from tests.storage.test_growing import FIXED, files

ACTIVATIONS = {"activations": {"bits": [8]}}
MORE_FIXED = [*FIXED, "layer3.2.conv1.weight"]
FEWER_FIXED = ["conv1.weight", "layer1.*", "layer2.*", "layer3.0.*", "layer3.1.conv2.weight"]
# settings of the store, then the change of a run, and the expected message
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "more bits": ({}, {"bits": [2, 4, 8]}, "bits: the store has [2, 4], this run [2, 4, 8] (layers: layer3.2.conv1.weight, "),
    "fewer bits": ({}, {"bits": [2]}, "bits: the store has [2, 4], this run [2] (layers: layer3.2.conv1.weight, "),
    "bits of one layer": (
        {},
        {"layers": {"bits": {"fc.weight": [2, 8]}}},
        "bits: the store has [2, 4], this run [2, 8] (layers: fc.weight)",
    ),
    "another layer": ({}, {"network": {"fixed": FEWER_FIXED}}, "layers: only this run has layer3.1.conv1.weight"),
    "a layer less": ({}, {"network": {"fixed": MORE_FIXED}}, "layers: only the store has layer3.2.conv1.weight"),
    "activations": ({}, ACTIVATIONS, "activations.bits: the store has None, this run [8]"),
    "no activations": (ACTIVATIONS, {"activations": {"bits": []}}, "activations.bits: the store has [8], this run None"),
    "activation widths": (ACTIVATIONS, {"activations": {"bits": [4, 8]}}, "activations.bits: the store has [8], this run [4, 8]"),
}


def settings(folder: Path | None, *changes: dict[str, Any]) -> dict[str, Any]:
    """A few layers of the shipped network, without corrections; `folder` None: the one that the settings name."""
    document: dict[str, Any] = {
        "network": {"name": "resnet20_fashion_mnist", "graph": False, "fixed": FIXED},
        "data": {"sensitivity_images": 8, "sample_blocks": 2, "calibration_images": 8, "validation_images": 20},
        "bits": [2, 4],
        "estimators": ["pairwise"],
        "corrections": [],
        "cluster": {"kind": "inline"},
        **({} if folder is None else {"folder": str(folder)}),
    }
    for changed in changes:
        for key, value in changed.items():
            document[key] = {**document.get(key, {}), **value} if isinstance(value, dict) else value
    return document


def opened(folder: Path | None, *changes: dict[str, Any]) -> OpenedRun:
    return open_run(parse_config(settings(folder, *changes)))


@pytest.mark.parametrize(("settings", "changed", "said"), OTHERS.values(), ids=list(OTHERS))
def test_other_layers_bits_or_activation_widths_are_another_run_and_refused_in_its_folder(tmp_path, settings, changed, said):
    first, other = opened(None, settings), opened(None, settings, changed)
    assert fingerprint(first.identity.document) != fingerprint(other.identity.document)
    assert fingerprint(first.identity.without_corrections) != fingerprint(other.identity.without_corrections)
    assert first.folder != other.folder
    store = opened(tmp_path / "run", settings).identity.open_store()
    assert (store.space.layers, store.space.options) == (first.space.layers, first.space.options)
    before = files(tmp_path)
    for attempt in (
        check,
        lambda run: run.identity.open_store(),
        lambda run: run.identity.check_measured(),
        lambda run: run.identity.missing_tiles(),
        plan_text,
    ):
        with pytest.raises(IdentityMismatch) as caught:
            attempt(opened(tmp_path / "run", settings, changed))
        (line,) = (line.strip() for line in str(caught.value).splitlines() if said in line)
        assert line.startswith(said)
        assert "another folder" in str(caught.value)
    assert files(tmp_path) == before


def test_other_bits_are_refused_beside_more_images(tmp_path):
    opened(tmp_path / "run").identity.open_store()
    grown = opened(tmp_path / "run", {"data": {"sensitivity_images": 16}})
    assert grown.identity.adds_images(MeasurementStore.open(grown.store_path))
    with pytest.raises(IdentityMismatch, match=r"bits: the store has \[2, 4\], this run \[2, 8\]") as caught:
        opened(tmp_path / "run", {"data": {"sensitivity_images": 16}, "bits": [2, 8]}).identity.open_store()
    assert "blocks" not in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"layers": {"ties": [["layer3.2.conv1.weight", "layer3.2.conv2.weight"]]}},
        {"layers": {"blocks": [["layer3.2.conv1.weight", "fc.weight"]]}},
        {"data": {"validation_images": 10}},
        {"budgets": {"average_bits": [2.5]}},
    ],
)
def test_what_changes_no_number_is_the_same_run(tmp_path, changed):
    first, other = opened(tmp_path / "run"), opened(tmp_path / "run", changed)
    assert first.identity.document == other.identity.document
    first.identity.open_store()
    assert other.identity.open_store().missing(other.plan) == list(other.plan.tiles)
