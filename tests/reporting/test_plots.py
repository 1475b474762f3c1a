"""Pictures draw the record's numbers, and their labels are legible: none overlaps another, none is cut off, none is tiny."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from clado.interaction.matrix import InteractionMatrix
from clado.records.run_record import RunRecord
from clado.reporting import plots
from tests.synthetic import make_matrix, make_record, make_space, with_activations

SIZES = [1, 2, 22, 54]


def texts(figure: Figure) -> list[Text]:
    """The visible, non-empty texts of a drawn figure."""
    figure.canvas.draw()
    undrawn: set[Text] = set()  # matplotlib keeps labels of ticks beyond the limits, and does not draw them
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                undrawn |= set() if low <= tick.get_loc() <= high else {tick.label1, tick.label2}
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text) and text not in undrawn]
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


def assert_legible(figure: Figure) -> None:
    boxes = [(text.get_text(), text.get_window_extent(), text.get_fontsize()) for text in texts(figure)]
    width, height = figure.canvas.get_width_height()
    assert len(boxes) > 3
    for name, box, size in boxes:
        assert size >= 6.5, name
        assert box.x0 > -1, name
        assert box.y0 > -1, name
        assert box.x1 < width + 1, name
        assert box.y1 < height + 1, name
    for k, (name, box, _) in enumerate(boxes):
        for other_name, other, _ in boxes[k + 1 :]:
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            along = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert across < 1 or along < 1, f"{name!r} overlaps {other_name!r}"


def image_of(figure: Figure) -> np.ndarray:
    return np.asarray(figure.axes[0].images[0].get_array())


@pytest.mark.parametrize("num_layers", SIZES)
def test_heat_map_is_legible(num_layers: int) -> None:
    assert_legible(plots.heat_map(make_matrix(make_space(max(num_layers, 2)))))


@pytest.mark.parametrize("num_layers", SIZES[1:])
@pytest.mark.parametrize("draw", [plots.bits_per_layer, plots.accuracy_against_size, plots.loss_against_size])
def test_record_plots_are_legible(draw: object, num_layers: int) -> None:
    assert callable(draw)
    assert_legible(draw(make_record(num_layers)))


def test_the_legibility_check_can_fail() -> None:
    figure = plots.loss_against_size(make_record())
    figure.axes[0].text(0.5, 0.5, "one", transform=figure.axes[0].transAxes)
    figure.axes[0].text(0.5, 0.5, "two", transform=figure.axes[0].transAxes)
    with pytest.raises(AssertionError, match="overlaps"):
        assert_legible(figure)


def test_heat_map_shows_the_matrix_and_hides_what_no_choice_has() -> None:
    matrix = make_matrix(make_space())
    shown = np.ma.filled(image_of(plots.heat_map(matrix)), np.nan)
    hidden = matrix.in_layer_mask() & ~np.eye(len(matrix.values), dtype=bool)
    assert np.array_equal(np.isnan(shown), hidden)
    assert np.array_equal(shown[~hidden], matrix.values[~hidden])


def test_heat_map_hides_quarantined_options_and_forbidden_pairs() -> None:
    shown = np.ma.filled(
        image_of(plots.heat_map(replace(make_matrix(make_space()), quarantined=(4,), forbidden=((7, 20),)))), np.nan
    )
    assert np.isnan(shown[4]).all()
    assert np.isnan(shown[:, 4]).all()
    assert np.isnan(shown[7, 20])
    assert np.isnan(shown[20, 7])
    assert not np.isnan(shown[7, 21])


def test_heat_map_colours_are_centred_and_robust() -> None:
    matrix = make_matrix(make_space())
    figure = plots.heat_map(matrix)
    low, high = figure.axes[0].images[0].get_clim()
    assert low == -high
    assert high == plots.colour_limit(matrix)
    outlier = matrix.values.copy()
    outlier[0, 10] = outlier[10, 0] = 1e6
    assert plots.colour_limit(replace(matrix, values=outlier)) < 2 * high
    assert plots.colour_limit(replace(matrix, values=3 * matrix.values)) == pytest.approx(3 * high)


def test_heat_map_of_a_diagonal_and_of_zeros() -> None:
    space = make_space()
    diagonal = make_matrix(space, "layerwise")
    assert 0 < plots.colour_limit(diagonal) <= np.diag(diagonal.values).max()
    assert plots.colour_limit(replace(diagonal, values=np.zeros_like(diagonal.values))) == 1.0
    assert_legible(plots.heat_map(diagonal))


def test_heat_map_says_what_it_is() -> None:
    matrix = make_matrix(make_space(), "gauss_newton")
    words = " ".join(text.get_text() for text in texts(plots.heat_map(matrix)))
    for part in ("gauss_newton", "kl_to_float", "256 images", "2, 4, 8 bits", "twice the loss increase"):
        assert part in words
    ranking = " ".join(text.get_text() for text in texts(plots.heat_map(replace(matrix, ranking_only=True))))
    assert "is not a loss" in ranking


def test_tick_labels_stand_at_their_layers() -> None:
    space = make_space().restricted({"fc.weight": [8]})
    matrix = InteractionMatrix(space, np.eye(space.num_options), "pairwise", "kl_to_float", 0.0, 8)
    axes = plots.heat_map(matrix).axes[0]
    for i, (place, label) in enumerate(zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)):
        owners = {space.options[round(place + shift)][0] for shift in (-0.4, 0.4)}
        assert owners == {i}
        assert label.get_text() == plots.short_names(space.names)[i]


def test_bits_are_those_of_the_chosen_assignments() -> None:
    record = make_record()
    figure = plots.bits_per_layer(record)
    chosen = [result for result in record.results if result.method == "chosen"]
    written = {tuple(map(round, text.get_position()))[::-1]: text.get_text() for text in figure.axes[0].texts}
    colours = image_of(figure)
    of_bits: dict[int, set[tuple[float, ...]]] = {}
    for k, result in enumerate(chosen):
        for i, bits in enumerate(result.assignment.bits):
            assert bits is not None
            assert written[i, k] == str(bits)
            of_bits.setdefault(bits, set()).add(tuple(colours[i, k]))
    assert all(len(shades) == 1 for shades in of_bits.values())
    luminance = [np.dot(next(iter(of_bits[bits]))[:3], (0.299, 0.587, 0.114)) for bits in sorted(of_bits)]
    assert all(a - b > 0.1 for a, b in pairwise(luminance)), "wide bits are darker, so grey print works too"


@pytest.mark.parametrize(
    ("widths", "title"), [((), "resnet20_fashion_mnist"), ((8,), "activations at 8 bits"), ((4, 8), "weights/activations")]
)
def test_bits_of_activations_are_shown_where_they_differ(widths: tuple[int, ...], title: str) -> None:
    record = with_activations(make_record(), widths) if widths else make_record()
    figure = plots.bits_per_layer(record)
    assert figure.axes[0].get_title(loc="left").endswith(title)
    chosen = [result for result in record.results if result.method == "chosen"]
    written = {tuple(map(round, text.get_position()))[::-1]: text.get_text() for text in figure.axes[0].texts}
    for k, result in enumerate(chosen):
        for i, (bits, width) in enumerate(result.assignment.pairs):
            assert written[i, k] == (f"{bits}/{width}" if len(widths) > 1 else str(bits))
    assert_legible(figure)


def test_the_heat_map_says_the_order_of_pairs() -> None:
    space = make_space(6, (2, 4))
    for widths, said in (((8,), "in each layer 2, 4 bits from"), ((4, 8), "2/4, 2/8, 4/4, 4/8 bits of weights/activations from")):
        wide = space.with_activations(widths)
        matrix = InteractionMatrix(wide, np.eye(wide.num_options), "pairwise", "kl_to_float", 0.0, 8)
        assert any(said in text.get_text() for text in texts(plots.heat_map(matrix)))


@pytest.mark.parametrize(
    ("draw", "attribute"), [(plots.accuracy_against_size, "top1"), (plots.loss_against_size, "loss_deployed")]
)
def test_lines_hold_the_records_numbers(draw: object, attribute: str) -> None:
    record = make_record()
    assert callable(draw)
    lines = {line.get_label(): line for line in draw(record).axes[0].lines}
    for method in record.methods:
        rows = [result for result in record.results if result.method == method]
        expected = sorted(
            {
                (
                    row.size_bytes,
                    100 * (row.validation.top1 or 0) if attribute == "top1" and row.validation else row.loss_deployed,
                )
                for row in rows
            }
        )
        assert np.allclose(lines[method].get_xydata(), expected)
    if attribute == "top1":
        assert lines["float (3.18 MB)"].get_ydata()[0] == pytest.approx(93.12)


def test_a_collapsed_uniform_does_not_flatten_the_rest() -> None:
    record = make_record()
    results = tuple(
        replace(row, validation=replace(row.validation, top1=0.1)) if row.method == "uniform" and row.validation else row
        for row in record.results
    )
    figure = plots.accuracy_against_size(replace(record, results=results))
    assert figure.axes[0].get_ylim()[0] > 40
    assert any("uniform 10.0 %" in text.get_text() for text in texts(figure))
    assert_legible(figure)


def test_colours_differ_for_any_number_of_methods() -> None:
    methods = ("uniform", "layerwise", "pairwise", "gauss_newton", "hawq", "mpqco", "fisher", "blockwise", "chosen")
    lines = plots.loss_against_size(make_record(methods=methods)).axes[0].lines
    looks = {(to_rgba(line.get_color()), line.get_marker()) for line in lines}
    assert len(looks) == len(methods)


def test_short_names() -> None:
    assert plots.short_names(["a.weight", "b.weight", "c"]) == ["a", "b", "c"]
    assert plots.short_names(["a.weight", "a"]) == ["a.weight", "a"]


def without_accuracy(record: RunRecord) -> RunRecord:
    return replace(
        record,
        float_accuracy=replace(record.float_accuracy, top1=None),
        results=tuple(replace(result, validation=None) for result in record.results),
    )


def test_save_all_writes_whole_pictures(tmp_path: Path) -> None:
    record, matrix = make_record(), make_matrix(make_space())
    files = plots.save_all(record, {"pairwise": matrix}, tmp_path / "plots")
    names = ["heat_map_pairwise.png", "bits_per_layer.png", "accuracy_against_size.png", "loss_against_size.png"]
    assert [path.name for path in files] == names
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(names)
    for path in files:
        pixels = imread(path)
        assert min(pixels.shape[:2]) > 400
        assert pixels[..., :3].std() > 0.02
    files = plots.save_all(without_accuracy(record), {}, tmp_path / "fewer")
    assert [path.name for path in files] == ["bits_per_layer.png", "loss_against_size.png"]


def test_drawing_needs_no_pyplot() -> None:
    code = "import sys, clado.reporting.plots; sys.exit('matplotlib.pyplot' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
