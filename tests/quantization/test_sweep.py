"""Laws of the sweep over calibration images: what it gathers is what layers read, whatever the blocks, and within memory."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from clado.grids import ActivationGrid
from clado.network.network import Network
from clado.quantization import sweep
from clado.quantization.matrix_form import MatrixForm
from clado.quantization.moments import Moments, MomentSums, merged
from clado.quantization.preparation import Recipe, layer_inputs, sweeps
from clado.quantization.sweep import LayerInput, Sweep, calibration_blocks, groups_within_memory, joined, layer_forms
from tests import tolerance
from tests.contracts.rounding import EVERY_OPERATOR, sample
from tests.networks import Attention, Normed, Residual, Volume, build, calls_of, images

pytestmark = pytest.mark.numeric

KINDS = pytest.mark.parametrize("kind", [Residual, Attention, Volume, Normed])
CALIBRATION = images(96, seed=3)


def swept(network: Network, x: Tensor = CALIBRATION, **forms: object) -> dict[int, LayerInput]:
    """What all blocks show of every layer."""
    forms = {"moments": True, "values": True, **forms}
    layers = range(len(network.layers))
    parts = [Sweep(len(x), **forms).gather(network, x[a:b], a, layers) for a, b in calibration_blocks(len(x))]
    return {layer: joined([part[layer] for part in parts]) for layer in layers}


def assert_same_moments(actual: Moments, expected: Moments) -> None:
    """Rows are added in float32, and so are their products."""
    assert actual.count == expected.count
    spread = float((expected.products.diagonal(dim1=1, dim2=2).max() / expected.count).sqrt())  # at least the mean of |row|
    torch.testing.assert_close(actual.mean, expected.mean, rtol=0, atol=tolerance.of_sum(actual.count) * spread)
    off = tolerance.of_sum(actual.count) * float(expected.products.diagonal(dim1=1, dim2=2).max())
    torch.testing.assert_close(actual.scatter.double(), expected.scatter.double(), rtol=0, atol=off)


# -- a layer as a product of matrices -------------------------------------------------------------------------------------------


@EVERY_OPERATOR
def test_rows_times_columns_are_what_the_operator_gives(name):
    layer = sample(name)
    weight = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1))
    for x in layer.inputs:
        expected = layer.apply(x.double(), weight.double(), None)
        actual = layer.form.rows(x.double()) @ layer.form.columns(weight.double())
        # (groups, rows, channels) -> (rows, groups · channels), as an output has its channels
        actual = actual.transpose(0, 1).flatten(1)
        channels = expected.movedim(-1 if layer.layer.operator == "linear" else 1, -1).flatten(0, -2)
        terms = layer.form.num_columns
        tolerance.assert_close(actual, channels, tolerance.of_forward(2, terms, torch.float64), least=float(terms))
    assert torch.equal(layer.form.weight(layer.form.columns(weight)), weight)


@EVERY_OPERATOR
def test_chosen_rows_are_those_of_all_rows(name):
    layer = sample(name)
    x = layer.inputs[0]
    every = layer.form.rows(x)
    assert every.shape[1] == layer.form.num_rows(x)
    numbers = torch.randperm(every.shape[1], generator=torch.Generator().manual_seed(2))[:7]
    assert torch.equal(layer.form.rows(x, numbers), every[:, numbers])


# -- moments --------------------------------------------------------------------------------------------------------------------


def rows_of(count: int, offset: float, seed: int = 0) -> Tensor:
    """Correlated rows (2 groups, rows, 5 columns) around an offset."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, 5, generator=generator) @ torch.randn(2, 5, 5, generator=generator) + offset


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("sizes", [(40,), (1, 39), (13, 13, 14)])
def test_moments_are_those_of_all_rows_however_they_are_added(offset, sizes):
    rows = rows_of(40, offset)
    exact = rows.double()
    centred = exact - exact.mean(1, keepdim=True)
    expected = Moments(40, exact.mean(1), centred.mT @ centred)
    in_one = MomentSums()
    for part in rows.split(sizes, 1):
        in_one.add(part)
    apart = []
    for part in rows.split(sizes, 1):
        sums = MomentSums()
        sums.add(part)
        apart.append(sums.moments())
    # each row is off by the rounding of its own subtraction, relative to the offset, and centred rows add up in float32
    size = float(centred.abs().max())
    off = 40 * (2 * size * offset * tolerance.eps() + size**2 * tolerance.of_sum(40))
    for actual in (in_one.moments(), merged(apart)):
        assert actual.count == 40
        tolerance.assert_close(actual.mean, expected.mean, tolerance.of_sum(40), least=max(size, offset))
        torch.testing.assert_close(actual.scatter.double(), expected.scatter, rtol=0, atol=off)


