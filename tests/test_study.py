"""The study: which images, what a cell holds, that it resumes, what its page says, and that each cell becomes one MLflow run."""

import json
from itertools import combinations
from unittest.mock import patch

import numpy as np
import pytest
from torch import Tensor

from clado.data.sources import load_data
from clado.data.zoo.train import split_training_images
from clado.errors import DataError
from clado.settings.schema import DataSettings
from tests.benchmarks import study, study_confirm, study_table
from tests.benchmarks.study import Study, blocks_of, cells, check_disjoint, digits, draws, record
from tests.benchmarks.study_table import key, merged
from tests.synthetic import make_space


def test_sets_of_one_size_share_no_image_and_larger_ones_hold_the_smaller() -> None:
    parts = draws(4024)
    assert {size: sum(s == size for s, _ in parts) for size in study.SIZES} == study.SIZES
    for (size, _), part in parts.items():
        assert len(set(part.tolist())) == size
        assert 0 <= part.min() <= part.max() < 4024
    for (size, one), (other, two) in combinations(parts, 2):
        if size == other:
            assert not set(parts[size, one].tolist()) & set(parts[size, two].tolist())
        if one == two:
            small, large = sorted((size, other))
            assert parts[large, one][:small].tolist() == parts[small, one].tolist()


def test_too_few_images_and_shared_ones_are_refused() -> None:
    with pytest.raises(DataError, match="100 images are too few"):
        draws(100)
    with pytest.raises(DataError, match="two sensitivity sets of 4 images share an image"):
        check_disjoint({(4, 0): np.arange(4), (4, 1): np.arange(3, 7)})


@pytest.mark.parametrize("size", study.SIZES)
def test_blocks_cover_a_set_and_begin_with_those_of_smaller_ones(size) -> None:
    blocks = blocks_of(size)
    assert len(blocks) == study.BLOCKS[size] >= 16
    assert [stop for _, stop in blocks[:-1]] == [start for start, _ in blocks[1:]]
    assert (blocks[0][0], blocks[-1][1]) == (0, size)
    for smaller in study.SIZES:
        if smaller < size:
            assert blocks[: study.BLOCKS[smaller]] == blocks_of(smaller)


def test_every_case_is_of_the_zoo_and_the_data_hold_no_cell_twice() -> None:
    assert len(set(study.cases())) == len(study.cases()) == 14
    keys = [key(row) for row in study_table.rows()]
    assert len(set(keys)) == len(keys) > 0
    known = draws(4024)
    assert all(tuple(k[:3]) in study.cases() and tuple(k[3:]) in known for k in keys)


def pool() -> Tensor:
    """Eight images."""
    return load_data(DataSettings(sensitivity_images=16), (1, 28, 28)).sensitivity.load(0, 8)[0]


@pytest.fixture(scope="module")
def small() -> list[dict]:
    """One case on eight images."""
    case = Study(("vit_fashion_mnist", "w248", "plain"), pool(), (2.5, 4), num_validation=60)
    sets = draws(8, {4: 1, 8: 1})
    with patch.object(study, "BLOCKS", {4: 2, 8: 4}):
        return list(cells(case, sets, {}))


def without(row: dict, names: set[str]) -> frozenset[str]:
    """A cell's methods but for some."""
    return study_table.methods(row) - names


@pytest.mark.system
def test_only_the_methods_that_a_cell_lacks_are_measured_and_nothing_is_evaluated_twice(small) -> None:
    case = Study(("vit_fashion_mnist", "w248", "plain"), pool(), (2.5, 4), num_validation=60)
    case.top1 |= study.evaluations(small, case.case)
    sets = draws(8, {4: 1, 8: 1})
    with patch.object(study, "BLOCKS", {4: 2, 8: 4}), patch.object(study, "count", side_effect=AssertionError("evaluated")):
        assert list(cells(case, sets, {key(row): study_table.methods(row) for row in small})) == []
        lacking = {key(row): without(row, {"chosen", "fisher"}) for row in small}
        [*again] = cells(case, sets, lacking, only=["chosen", "pairwise"])
    assert [study_table.methods(row) for row in again] == [{"chosen"}] * 2
    for row, whole in zip(again, small, strict=True):
        assert set(row["measuring"]) == {"gram"}
        assert row["rows"] == [answer for answer in whole["rows"] if answer[0] == "chosen"]
        assert row["forward_images"] == {"chosen": whole["forward_images"]["chosen"]}


