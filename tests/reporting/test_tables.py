"""The printed table and sentences say what the record holds, within 120 columns."""

from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from clado.records.results import MeasuredProposal, Receipt
from clado.records.run_record import RunRecord
from clado.records.text import percent, size_text
from clado.reporting import tables
from tests.synthetic import compared_rows, make_record


def printed(renderable: RenderableType, width: int = 120) -> str:
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def same_loss(record: RunRecord, factor: float) -> RunRecord:
    """The record with pairwise's losses at `factor` times those of layerwise."""
    results = []
    for result in record.results:
        base = record.find(result.budget, "layerwise")
        assert base is not None
        results.append(replace(result, loss_deployed=factor * base.loss_deployed) if result.method == "pairwise" else result)
    return replace(record, results=tuple(results), comparisons=compared_rows(results))


def test_the_table_holds_every_number_and_fits() -> None:
    record = make_record()
    text = printed(tables.table(record), 400)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 120
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert len(rows) == 3 * len(record.budgets)
    for k, budget in enumerate(record.budgets):
        size, loss, top1 = rows[3 * k : 3 * k + 3]
        assert size[0] == budget
        for column, method in enumerate(record.methods, start=2):
            result = record.find(budget, method)
            assert result is not None
            assert result.validation is not None
            assert size[column] == size_text(result.size_bytes)
            assert float(loss[column]) == pytest.approx(result.loss_deployed, rel=0.006)
            assert top1[column] == percent(result.validation.top1)


def test_eight_methods_fit() -> None:
    methods = ("uniform", "layerwise", "pairwise", "gauss_newton", "hawq", "mpqco", "fisher", "chosen")
    text = printed(tables.table(make_record(methods=methods)))
    assert "…" not in text
    assert "2.25 bits" in text


def test_missing_cells_are_dashes() -> None:
    record = make_record()
    record = replace(record, results=tuple(replace(result, validation=None) for result in record.results[:-1]))
    text = printed(tables.table(record))
    assert "–" in text
    assert "**–**" not in tables.markdown(record)


def test_markdown_marks_the_best() -> None:
    record = make_record(budgets=(3.0,), methods=("layerwise", "pairwise"))
    size, loss, top1 = [line for line in tables.markdown(record).splitlines() if line.startswith("| 3 bits")]
    assert "**" not in size
    for row in (loss, top1):
        assert [cell.strip().startswith("**") for cell in row.split("|")[3:5]] == [False, True]


def test_verdict_counts_layers_and_losses() -> None:
    record = make_record(budgets=(2.5,))
    base, other = record.find("2.5 bits", "layerwise"), record.find("2.5 bits", "pairwise")
    assert base is not None
    assert other is not None
    changed = sum(a != b for a, b in zip(base.assignment.bits, other.assignment.bits, strict=True))
    kl = record.comparison("2.5 bits", "pairwise", "layerwise").kl
    text = tables.verdict(record)
    assert changed > 0
    assert text.startswith(f"Interactions change {changed} of 22 layers. On 10,000 validation images they lower KL")
    assert f"most at 2.5 bits, by {kl.mean:+.4f} ({kl.low:+.4f} to {kl.high:+.4f}), with top-1 " in text
    assert "\n" not in text


def test_verdict_admits_a_raised_loss() -> None:
    record = make_record(budgets=(2.25, 2.5, 3.0))
    assert "they lower KL from the float network at 3 of 3 budgets, at 3 by more than the 95 % interval" in tables.verdict(record)
    raised = same_loss(record, 1.25)
    worse = tables.verdict(raised)
    most = max(record.find(budget, "layerwise").loss_deployed for budget in record.budgets)
    assert "they raise KL from the float network at 3 of 3 budgets" in worse
    assert f"by {most / 4:+.4f}" in worse
    assert "lower" not in worse
    unsure = replace(raised, comparisons=tuple(replace(c, kl=replace(c.kl, low=-1.0)) for c in raised.comparisons))
    assert "at 0 by more than the 95 % interval" in tables.verdict(unsure)
    assert "not compared on validation images" in tables.verdict(replace(record, comparisons=()))


def test_what_is_chosen_is_compared_with_every_other_answer_on_validation_images() -> None:
    record = make_record(budgets=(2.5, 3.0))
    lines = tables.comparisons_table(record).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ") and "bits" in line]
    compared = [row for row in record.comparisons if row.method == "chosen"]
    assert [row[:2] for row in rows] == [[row.budget, row.other] for row in compared]
    assert [row[4] for row in rows] == [tables.interval_text(row.kl) for row in compared]
    assert [float(row[2].split()[0]) for row in rows] == [pytest.approx(100 * row.top1.mean, abs=0.005) for row in compared]
    assert tables.comparisons_table(record) in tables.markdown(record)
    assert tables.comparisons_table(replace(record, comparisons=())) == ""


