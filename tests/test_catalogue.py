"""Runs are listed as they are, unfinished and damaged ones too, and compared budget by budget."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from clado import catalogue, page, plots, report
from clado.errors import StoreError
from clado.records import RunRecord, percent, size_text
from flows.cli import app
from tests.synthetic import make_record


def printed(renderable: RenderableType) -> str:
    console = Console(width=120, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    assert max(map(len, capture.get().splitlines())) <= 120
    return capture.get()


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def keep(folder: Path, record: RunRecord, when: float) -> Path:
    record.save(folder / "record.json")
    (folder / "config.yaml").write_text("network: {}\n")
    os.utime(folder / "record.json", (when, when))
    return folder


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """Two finished runs of different ages, one in a folder of its own, an unfinished one and three damaged ones."""
    keep(tmp_path / "old", make_record(budgets=(2.5, 3.0), network="old network"), 1e9)
    keep(tmp_path / "deeper" / "new", replace(make_record(budgets=(3.0, 4.0), seed=1), corrections="gptq"), 1.1e9)
    (tmp_path / "old" / "sweep").mkdir()
    make_record(budgets=()).save(tmp_path / "old" / "sweep" / "record.json")  # part of a run, not one
    for name, text in {"empty": "", "cut": '{"network": "x", "resu', "foreign": "[1, 2]"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(text)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("network: {}\n")
    (tmp_path / "begun" / "prepared").mkdir()
    (tmp_path / "nothing").mkdir()
    return tmp_path


def test_every_run_is_found_once_newest_first(top: Path) -> None:
    found = catalogue.find(top)
    states = {str(one.folder.relative_to(top)): one.state for one in found}
    assert states == {
        **dict.fromkeys(("old", "deeper/new"), "finished"),
        **dict.fromkeys(("empty", "cut", "foreign"), "damaged"),
        "begun": "unfinished",
    }
    assert [one.when for one in found] == sorted((one.when for one in found), reverse=True)
    assert [one.folder for one in catalogue.find(top / "old")] == [top / "old"]


def test_the_list_says_what_was_chosen(top: Path) -> None:
    text = printed(catalogue.listing(catalogue.find(top), top))
    record = RunRecord.load(top / "old" / "record.json")
    table = rows(text)
    first = next(k for k, row in enumerate(table) if row[0] == "old")
    for row, budget in zip(table[first:], record.budgets, strict=False):
        result = record.find(budget, "chosen")
        assert result is not None
        assert result.validation is not None
        assert row[4:] == [budget, size_text(result.size_bytes), percent(result.validation.top1)]
    assert table[first][1:4] == ["old network", "none", catalogue.entry(top / "old").date]
    assert text.count("damaged") == 3
    assert text.count("unfinished") == 1


def test_runs_are_compared_budget_by_budget(top: Path) -> None:
    entries = [catalogue.entry(top / "old"), catalogue.entry(top / "deeper" / "new")]
    table = rows(printed(catalogue.comparison(entries)))
    assert table[0] == ["", "network", "old network", "resnet20_fashion_mnist"]
    assert [row[0] for row in table if row[0]] == ["2.5 bits", "3 bits", "4 bits"]
    top1 = [row[2:] for row in table if row[1] == "top-1 %"]
    results = [
        [one.record and one.record.find(budget, "chosen") for one in entries] for budget in ("2.5 bits", "3 bits", "4 bits")
    ]
    assert top1 == [[percent(r.validation.top1) if r and r.validation else "–" for r in pair] for pair in results]


def test_what_does_not_compare_is_said(top: Path) -> None:
    old, new = catalogue.entry(top / "old"), catalogue.entry(top / "deeper" / "new")
    assert catalogue.cautions([old, new]) == []
    assert old.record is not None
    accuracy = replace(old.record.float_accuracy, num_images=7)
    other = replace(old, record=replace(old.record, criterion="cross_entropy", float_accuracy=accuracy))
    assert len(catalogue.cautions([other, new])) == 2
    marked = [
        replace(one, record=replace(one.record, data={"validation_set": {"num_images": 10_000, "sha256": mark}}))
        for one, mark in ((old, "a"), (new, "b"))
        if one.record is not None
    ]
    assert catalogue.cautions(marked) == ["top-1 is of different validation images"]


@pytest.mark.parametrize(
    ("arguments", "ends", "told"),
    [
        (["."], 0, "deeper/new"),
        (["nothing"], 0, "There is no run below nothing."),
        ([], 1, "runs is not a folder"),
        (["old", "deeper/new"], 0, "float top-1"),
        (["old", "begun"], 1, "begun is unfinished"),
        (["old", "cut"], 1, "cut is damaged"),
        (["old", "nothing"], 1, "nothing is not the folder of a run"),
    ],
)
def test_the_command(arguments: list[str], ends: int, told: str, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(top)
    result = CliRunner().invoke(app, ["runs", *arguments])
    assert told in result.output
    assert "Traceback" not in result.output
    assert (result.exit_code != 0) == bool(ends)


def test_a_run_without_a_record_is_not_compared(top: Path) -> None:
    with pytest.raises(StoreError, match="begun is unfinished"):
        catalogue.comparison([catalogue.entry(top / "old"), catalogue.entry(top / "begun")])


def test_a_part_of_imagenet_is_named_wherever_its_accuracy_stands(tmp_path: Path) -> None:
    """No list, comparison, chart or page calls it top-1: nobody should compare it."""
    record = replace(make_record(), imagenet=True)
    whole = keep(tmp_path / "whole", replace(record, imagenet=False), 1e9)
    part = catalogue.entry(keep(tmp_path / "part", record, 1.1e9))
    assert printed(catalogue.listing([part], tmp_path)).count("top1_subset") == len(record.budgets)
    both = [part, catalogue.entry(whole)]
    assert printed(catalogue.comparison(both)).count("top1_subset") == 1
    images = f"{record.float_accuracy.num_images:,}"
    assert f"part: top-1 is top1_subset, of {images} images" in catalogue.cautions(both)
    assert page.charts(record)[0].title == f"Accuracy: top1_subset on {images} validation images"
    assert plots.accuracy_against_size(record).axes[0].get_ylabel() == "top1_subset (%)"
    assert "top1_subset" in report.caption(record)
    assert "top1_subset" not in report.caption(replace(record, imagenet=False))