@pytest.mark.system
def test_two_lines_of_a_cell_are_one_row(small) -> None:
    later = {*study.TEMPERED, "chosen"}
    first, second = ([{**row, "rows": [r for r in row["rows"] if (r[0] in later) == late]} for row in small] for late in (0, 1))
    for whole, part in zip(small, merged([*first, *second]), strict=True):
        answers, again = ({(m, bound): bits for m, bound, bits, *_ in row["rows"]} for row in (whole, part))
        assert answers == again


@pytest.mark.system
def test_a_cell_has_every_method_at_every_budget_and_the_chosen_is_never_worse_than_what_it_chose_from(small) -> None:
    assert [row["images"] for row in small] == [4, 8]
    for row in small:
        answers = {(method, bound): rest for method, bound, *rest in row["rows"]}
        assert {method for method, _ in answers} == set(study_table.METHODS) - study_table.EARLIER
        for bound in (2.5, 4):
            for chosen, others in (("chosen_least", study.THRIFTY), ("chosen", ["layerwise"]), ("chosen_full", ["layerwise"])):
                assert answers[chosen, bound][3] <= min(answers[other, bound][3] for other in ("uniform", *others))
        assert row["forward_images"]["chosen"] < 0.15 * row["forward_images"]["pairwise"]
        assert row["forward_images"]["chosen_full"] > row["forward_images"]["pairwise"]


@pytest.mark.system
def test_each_cell_becomes_one_run(small, tmp_path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert record(small[:1], uri) == 1
    assert record(small, uri) == 1
    assert record(small, uri) == 0
    later = {**small[0], "rows": [row for row in small[0]["rows"] if row[0] == "chosen"]}  # methods of a cell that came later
    latest = {**small[0], "rows": [row for row in small[0]["rows"] if row[0] == "fisher"]}
    assert record([*small, later], uri) == 1
    assert record([*small, later, latest], uri) == 1
    assert record([*small, later, latest], uri) == 0
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name(study.EXPERIMENT).experiment_id])
    assert sorted(run.data.params["images"] for run in runs) == ["4", "4", "4", "8"]
    whole = next(run for run in runs if run.data.params["images"] == "8")
    best = {m.step: m.value for m in client.get_metric_history(whole.info.run_id, "chosen.top1")}
    assert set(best) == {250, 400}


def made(gain: float, networks=("a", "b", "c"), num_draws=5) -> study_table.Figures:
    """Cells in which `chosen` is `gain` points above layerwise, give or take."""
    rng = np.random.default_rng(0)
    rows = []
    for network in networks:
        for draw in range(num_draws):
            answers = []
            for bound in study_table.LOW:
                base = float(rng.uniform(0.5, 0.9))
                answers += [["layerwise", bound, "24", base, 1.0, 0.1, 0.1]]
                answers += [["chosen", bound, "42", base + (gain + rng.normal(0, 0.3)) / 100, 1.0, 0.1, None]]
            rows.append({"network": network, "space": "s", "setting": "plain", "images": 64, "draw": draw, "rows": answers})
    return study_table.figures(rows)


@pytest.mark.parametrize(("gain", "above"), [(1.0, True), (0.0, False), (-1.0, False)])
def test_the_interval_excludes_zero_where_there_is_a_gain_and_only_there(gain, above) -> None:
    mean, low, high = study_table.interval(study_table.differences(made(gain), "plain", "chosen", "layerwise", study_table.LOW))
    assert low <= mean <= high
    assert mean == pytest.approx(gain, abs=0.2)
    assert (low > 0) == above


def test_the_page_is_what_the_data_give() -> None:
    text = study_table.TABLE.read_text()
    assert text == study_table.page(study_table.lines())
    assert len(text.splitlines()) <= 130