def test_mean_variance_and_error_of_outputs_follow_from_the_moments():
    rows = rows_of(200, 1.5)
    columns = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(4))
    sums = MomentSums()
    sums.add(rows)
    moments = sums.moments()
    outputs = rows.double() @ columns.double()
    share = tolerance.of_sum(200) * 25
    tolerance.assert_close(moments.output_mean(columns), outputs.mean(1), share)
    tolerance.assert_close(moments.output_variance(columns), outputs.var(1, correction=0), share)
    form = (columns.double() * (moments.products @ columns.double())).sum((1, 2))
    tolerance.assert_close(form, outputs.square().sum((1, 2)), share)


def of_blocks(rows: Tensor, count: int) -> Moments:
    """Moments of rows (groups, rows, columns) that lie in so many blocks."""
    parts = []
    for part in rows.chunk(count, 1):
        sums = MomentSums()
        sums.add(part)
        parts.append(sums.moments())
    return merged(parts)


@pytest.mark.parametrize("count", [2, 8])
def test_the_noise_of_covariances_is_that_of_independent_rows_where_rows_are_independent(count):
    """The oracle takes each row as a sample (Schäfer and Strimmer 2005, section 2.4, without its factor n / (n − 1))."""
    generator = torch.Generator().manual_seed(6)
    rows = torch.randn(1, 96, 200, generator=generator) * torch.rand(200, generator=generator) + 3
    rows[..., 1:] += 0.3 * rows[..., :1]  # something that is no noise
    centred = (rows - rows.mean(1, keepdim=True))[0].double()
    products = centred[:, :, None] * centred[:, None, :]
    off = ~torch.eye(200, dtype=torch.bool)
    expected = float(products.var(0)[off].sum() / 96 / products.mean(0)[off].square().sum())
    assert 0.1 < expected < 0.9
    # a variance of so many blocks has the relative error √(2 / (blocks − 1)), over many pairs of columns
    assert float(of_blocks(rows, count).noise) == pytest.approx(expected, rel=(2 / (count - 1)) ** 0.5 / 10)


def test_covariances_of_many_rows_stay_and_variances_and_means_always_do():
    few, many = rows_of(16, 1.0), rows_of(2**15, 1.0)
    for rows, share in ((few, 1.0), (many, 1e-2)):
        moments = of_blocks(rows, 4)
        shrunk = moments.shrunk()
        assert torch.equal(shrunk.mean, moments.mean)
        assert torch.equal(*(m.scatter.diagonal(dim1=1, dim2=2) for m in (shrunk, moments)))
        off = ~torch.eye(5, dtype=torch.bool)
        ratios = shrunk.scatter[:, off] / moments.scatter[:, off]
        assert torch.allclose(ratios, (1 - moments.noise)[:, None].expand_as(ratios))
        assert ((moments.noise >= 0) & (moments.noise <= share)).all()
    one_block = of_blocks(few, 1)
    assert one_block.shrunk() is one_block  # nothing tells its noise


