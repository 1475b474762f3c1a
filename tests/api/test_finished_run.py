"""A finished run from Python: what the record says, and the networks that it speaks of."""

import shutil

import numpy as np
import pytest
import torch

import clado
from clado.data.sources import load_data, load_network
from clado.errors import ConfigurationError, StoreError
from clado.settings.loading import load_run_config
from tests import tolerance
from tests.running import ESTIMATORS


@pytest.fixture(scope="module")
def run(finished) -> clado.Run:
    return clado.Run(str(finished.folder))


@pytest.fixture(scope="module")
def validation(run):
    settings = load_run_config(run.folder)
    images = load_data(settings.data, load_network(settings.network).image_shape).validation
    return images.load(0, len(images))


def test_it_reads_what_the_record_says(run, finished):
    assert run.budgets == ("2.5 bits", "3 bits")
    assert set(run.methods) == {"uniform", *ESTIMATORS, "chosen"}
    assert run.assignment(2.5) == run.assignment("2.5 bits") == run.record.find("2.5 bits", "chosen").assignment
    assert run.assignment("3 bits", "uniform").bits == (2,) * 22
    assert run.accuracies == {budget: run.accuracy(budget) for budget in run.budgets}
    assert run.assignments["3 bits"] == run.assignment(3)
    assert len(run.to_frame()) == len(run.record.results)
    assert "2.5 bits, 3 bits" in repr(run)
    assert "<table>" in run._repr_html_()
    assert len(clado.Run(finished.folder).rows()) == len(run.rows())


def test_its_matrices_are_solved_again(run):
    assert set(run.matrices) == set(ESTIMATORS)
    matrix = run.matrices["gauss_newton"]
    stored = run.record.find("3 bits", "gauss_newton")
    solution = clado.solve(matrix, average_bits=3)
    assert solution.objective == pytest.approx(stored.objective, rel=1e-6)
    assert np.array_equal(matrix.values, matrix.values.T)


@pytest.mark.parametrize("method", ["chosen", "uniform"])
def test_a_network_of_a_budget_has_the_accuracy_that_is_recorded(run, validation, method):
    x, y = validation
    with torch.no_grad():
        logits = run.network(3, method)(x)
    accuracy = run.accuracy(3, method)
    assert float((logits.argmax(1) == y).double().mean()) == accuracy.top1
    tolerance.assert_close_losses(accuracy.loss, float(torch.nn.functional.cross_entropy(logits.double(), y)))


def test_a_network_is_made_anew_where_it_was_not_kept(run, validation, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "models")
    with torch.no_grad():
        remade, stored = clado.Run(tmp_path / "run").network(3)(validation[0][:20]), run.network(3)(validation[0][:20])
    tolerance.assert_close(remade, stored)


def test_it_has_a_picture(run):
    assert clado.plot(run)._repr_png_()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("budget", "method"), [(7, "chosen"), ("3", "chosen"), (3, "hawq"), (None, "chosen")], ids=["bits", "name", "method", "none"]
)
def test_what_the_run_lacks_is_answered_with_what_it_has(run, budget, method):
    with pytest.raises(ConfigurationError, match=r"its budgets are 2\.5 bits, 3 bits, its methods .*chosen"):
        run.result(budget, method)


@pytest.mark.parametrize(("folder_holds", "message"), [(False, "is not a folder"), (True, "not the record of a finished run")])
def test_a_folder_without_a_finished_run_is_refused(folder_holds, message, tmp_path):
    if folder_holds:
        (tmp_path / "run").mkdir()
    with pytest.raises(StoreError, match=message):
        clado.Run(tmp_path / "run")