@pytest.mark.parametrize("other", ["layerwise", "pairwise"])
def test_the_goals_hold_in_the_data_plain_chosen_is_above_and_the_interval_excludes_zero(other) -> None:
    cells = study_table.figures(study_table.rows())
    mean, low, _ = study_table.interval(study_table.differences(cells, "plain", "chosen", other, study_table.LOW))
    assert mean >= low > 0


@pytest.mark.parametrize("other", study_table.SINGLE)
def test_on_images_that_no_rule_was_picked_on_the_mean_is_above_every_single_method(other) -> None:
    cells, _ = study_table.confirmed(study_table.figures(study_table.rows()))
    mean, _, _ = study_table.interval(study_table.differences(cells, "plain", "chosen", other, study_table.LOW))
    assert mean > 0.5


@pytest.mark.parametrize("other", study_table.SINGLE)
def test_the_goals_hold_in_the_data_to_no_method_is_more_than_a_twentieth_lost(other) -> None:
    cells = study_table.figures(study_table.rows())
    values = list(study_table.differences(cells, "plain", "chosen", other, study_table.LOW).values())
    assert len(values) >= 100
    assert sum(value < -study_table.MARGIN for value in values) <= 0.05 * len(values)


def test_the_goals_hold_in_the_data_chosen_spends_a_tenth_of_what_pairs_spend() -> None:
    for row in study_table.rows():
        assert row["forward_images"]["chosen"] <= 0.1 * row["forward_images"]["pairwise"]


def test_where_one_machine_measured_all_chosen_has_no_more_loss_on_the_sensitivity_set_than_uniform_and_layerwise() -> None:
    compared = 0
    for cell in study_table.figures([line for line in study_table.lines() if "uniform" in study_table.methods(line)]).values():
        for (_, bound), rest in [answer for answer in cell.items() if answer[0][0] == "chosen"]:
            compared += 1
            for other in ("uniform", "layerwise"):
                assert rest[study_table.MEASURED] <= cell[other, bound][study_table.MEASURED]
    assert compared >= 100


def test_what_confirms_is_of_no_set_and_of_every_plain_answer() -> None:
    unseen = study_confirm.left_over()
    split, pool = split_training_images(), study.pool_indices()
    assert len(set(unseen.tolist())) == len(unseen) == 1208
    assert not set(unseen.tolist()) & {*split["training"].tolist(), *split["calibration"].tolist()}
    for part in draws(len(pool)).values():
        assert not set(unseen.tolist()) & set(pool[part].tolist())
    rows = study_table.rows()
    cells, number = study_table.confirmed(study_table.figures(rows))
    assert number == len(unseen)
    for row in rows:
        if row["setting"] == "plain":
            assert {(m, b) for m, b, *_ in row["rows"] if b in study_table.LOW} <= set(cells[key(row)])


def test_an_answer_is_confirmed_as_the_bits_that_it_is_of() -> None:
    for space in (make_space(3), make_space(3).with_activations((8,))):
        assignment = study_confirm.assignment_of("482", space)
        assert digits(assignment) == "482"
        space.check(assignment)


def test_calibration_images_count_where_statistics_are_measured_again() -> None:
    row = {"network": "resnet20", "setting": "corrected", "images": 64}
    row |= {"forward_images": {"pairwise": 10_000, "gauss_newton": 640, "chosen": 640 + 64 * 10}}
    assert study_table.with_statistics(row)["forward_images"]["chosen"] == 640 + (64 + study_table.NUM_CALIBRATION) * 10
    for other in ({"setting": "plain"}, {"network": "vit"}):
        assert study_table.with_statistics({**row, **other})["forward_images"] == row["forward_images"]


def test_assignments_are_kept_as_digits() -> None:
    row = study_table.rows()[0]
    assert all(set(bits) <= set("23468") for _, _, bits, *_ in row["rows"])
    assert json.dumps(row)  # plain data
    assert digits(type("A", (), {"bits": (2, 8, 4)})()) == "284"