def test_rows_of_one_image_are_no_independent_sample():
    """Rows that repeat leave the noise as it is."""
    rows = torch.randn(1, 64, 300, generator=torch.Generator().manual_seed(7))
    noise = of_blocks(rows, 8).noise
    assert float(noise) > 0.9  # a row of each of few images says nothing of 300 columns
    tolerance.assert_close(of_blocks(rows.repeat_interleave(10, 1), 8).noise, noise, tolerance.of_sum(640) * 300)


# -- what a sweep gathers -------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "whole"])
def test_every_row_is_gathered_where_there_are_few(kind, graph, monkeypatch):
    monkeypatch.setattr(sweep, "FEWEST_ROWS", 2**20)
    network = Network(build(kind), images(1), graph=graph)
    inputs = swept(network)
    for i, layer in enumerate(network.layers):
        calls = calls_of(network, CALIBRATION, i)
        if not calls:
            assert inputs[i].arguments is None
            assert inputs[i].moments is None
            continue
        form = MatrixForm.of(layer, calls[0].arguments)
        sums = MomentSums()
        sums.add(form.rows(calls[0].input))
        assert_same_moments(inputs[i].moments, sums.moments())
        values = torch.cat([call.input.flatten() for call in calls])
        tolerance.assert_close(torch.stack(inputs[i].values.aminmax()), torch.stack(values.aminmax()))
        assert inputs[i].uses == len(calls)
        assert inputs[i].num_images == len(CALIBRATION)


@pytest.mark.parametrize("kind", [Residual, Normed])
def test_a_sample_of_rows_is_bounded_and_has_the_moments_of_all_within_its_error(kind, monkeypatch):
    network = Network(build(kind), images(1))
    monkeypatch.setattr(sweep, "FEWEST_ROWS", 2**20)
    every = swept(network)
    monkeypatch.setattr(sweep, "FEWEST_ROWS", 960)
    monkeypatch.setattr(sweep, "ROWS_PER_COLUMN", 1)
    for i, few in swept(network).items():
        all_rows, count = every[i].moments, few.moments.count
        assert count == min(all_rows.count, 960)  # ten rows of each of 96 images, or all there are
        deviation = (all_rows.scatter.diagonal(dim1=1, dim2=2) / all_rows.count).sqrt()
        # a mean of `count` of them: six standard errors; rows of one image are alike, at worst as one row
        off = 6 * deviation * max(count**-0.5, len(CALIBRATION) ** -0.5)
        assert bool(((few.moments.mean - all_rows.mean).abs() <= off + tolerance.FORWARD).all())


def test_images_read_different_positions_and_the_same_seed_the_same(monkeypatch):
    monkeypatch.setattr(sweep, "FEWEST_ROWS", 96)
    monkeypatch.setattr(sweep, "ROWS_PER_COLUMN", 0)
    network = Network(nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)).eval(), images(1))
    positions = torch.arange(256.0).reshape(1, 1, 16, 16).expand(96, 1, 16, 16)
    monkeypatch.setattr(sweep, "SAMPLED_ELEMENTS", 2**20)
    rows = [swept(network, positions, seed=seed)[0].rows.flatten() for seed in (0, 0, 1)]
    assert len(rows[0].unique()) == 96  # one of each image, and another of each
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


@KINDS
def test_how_images_are_batched_and_which_layers_are_swept_together_changes_nothing_but_rounding(kind, monkeypatch):
    network = Network(build(kind), images(1))
    whole = swept(network)
    monkeypatch.setattr(Network, "images_at_once", 7)
    for i, one in swept(network).items():
        assert_same_moments(one.moments, whole[i].moments)
    for layer in range(len(network.layers)):
        alone = Sweep(len(CALIBRATION), moments=True).gather(network, CALIBRATION, 0, [layer])
        assert alone.keys() == {layer}
        assert_same_moments(alone[layer].moments, merged([whole[layer].moments]))