def test_verdict_without_a_change_or_a_comparison() -> None:
    record = make_record()
    equal = [
        replace(base, method="pairwise")
        if result.method == "pairwise" and (base := record.find(result.budget, "layerwise"))
        else result
        for result in record.results
    ]
    assert "Interactions change nothing: pairwise and layerwise agree on all 22 layers" in tables.verdict(
        replace(record, results=tuple(equal))
    )
    assert "no verdict" in tables.verdict(make_record(methods=("uniform", "chosen")))
    assert "no verdict" in tables.verdict(make_record(budgets=()))
    # what else is chosen has more reasons than interactions
    assert "no verdict" in tables.verdict(make_record(methods=("layerwise", "mpqco", "chosen")))
    assert "no budget do both layerwise and pairwise have a finite loss" in tables.verdict(same_loss(record, inf))
    one = tuple(replace(r, loss_deployed=inf) if r.budget == record.budgets[0] else r for r in equal)
    assert f"at {len(record.budgets) - 1} of {len(record.budgets)} budgets" in tables.verdict(replace(record, results=one))
    assert "(gauss_newton against layerwise)" in tables.verdict(make_record(methods=("layerwise", "gauss_newton", "chosen")))


def test_winners_name_the_gain() -> None:
    record = make_record(budgets=(2.5, 3.0))
    first, second = [result for result in record.results if result.method == "chosen"]
    results = (replace(first, loss_deployed=0.09, gain=0.01, winner="pairwise"), replace(second, gain=0.0, winner="uniform"))
    lines = tables.winners(replace(record, results=results)).splitlines()
    assert " ".join(lines[1].split()) == "2.5 bits pairwise loss 0.0900, 0.0100 (10.0 %) below the best of the others"
    assert lines[2].split()[2] == "uniform"
    assert lines[2].endswith("as low as the best of the others")
    doubted = tables.winners(replace(record, results=(replace(first, gain=-0.01, winner="layerwise"),)))
    assert doubted.endswith("0.0100 above the least of the others, but not significantly on these images")
    assert tables.winners(make_record(budgets=())) == "Nothing was chosen."


def test_solver_line_tells_what_is_not_optimal() -> None:
    record = make_record()
    assert tables.solver_line(record) == "Solver: 18 of 18 optimal; largest gap 0 %; longest 1.25 s."
    results = tuple(
        replace(result, status="time_limit", gap=0.02, seconds=60.0) if result.budget == "3 bits" and result.status else result
        for result in record.results
    )
    text = tables.solver_line(replace(record, results=results))
    assert text == "Solver: 15 of 18 optimal, 3 of 18 time_limit; largest gap 2 %; longest 60.00 s."


def test_phase_times_add_up() -> None:
    text = tables.phase_times(make_record())
    assert "measuring 81.5" in text
    assert text.endswith("in all 135.2.")


def test_proposals_say_who_predicts_where_another_proposed() -> None:
    record = make_record(budgets=(3.0,))
    chosen = record.find("3 bits", "chosen")
    assert chosen is not None
    first = MeasuredProposal("3 bits", "pairwise", chosen.assignment, chosen.size_bytes, 0.2, 0.125, 0.1)
    other = replace(first, origin="tempered2", predicted_by="gauss_newton", brier_deployed=0.3)
    none = replace(other, origin="hawq", loss_predicted=None, predicted_by="", brier_deployed=0.4)
    _, _, *lines = tables.proposals_table(replace(record, measured_proposals=(first, other, none))).splitlines()
    assert [line.split("|")[4].strip() for line in lines] == ["0.1250", "0.1250 (gauss_newton)", "–"]


def test_locations_say_how_to_open(tmp_path: Path) -> None:
    receipt = Receipt("sqlite:////a b/mlflow.db", "clado", "1", "abc", 30, True, 1.0)
    text = tables.locations(tmp_path, receipt)
    assert f"clado show {tmp_path} --details" in text
    assert str(tmp_path / "report.html") in text
    assert "mlflow ui --backend-store-uri 'sqlite:////a b/mlflow.db'" in text
    failed = Receipt("http://***@host", "clado", None, None, 0, False, 1.0, problem="ConnectionError: refused")
    text = tables.locations(tmp_path, failed)
    assert "NOT all delivered: ConnectionError: refused" in text
    assert "opened by" not in text


def test_show_holds_all_parts_and_fits() -> None:
    record = make_record(54)
    text = printed(tables.show(record))
    assert max(map(len, text.splitlines())) <= 120
    flat = " ".join(text.split())
    for part in (tables.verdict(record), tables.winners(record), tables.solver_line(record), tables.phase_times(record)):
        assert " ".join(part.split()) in flat
    assert "Note: activations are not quantized" in text
    assert "top-1 93.12 % on 10,000 images" in text
