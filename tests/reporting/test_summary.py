"""The end of a run says what it gives, what is recommended and why."""

from dataclasses import replace
from pathlib import Path

import pytest

from clado.records.results import CHOSEN, Accuracy
from clado.records.run_record import RunRecord
from clado.reporting import summary
from clado.space import Assignment
from tests.reporting.test_tables import printed
from tests.synthetic import make_record

RUN = Path("runs/mine")


def with_drops(drops: dict[str, float], labelled: bool = True) -> RunRecord:
    """A record whose chosen networks lose so much at its budgets."""
    record = make_record(budgets=tuple(float(name.split()[0]) for name in drops))
    before = record.float_accuracy.top1

    def accuracy(drop: float) -> Accuracy:
        return Accuracy(1000, 0.2, before - drop) if labelled else Accuracy(1000, 0.2, kl=0.1, agreement=1 - drop)

    results = tuple(replace(row, validation=accuracy(drops[row.budget])) for row in record.results)
    return replace(record, results=results, float_accuracy=accuracy(0.0), comparisons=())


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    ("drops", "expected", "why"),
    [
        ({"2.5 bits": 0.05, "3 bits": 0.009, "4 bits": 0.0}, "3 bits", "the smallest that loses at most 1 point"),
        ({"2.5 bits": 0.05, "3 bits": 0.03}, "3 bits", "the one that loses least"),
        ({"2.5 bits": -0.01, "3 bits": 0.03}, "2.5 bits", "the smallest that loses at most 1 point"),
    ],
)
def test_the_smallest_network_that_loses_at_most_a_point_is_recommended(drops, expected, why, labelled):
    record = with_drops(drops, labelled)
    assert summary.recommended(record).budget == expected
    text = summary.recommendation(record, RUN)
    assert f"Recommended: {expected}, {why}" in text
    assert text.endswith(f"Next: clado export runs/mine --budget {expected.split()[0]} --format onnx")


def test_what_was_not_evaluated_is_not_recommended():
    record = make_record()
    record = replace(record, results=tuple(replace(row, validation=None) for row in record.results))
    assert summary.recommended(record) is None
    assert summary.recommendation(record, RUN) == "Next: clado evaluate runs/mine"
    assert all(line.endswith("not evaluated") for line in summary.headlines(record))


def test_a_run_fits_on_a_screen():
    record = make_record(54)
    lines = printed(summary.summary(record)).splitlines()
    assert len(lines) <= 2 * len(record.budgets) + 14
    assert max(map(len, lines)) <= 120
    assert [line.split("  ")[0].strip() for line in lines[1:7]] == list(record.budgets)
    for budget in record.budgets:
        chosen = record.find(budget, CHOSEN)
        assert any(f"→ {100 * chosen.validation.top1:.2f} %" in line for line in lines)


def test_layers_are_named_by_width_from_the_narrowest_on():
    names = [f"layer{i}.weight" for i in range(10)]
    text = summary.layers_text(names, Assignment((8, 2, 4, 4, 4, 4, 4, 4, 4, 8)))
    assert text.splitlines() == [
        "  2 bits, 1 of 10 layers: layer1",
        "  4 bits, 7 of 10 layers: layer2, layer3, layer4, layer5, layer6, layer7 and 1 more",
        "  8 bits, 2 of 10 layers: layer0, layer9",
    ]
    assert summary.layers_text(names[:2], Assignment((4, 4), (8, 4))).splitlines() == [
        "  4/4 bits, 1 of 2 layers: layer1",
        "  4/8 bits, 1 of 2 layers: layer0",
    ]