@KINDS
def test_inputs_on_a_grid_have_the_moments_of_what_the_operator_then_reads(kind, monkeypatch):
    monkeypatch.setattr(sweep, "FEWEST_ROWS", 2**20)
    network = Network(build(kind), images(1))
    grids = {3: ActivationGrid.of_range(-1.0, 2.0, 3), 8: ActivationGrid.of_range(-2.0, 3.0, 8)}
    inputs = swept(network, moments=False, values=False, on_grids=True, grids=dict.fromkeys(range(len(network.layers)), grids))
    for i, layer in enumerate(network.layers):
        assert inputs[i].moments is None
        call = calls_of(network, CALIBRATION, i)[0]
        for width, grid in grids.items():
            sums = MomentSums()
            sums.add(MatrixForm.of(layer, call.arguments).rows(grid.fake_quantize(call.input)))
            moments = sums.moments()
            # a value between two codes goes to either: one of thousands, by a step
            off = tolerance.of_sum(moments.count) * float(moments.products.abs().max()) + 4 * grid.scale * grid.scale * 2**width
            torch.testing.assert_close(inputs[i].on_grid[width].products, moments.products, rtol=0, atol=off)


@pytest.mark.parametrize(
    ("corrections", "widths", "expected"),
    [
        ((), (), []),
        (("equalization", "batchnorm_reestimation"), (), []),
        (("gptq",), (), [(True, False, False)]),
        (("output_statistics",), (), [(True, False, False)]),
        ((), (8,), [(False, True, False)]),
        (("gptq",), (8,), [(True, True, False)]),
        (("gptq", "output_statistics"), (4, 8), [(True, True, False), (False, False, True)]),
    ],
)
def test_one_sweep_is_enough_and_a_second_only_for_what_matches_inputs_on_grids(corrections, widths, expected):
    network = Network(build(Residual), images(1))
    space = network.search_space((2, 4)).with_activations(widths)
    assert [(s.moments, s.values, s.on_grids) for s in sweeps(space, Recipe(corrections=corrections), 96)] == expected


def test_preparing_runs_each_image_once(monkeypatch):
    network = Network(build(Normed), images(1))
    sizes: list[int] = []
    observe = type(network.engine).observe
    monkeypatch.setattr(
        type(network.engine), "observe", lambda engine, x, *rest: sizes.append(len(x)) or observe(engine, x, *rest)
    )
    layer_inputs(network, network.search_space((2, 4, 8)), Recipe(corrections=("gptq", "output_statistics")), [CALIBRATION])
    assert sum(sizes) == len(CALIBRATION)


# -- blocks, groups, memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 31, 32, 63, 64, 100, 256, 257, 1024, 5000])
def test_blocks_cover_the_images_in_order_evenly_and_are_few(count):
    blocks = calibration_blocks(count)
    assert [image for start, stop in blocks for image in range(start, stop)] == list(range(count))
    sizes = [stop - start for start, stop in blocks]
    assert max(sizes) - min(sizes) <= 1
    assert len(blocks) <= sweep.MOST_BLOCKS
    assert min(sizes) >= min(count // 2, sweep.BLOCK_IMAGES)
    assert len(blocks) >= min(2, count)


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ({}, 10, []),
        ({0: 4, 1: 4, 2: 4}, 12, [(0, 1, 2)]),
        ({0: 4, 1: 4, 2: 4}, 11, [(0, 1), (2,)]),
        ({3: 50, 5: 1, 7: 9, 8: 2}, 10, [(3,), (5, 7), (8,)]),
    ],
)
def test_groups_keep_the_order_and_the_limit(sizes, limit, expected):
    assert groups_within_memory(sizes, limit) == expected


@KINDS
def test_the_moments_of_a_layer_take_the_bytes_that_are_planned(kind):
    network = Network(build(kind), images(1))
    forms = layer_forms(network)
    for layer, inputs in swept(network).items():
        blocks = replace(inputs.moments, scatter=inputs.moments.scatter.float())
        assert blocks.scatter.nbytes == sweep.moments_bytes(forms[layer])
        assert inputs.moments.count <= sweep.wanted_rows(forms[layer]) + len(CALIBRATION)
