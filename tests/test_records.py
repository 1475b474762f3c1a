"""A record survives its file, a broken file is refused, and a file is written whole or not at all."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from clado.errors import StoreError
from clado.records.results import MeasuredProposal
from clado.records.run_record import RunRecord
from clado.records.text import markdown_table, percent, size_text, write_text
from clado.reporting import page, plots, tables
from tests.synthetic import make_record, make_space, with_activations


@pytest.mark.parametrize("num_layers", [22, 54])
def test_what_was_saved_is_loaded(tmp_path: Path, num_layers: int) -> None:
    record = make_record(num_layers)
    record.save(tmp_path / "record.json")
    assert RunRecord.load(tmp_path / "record.json") == record


@pytest.mark.parametrize("widths", [(8,), (4, 8)])
def test_activation_bits_are_saved_and_documented(tmp_path: Path, widths: tuple[int, ...]) -> None:
    record, space = with_activations(make_record(), widths), make_space().with_activations(widths)
    record.save(tmp_path / "record.json")
    assert RunRecord.load(tmp_path / "record.json") == record
    for result in record.results:
        document = record.assignment_document(result)
        assert document == space.to_json(result.assignment)
        assert space.from_json(document) == result.assignment


def test_measured_proposals_are_loaded_with_who_predicts(tmp_path: Path) -> None:
    record = make_record()
    row = record.results[0]
    proposal = MeasuredProposal("3 bits", "pairwise", row.assignment, row.size_bytes, 0.2, 0.1)
    record = replace(record, measured_proposals=(proposal, replace(proposal, origin="tempered2", predicted_by="gauss_newton")))
    record.save(tmp_path / "record.json")
    assert RunRecord.load(tmp_path / "record.json") == record


def test_optional_numbers_may_be_absent(tmp_path: Path) -> None:
    record = make_record()
    bare = replace(record, results=tuple(replace(result, validation=None, gap=None, winner=None) for result in record.results))
    bare.save(tmp_path / "record.json")
    assert RunRecord.load(tmp_path / "record.json") == bare


def test_losses_that_are_not_finite_are_null_in_the_file_and_infinite_again_when_it_is_read(tmp_path: Path) -> None:
    record = make_record()
    first, *rest = record.results
    accuracy = replace(first.validation, loss=math.inf)
    bad = replace(first, loss_deployed=math.inf, gain=math.inf, validation=accuracy)
    replace(record, results=(bad, *rest)).save(tmp_path / "record.json")
    assert "Infinity" not in (tmp_path / "record.json").read_text()
    loaded = RunRecord.load(tmp_path / "record.json")
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
    assert loaded.results == (replace(bad, gain=None), *rest)
    assert tables.markdown(loaded)
    assert [chart.title for chart in page.charts(loaded)] == [chart.title for chart in page.charts(record)]
    plots.save_all(loaded, {}, tmp_path / "plots")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"network": "a"}'])
def test_a_broken_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(StoreError, match=r"record\.json is not the record of a finished run"):
        RunRecord.load(path)


def test_a_missing_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="clado run"):
        RunRecord.load(tmp_path / "record.json")


def test_assignment_document_is_that_of_the_space() -> None:
    record, space = make_record(), make_space()
    for result in record.results:
        document = record.assignment_document(result)
        assert document == space.to_json(result.assignment)
        assert space.from_json(document) == result.assignment


def test_budgets_and_methods_keep_their_order() -> None:
    record = make_record(budgets=(3.0, 2.5), methods=("pairwise", "layerwise"))
    assert record.budgets == ("3 bits", "2.5 bits")
    assert record.methods == ("pairwise", "layerwise")
    assert record.find("2.5 bits", "layerwise") is record.results[3]
    assert record.find("2.5 bits", "chosen") is None


def test_write_text_leaves_no_other_file(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "file", "one")
    write_text(tmp_path / "new" / "file", "two")
    assert (tmp_path / "new" / "file").read_text() == "two"
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_markdown_columns_have_one_width() -> None:
    lines = markdown_table(["a", "loss"], [["1", "2"], ["longer", "–"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "|--------|------|"


@pytest.mark.parametrize(("fraction", "text"), [(0.92345, "92.34"), (1.0, "100.00"), (None, "–"), (math.nan, "–")])
def test_percent(fraction: float | None, text: str) -> None:
    assert percent(fraction) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(640, "0.64 kB"), (67_250, "67.2 kB"), (123_456, "123 kB"), (999_499, "999 kB"), (999_500, "1 MB"), (1_074_000, "1.07 MB"),
     (86_000_000, "86 MB"), (3_210_000_000, "3,210 MB")],
)  # fmt: skip
def test_size_text(num_bytes: int, text: str) -> None:
    assert size_text(num_bytes) == text
