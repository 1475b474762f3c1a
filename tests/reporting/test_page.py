"""The page of a run shows the record. It loads nothing, escapes all texts, and shows no credentials."""

import json
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clado.errors import StoreError
from clado.records.run_record import RunRecord
from clado.records.text import percent, size_text
from clado.reporting import glossary, page, plots, tables
from tests.synthetic import make_matrix, make_record, make_space, with_activations

ROOT = Path(__file__).parents[2]
EMPTY = {"meta", "link", "br", "img", "line", "path", "circle", "input"}  # HTML's elements without an end, and SVG's that we draw
NASTY = "<script>alert(1)</script>\"'&</script>"


@dataclass
class Parsed(HTMLParser):
    """Every element with its attributes, the text of the page, and the elements that were not closed in turn."""

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in EMPTY or self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open[-1:] == ["script"] else self.text).append(data)

    @property
    def flat(self) -> str:
        return " ".join(" ".join(self.text).split())

    @property
    def matrices(self) -> list[dict[str, Any]]:
        return json.loads(self.scripts[0])


def parsed(folder: Path) -> Parsed:
    html = Parsed()
    html.feed(page.write(folder).read_text(encoding="utf-8"))
    html.close()
    assert html.open == []
    return html


def make_run(folder: Path, record: RunRecord | None = None) -> Path:
    record = record or replace(
        make_record(),
        unsearched=(("conv1.bias", 64, "a bias"), ("bn1.weight", 128, "batch norm"), ("bn1.bias", 128, "batch norm")),
        provenance={"torch": "2.15.0", "weights_sha256": "fe" * 32},
        data={"sensitivity_set": {"num_images": 256, "sha256": "ab" * 32}},
    )
    record.save(folder / "record.json")
    for name in ("layerwise", "pairwise"):
        make_matrix(make_space(), name).save(folder / "matrices" / f"{name}.npz")
    (folder / "config.yaml").write_text("tracking:\n  uri: postgresql://me:hunter2@db/mlflow?sslpassword=hunter2\n")
    return folder


def test_it_says_what_the_record_holds(tmp_path: Path) -> None:
    record = RunRecord.load(make_run(tmp_path) / "record.json")
    html = parsed(tmp_path)
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", (tmp_path / "report.html").read_text())
    for result in record.results:
        assert result.validation is not None
        assert {size_text(result.size_bytes), percent(result.validation.top1), tables.loss_text(result.loss_deployed)} <= set(
            cells
        )
    for text in (tables.verdict(record), tables.caption(record), tables.winners(record), tables.solver_line(record)):
        assert " ".join(text.split()) in html.flat
    for text in (
        "3 parameters are not searched, 320 bytes",
        "batch norm: 2 parameters, 256 bytes",
        "a bias: 1 parameters, 64 bytes",
    ):
        assert text in html.flat
    for text in (record.fingerprint, "2.15.0", "fe" * 32, f"256 images, sha256 {'ab' * 32}", "activations are not quantized"):
        assert text in html.flat


def test_it_explains_its_words_as_the_glossary_does(tmp_path: Path) -> None:
    html = parsed(make_run(tmp_path))
    assert all(f"{word} {meaning}" in html.flat for word, meaning in glossary.WORDS.items())
    assert (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8") == glossary.page()


def test_it_needs_nothing_from_outside(tmp_path: Path) -> None:
    html = parsed(make_run(tmp_path))
    source = (tmp_path / "report.html").read_text()
    targets = [
        value for _, attributes in html.elements for name, value in attributes.items() if name in ("src", "href", "xlink:href")
    ]
    assert targets
    assert all(target == "data:," or str(target).startswith("#") for target in targets)
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest|import\(", source)
    [policy] = [a["content"] for tag, a in html.elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none';")
    names = {a["id"] for _, a in html.elements if a.get("id")}
    assert {str(target)[1:] for target in targets if str(target).startswith("#")} <= names


def test_what_it_is_given_stays_text(tmp_path: Path) -> None:
    record = make_record(network=NASTY)
    names = (f"{NASTY}.weight", *record.layer_names[1:])
    nasty = replace(record, layer_names=names, notes=(NASTY,), provenance={"device": NASTY}, unsearched=((NASTY, 4, NASTY),))
    make_run(tmp_path, nasty)
    space = make_space()
    space = replace(space, layers=(replace(space.layers[0], name=names[0]), *space.layers[1:]))
    make_matrix(space).save(tmp_path / "matrices" / "pairwise.npz")
    html = parsed(tmp_path)
    assert len(html.scripts) == 2
    assert "alert(1)" not in html.scripts[1]
    assert html.flat.count(NASTY) >= 5
    assert html.matrices[1]["layers"][0] == [NASTY, 3]


def test_no_secret_is_in_it(tmp_path: Path) -> None:
    html = parsed(make_run(tmp_path))
    assert "postgresql://***@db/mlflow" in html.flat
    assert "hunter2" not in (tmp_path / "report.html").read_text()


def test_the_script_gets_the_matrix(tmp_path: Path) -> None:
    html = parsed(make_run(tmp_path))
    assert [matrix["name"] for matrix in html.matrices] == ["layerwise", "pairwise"]
    matrix = make_matrix(make_space())
    values = np.array(html.matrices[1]["values"], dtype=float)
    outside = matrix.in_layer_mask() & ~np.eye(len(matrix.values), dtype=bool)
    assert np.array_equal(np.isnan(values), outside)
    np.testing.assert_allclose(values[~outside], matrix.values[~outside], rtol=1e-3)
    for k, expected in enumerate((make_matrix(make_space(), "layerwise"), matrix)):
        assert html.matrices[k]["limit"] == pytest.approx(plots.colour_limit(expected))
    assert html.matrices[1]["layers"][-1] == ["fc", 3]
    assert html.matrices[1]["bits"][:3] == ["2", "4", "8"]


def test_marks_lie_where_the_numbers_say() -> None:
    record = make_record()
    accuracy, loss = page.charts(record)
    for chart, up in ((accuracy, True), (loss, False)):
        assert [line.method for line in chart.lines] == list(record.methods)
        for line in chart.lines:
            points = [(point.x, point.y) for point in line.points]
            assert points == sorted(points, key=lambda point: point[0])
            assert [y for _, y in points] == sorted((y for _, y in points), reverse=up)
            assert all(page.LEFT <= x <= page.WIDTH and 0 <= y <= page.HEIGHT for x, y in points)
    assert [point.below for line in accuracy.lines if line.method == "uniform" for point in line.points] == [True, False]
    assert accuracy.reference is not None
    assert accuracy.reference < min(point.y for line in accuracy.lines for point in line.points)


@pytest.mark.parametrize(
    "record",
    [
        make_record(budgets=()),
        make_record(budgets=(3.0,), methods=("uniform",)),
        with_activations(make_record(), (4, 8)),
        replace(make_record(), results=tuple(replace(result, validation=None) for result in make_record().results)),
        replace(make_record(), results=tuple(replace(result, loss_deployed=0.0) for result in make_record().results)),
    ],
    ids=["no results", "one result", "activations", "no labels", "no loss"],
)
def test_odd_records_have_a_page(record: RunRecord, tmp_path: Path) -> None:
    make_run(tmp_path, record)
    assert tables.verdict(record) in parsed(tmp_path).flat


def test_what_has_no_finite_loss_is_no_zero_in_the_map(tmp_path: Path) -> None:
    space = make_space()
    matrix = replace(make_matrix(space), quarantined=(4,), forbidden=((7, 20),), ranking_only=True)
    matrix.save(tmp_path / "hawq.npz")
    drawing = page.heat_map(tmp_path / "hawq.npz")
    values = drawing["values"]
    assert {*values[4], *(row[4] for row in values), values[7][20], values[20][7]} == {None}
    assert values[0][20] is not None
    assert drawing["ranking_only"]
    replace(matrix, quarantined=(), forbidden=(), ranking_only=False).save(tmp_path / "pairwise.npz")
    whole = page.heat_map(tmp_path / "pairwise.npz")
    assert whole["values"][4][4] is not None
    assert not whole["ranking_only"]


def test_a_run_without_matrices_and_provenance_has_a_page(tmp_path: Path) -> None:
    replace(make_record(), unsearched=(), provenance={}, data={}).save(tmp_path / "record.json")
    text = parsed(tmp_path).flat
    assert "The run kept no matrix." in text
    assert "were not recorded" in text


def test_a_damaged_or_unfinished_run_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not the record of a finished run"):
        page.write(tmp_path)
    make_run(tmp_path)
    whole = (tmp_path / "matrices" / "pairwise.npz").read_bytes()
    for content in (b"PK nothing", b"", whole[: len(whole) // 2]):
        (tmp_path / "matrices" / "pairwise.npz").write_bytes(content)
        with pytest.raises(StoreError, match=r"pairwise\.npz is damaged"):
            page.write(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_methods_have_the_colours_of_the_plots() -> None:
    assert {name: colour for name, (colour, _) in plots.STYLES.items() if name not in ("uniform", "chosen")} == {
        name: colour for name, colour in page.COLOURS.items() if name not in ("uniform", "chosen")
    }


def test_a_run_writes_its_page(finished) -> None:
    text = (finished.folder / "report.html").read_text()
    record = RunRecord.load(finished.folder / "record.json")
    assert record.fingerprint in text
    assert record.provenance["weights_sha256"] in text
    assert record.data["sensitivity_set"]["num_images"] == record.data["decision_set"]["num_images"] == 16
    assert all(name in text for name, _, _ in record.unsearched)
    assert record.unsearched
