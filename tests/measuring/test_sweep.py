"""Laws of measuring: every number of a tile is the loss of an independent run of the module with its weights replaced."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from clado import criteria
from clado.criteria.cross_entropy import cross_entropy
from clado.criteria.kl_to_float import kl_to_float
from clado.errors import ConfigurationError
from clado.grids import ActivationGrid, QuantizedLayer
from clado.measuring import workbench
from clado.measuring.kinds.gram import TEMPERATURES
from clado.measuring.measurements import measure_tile
from clado.measuring.plan import Plan, Tile, sample_blocks
from clado.measuring.scores import score_passes, scores
from clado.measuring.workbench import Workbench, network_batching
from clado.network.batch_size import CPU, MIN_BATCH
from clado.network.graph import Graph
from clado.network.network import Network
from clado.quantization.preparation import Prepared, Recipe, prepare
from clado.quantization.quantizers import WeightQuantizer
from clado.space import Assignment
from tests import tolerance
from tests.networks import (
    Attention,
    Branching,
    Normed,
    Recurrent,
    Residual,
    Tied,
    Tokens,
    Volume,
    build,
    images,
    labels,
    on_batch_statistics,
    rebuilt,
    replaced_logits,
)

pytestmark = pytest.mark.numeric

KINDS = (Residual, Attention, Tied, Recurrent, Volume, Normed)
NETWORKS = pytest.mark.parametrize("kind", KINDS)
NORMED = pytest.mark.parametrize("kind", [Residual, Normed, Tokens])
CRITERIA = pytest.mark.parametrize("criterion", ["kl_to_float", "cross_entropy"])
NUM_IMAGES = 12


@cache
def prepared_of(kind, graph: bool = True, within_reach: bool = False) -> Prepared:
    """Every layer rounded to nearest, another bias where it takes one, and a coarse grid for its input.

    `within_reach` of whole forwards are neither the inputs of attention nor a bias for a layer without one.
    """
    network = Network(build(kind), images(1), graph=graph)
    ready = prepare(network, network.search_space((2, 4)), Recipe(WeightQuantizer()))
    layers = []
    for option, layer in zip(ready.space.options, ready.layers, strict=True):
        name, old_bias = network.layers[option.layer].name, network.biases[option.layer]
        bias = None
        if network.places[option.layer].takes_bias and name not in ("second.weight", "again.weight"):  # used twice
            zeros = torch.zeros(network.layers[option.layer].num_channels)
            bias = torch.linspace(-0.2, 0.3, len(zeros if old_bias is None else old_bias)) / option.bits + (
                zeros if old_bias is None else old_bias
            )
        grid = ActivationGrid.of_range(-1.0 - 0.1 * option.layer, 1.3, option.bits)
        if within_reach:
            bias = None if old_bias is None else bias
            grid = None if "attention" in name else grid
        layers.append(QuantizedLayer(layer.weight, bias, grid, layer.grid))
    return replace(ready, layers=tuple(layers))


def bench(
    kind,
    criterion="kl_to_float",
    num_blocks=3,
    batch_images=16,
    graph=True,
    within_reach=False,
    batch_statistics=False,
    memory_limit=None,
) -> Workbench:
    x, y = images(NUM_IMAGES), labels(NUM_IMAGES)
    ready = prepared_of(kind, graph, within_reach)
    blocks = sample_blocks(NUM_IMAGES, num_blocks)
    return Workbench(ready, criterion, blocks, lambda a, b: (x[a:b], y[a:b]), batch_images, memory_limit, batch_statistics)


def reference_logits(bench: Workbench, assignment: Assignment, block: int) -> torch.Tensor:
    """The module itself with these layers: no graph, no store, no folding, weights quantized again."""
    x, _ = bench.load(*bench.sample_blocks[block])
    replaced = {}
    for i, (layer, bits) in enumerate(zip(bench.space.layers, assignment.bits, strict=True)):
        if bits is not None:
            weight = bench.prepared.network.weights[i]
            option_layer = bench.prepared.layers[bench.space.offsets[i] + bench.space.bit_widths[i].index(bits)]
            rounded = bench.prepared.recipe.quantizer.fake_quantize(weight, bits, layer.channel_axis)
            replaced[layer.name] = QuantizedLayer(rounded, option_layer.bias, option_layer.activation)
    model = rebuilt(bench.prepared.network.model, replaced)
    with torch.no_grad():
        logits: torch.Tensor = (on_batch_statistics(model) if bench.batch_statistics else model)(x)
    return logits


def reference(bench: Workbench, assignment: Assignment, block: int) -> np.ndarray:
    """Per-sample losses by the module itself."""
    _, y = bench.load(*bench.sample_blocks[block])
    floats = reference_logits(bench, bench.space.nothing, block)
    return criteria.bind(bench.criterion, floats, y)(reference_logits(bench, assignment, block)).numpy()


def check_tile(bench: Workbench, plan: Plan, sums: np.ndarray, block: int) -> None:
    """The law for `pairs`: each sum is Σ of the reference losses, within 1e-5 · max(1, loss) a sample."""
    k, n = bench.space.num_options, plan.num_images(block)
    for row in range(k):
        for column in range(k):
            if bench.space.options[row][0] >= bench.space.options[column][0]:
                assert np.isnan(sums[row, column])
                continue
            expected = reference(bench, bench.space.assignment([row, column]), block)
            assert abs(sums[row, column] - expected.sum()) <= n * tolerance.LOSS * max(1.0, expected.max())


@NETWORKS
@CRITERIA
def test_pairs_are_the_losses_of_whole_runs_with_both_weights_replaced(kind, criterion):
    b = bench(kind, criterion)
    plan = Plan(b.space, tuple(b.sample_blocks), ("pairs",), b.space.num_options)
    check_tile(b, plan, measure_tile(b, plan.row_tile("pairs", 1, 0)), 1)


def test_the_law_fails_for_a_wrong_entry():
    b = bench(Residual)
    plan = Plan(b.space, tuple(b.sample_blocks), ("pairs",), b.space.num_options)
    sums = measure_tile(b, plan.row_tile("pairs", 0, 0))
    sums[1, 7] += 1e-3
    with pytest.raises(AssertionError):
        check_tile(b, plan, sums, 0)


@NETWORKS
@pytest.mark.parametrize("part", ["bias", "activation"])
def test_the_law_fails_where_a_part_of_a_layer_is_forgotten(kind, part):
    b = bench(kind)
    plan = Plan(b.space, tuple(b.sample_blocks), ("pairs",), b.space.num_options)
    b.quantized = tuple(replace(layer, **{part: None}) for layer in b.quantized)
    with pytest.raises(AssertionError):
        check_tile(b, plan, measure_tile(b, plan.row_tile("pairs", 0, 0)), 0)


def test_the_law_fails_where_the_second_use_of_a_weight_is_forgotten(monkeypatch):
    b = bench(Recurrent)
    plan = Plan(b.space, tuple(b.sample_blocks), ("pairs",), b.space.num_options)
    check_tile(b, plan, measure_tile(b, plan.row_tile("pairs", 0, 0)), 0)
    run = Graph.run
    monkeypatch.setattr(Graph, "run", lambda *arguments: replace(run(*arguments), pending={}))
    with pytest.raises(AssertionError):
        check_tile(b, plan, measure_tile(b, plan.row_tile("pairs", 0, 0)), 0)


@NETWORKS
@CRITERIA
def test_whole_forwards_measure_the_same_numbers(kind, criterion):
    tiles = []
    for graph in (True, False):
        b = bench(kind, criterion, graph=graph, within_reach=True)
        plan = Plan(b.space, tuple(b.sample_blocks), ("singles", "pairs", "gram"), 3)
        tiles.append([measure_tile(b, tile) for tile in plan.tiles])
    for tile, resumed, whole in zip(plan.tiles, *tiles, strict=True):
        tolerance.assert_close_tile(tile.kind, whole, resumed, plan.num_images(tile.sample_block))


def test_a_network_without_a_graph_is_measured_by_whole_forwards():
    b = bench(Branching, graph=False, within_reach=True)
    plan = Plan(b.space, tuple(b.sample_blocks), ("pairs",), b.space.num_options)
    check_tile(b, plan, measure_tile(b, plan.row_tile("pairs", 2, 0)), 2)


@NETWORKS
@CRITERIA
def test_singles_are_the_losses_of_whole_runs(kind, criterion):
    b = bench(kind, criterion)
    plan = Plan(b.space, tuple(b.sample_blocks), ("singles",), b.space.num_options)
    sums = measure_tile(b, plan.tiles[2])
    expected = [reference(b, b.space.nothing, 2).sum()]
    expected += [reference(b, b.space.assignment([option]), 2).sum() for option in range(b.space.num_options)]
    tolerance.assert_close_losses(sums, expected, plan.num_images(2))


def check_gram(b: Workbench, sums: np.ndarray, block: int) -> None:
    """The law for `gram`: Σ uᵀ F u of the reference's changes of the logits, F at each temperature, Σ (p − y)ᵀ u before that,
    the losses before."""
    assert sums[0].tobytes() == measure_tile(b, Tile("singles", block)).tobytes()
    assert (sums[1:, 0] == 0).all()
    z = reference_logits(b, b.space.nothing, block).double()
    u = torch.stack([reference_logits(b, b.space.assignment([k]), block).double() - z for k in range(b.space.num_options)])
    p = z.softmax(-1)
    k, (n, classes) = b.space.num_options, z.shape
    assert len(sums) == 2 + k * len(TEMPERATURES)
    for number, temperature in enumerate(TEMPERATURES):
        q = (z / temperature).softmax(-1)
        fisher = torch.diag_embed(q) - q[:, :, None] * q[:, None, :]
        expected = torch.einsum("knc,ncd,lnd->kl", u, fisher, u).numpy()
        gram = sums[2 + number * k : 2 + (number + 1) * k, 1:]
        assert (np.abs(gram - expected) <= tolerance.of_gram(np.diag(expected), n, n * classes)).all()
        assert np.linalg.eigvalsh(gram)[0] >= -tolerance.of_eigenvalue(np.diag(gram), n * classes)
    y = torch.nn.functional.one_hot(b.load(*b.sample_blocks[block])[1], 4)
    slope = p - y if b.criterion == "cross_entropy" else torch.zeros_like(p)
    # |p − y| is at most √2, and u is a difference of two logits
    off = n * 2**0.5 * 2 * tolerance.FORWARD
    np.testing.assert_allclose(sums[1, 1:], torch.einsum("knc,nc->k", u, slope), rtol=0, atol=off)


@NETWORKS
@CRITERIA
def test_gram_is_the_gauss_newton_form_of_the_logits_changes(kind, criterion):
    b = bench(kind, criterion)
    plan = Plan(b.space, tuple(b.sample_blocks), ("gram",), b.space.num_options)
    sums = measure_tile(b, plan.tiles[1])
    check_gram(b, sums, 1)
    for row in (0, 1, 3, 3 + b.space.num_options, -1):
        wrong = sums.copy()
        wrong[row, 3] += 1e-2 * abs(sums[2:]).max()
        with pytest.raises(AssertionError):
            check_gram(b, wrong, 1)


def tiles_of(b: Workbench, rows: int | None = None) -> dict[str, np.ndarray]:
    """Everything about the first block, whatever the rows of a tile."""
    plan = Plan(b.space, tuple(b.sample_blocks), ("singles", "pairs", "gram"), rows or b.space.num_options)
    tiles = [tile for tile in plan.tiles if tile.sample_block == 0]
    return {kind: np.concatenate([measure_tile(b, t) for t in tiles if t.kind == kind]) for kind in plan.kinds}


@NETWORKS
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_row_tiles_and_batch_sizes_change_nothing_beyond_rounding(kind, rows):
    expected = tiles_of(bench(kind))
    for batch in (1, 7, 1000):
        for name, actual in tiles_of(bench(kind, batch_images=batch), rows).items():
            tolerance.assert_close_tile(name, actual, expected[name], NUM_IMAGES // 3)


@NETWORKS
def test_equal_settings_give_equal_bits(kind):
    tiles = []
    for _ in range(2):
        b = bench(kind)
        plan = Plan(b.space, tuple(b.sample_blocks), ("singles", "pairs", "gram"), b.space.num_options)
        tiles.append([measure_tile(b, tile) for tile in plan.tiles])
    for first, second in zip(*tiles, strict=True):
        assert first.tobytes() == second.tobytes()


@NETWORKS
def test_losses_of_an_assignment_are_those_of_the_module(kind):
    b = bench(kind)
    for assignment in (b.space.widest, b.space.narrowest, b.space.nothing.replace(2, 4)):
        tolerance.assert_close_losses(scores(b, assignment, 1).losses, reference(b, assignment, 1))


@NETWORKS
def test_scores_of_an_assignment_are_those_of_its_logits(kind):
    b = bench(kind)
    x, y = b.load(*b.sample_blocks[1])
    actual = scores(b, b.space.narrowest, 1)
    arguments = b.criterion, b.network.logits(x, b.chosen(b.space.narrowest)), b.network.logits(x), y
    # a softmax moves by no more than half of what its logits do, and a score by 2√2 of that
    np.testing.assert_allclose(actual.briers, criteria.brier(*arguments), rtol=0, atol=2**0.5 * tolerance.FORWARD)
    assert actual.hits.tolist() == criteria.hits(*arguments).tolist()


def test_losses_of_what_ships_are_against_the_float_network_too():
    b = bench(Normed)
    x, _ = b.load(*b.sample_blocks[1])
    changed = {"first.running_mean": torch.full((6,), 0.4)}
    shipped = b.prepared.network.updated(changed)
    layers = {b.space.layers[i].name: b.prepared.layers[b.space.offsets[i]] for i in range(b.space.num_layers)}
    logits = replaced_logits(rebuilt(b.prepared.network.model, layers), changed, x)
    expected = kl_to_float(logits, replaced_logits(build(Normed), {}, x))
    chosen = b.prepared.chosen(b.space.narrowest)
    for ships in ((shipped, chosen), shipped.folded_with(chosen)):
        tolerance.assert_close_losses(score_passes(b.criterion, *ships, b.passes(1)).losses, expected)


@pytest.mark.parametrize(("cache_bytes", "runs"), [(2**24, 1), (0, 3)])
def test_float_logits_are_computed_once_where_they_are_few(cache_bytes, runs, monkeypatch):
    monkeypatch.setattr(workbench, "FLOAT_LOGITS_BYTES", cache_bytes)
    b = bench(Normed)
    logits, calls = b.network.logits, []
    monkeypatch.setattr(b.network, "logits", lambda x, replaced=None: calls.append(replaced is None) or logits(x, replaced))
    losses = [[scores(b, b.space.narrowest, block).losses for block in (0, 1)] for _ in range(3)]
    assert sum(calls) == runs * len(b.passes(0)) + runs * len(b.passes(1))
    assert all(np.array_equal(x, y) for actual in losses for x, y in zip(actual, losses[0], strict=True))


@NETWORKS
def test_tiles_and_whole_forwards_take_batches_by_one_rule(kind):
    network = Network(build(kind), images(2))
    most = network.images_at_once
    tiles = network_batching(network, 10 * most)
    assert tiles.batch_images[0] == tiles.images_per_pass == most
    peak = network.places[0].cut.peak_bytes_per_image
    assert most in (CPU.most, MIN_BATCH) or most * peak <= CPU.fast_bytes < (most + 1) * peak


@pytest.mark.parametrize("rows", range(1, 11))
def test_blocks_that_interleave_are_measured_as_any_others(rows):
    """As those of a network that comes back to its first module."""
    b = bench(Residual)
    interleaved = replace(b.space, custom_blocks=((0,), (1, 4), (2, 3)))
    b.prepared = replace(b.prepared, space=interleaved)
    whole = measure_tile(b, Tile("block_pairs", 0, 0, 0, interleaved.num_options))
    plan = Plan(interleaved, tuple(b.sample_blocks), ("block_pairs",), rows)
    actual = np.concatenate([measure_tile(b, tile) for tile in plan.tiles if tile.sample_block == 0])
    tolerance.assert_close_losses(actual, whole, plan.num_images(0))
    assert np.isfinite(actual).sum() == 2 * 2 * 2


@NORMED
@CRITERIA
def test_on_batch_statistics_a_probe_is_the_module_with_its_batch_norms_in_training_on_the_block(kind, criterion):
    b = bench(kind, criterion, batch_statistics=True)
    plan = Plan(b.space, tuple(b.sample_blocks), ("singles", "pairs", "gram"), b.space.num_options)
    check_tile(b, plan, measure_tile(b, plan.row_tile("pairs", 1, 0)), 1)
    singles = measure_tile(b, plan.tiles[1])
    expected = [reference(b, b.space.nothing, 1).sum()]
    expected += [reference(b, b.space.assignment([option]), 1).sum() for option in range(b.space.num_options)]
    tolerance.assert_close_losses(singles, expected, plan.num_images(1))
    check_gram(b, measure_tile(b, plan.tiles[4]), 1)
    tolerance.assert_close_losses(scores(b, b.space.narrowest, 1).losses, reference(b, b.space.narrowest, 1))
    before = build(kind).state_dict()  # momentum has moved nothing
    assert all(torch.equal(tensor, before[name]) for name, tensor in b.prepared.network.model.state_dict().items())
    running = bench(kind, criterion)
    with pytest.raises(AssertionError):
        check_tile(b, plan, measure_tile(running, plan.row_tile("pairs", 1, 0)), 1)


@NORMED
@pytest.mark.parametrize("rows", [1, 4])
def test_on_batch_statistics_rows_and_batches_change_nothing_either(kind, rows):
    expected = tiles_of(bench(kind, batch_statistics=True))
    for batch in (1, 7, 1000):
        for name, actual in tiles_of(bench(kind, batch_images=batch, batch_statistics=True), rows).items():
            tolerance.assert_close_tile(name, actual, expected[name], NUM_IMAGES // 3)


def test_a_block_on_batch_statistics_needs_its_memory_at_once():
    network = prepared_of(Residual).network
    limit = next(n for n in range(10**4, 10**7, 10**4) if _images_within(network, n) == 2)
    with pytest.raises(
        ConfigurationError, match=r"a block of 4 images at once, and the memory limit holds 2; raise memory_limit_mb"
    ):
        bench(Residual, batch_statistics=True, memory_limit=limit)
    assert bench(Residual, memory_limit=limit).batching.images_per_pass == 2
    enough = next(n for n in range(10**4, 10**7, 10**4) if _images_within(network, n) == 4)
    assert bench(Residual, batch_statistics=True, memory_limit=enough).batching.images_per_pass == 4


def _images_within(network: Network, limit: int) -> int:
    try:
        return network_batching(network, 4, 16, limit).images_per_pass
    except ConfigurationError:
        return 0


def test_cross_entropy_and_kl_are_torchs_own():
    generator = torch.Generator().manual_seed(0)
    z, f, y = torch.randn(3, 5, 4, generator=generator), torch.randn(5, 4, generator=generator), labels(5)
    # four logits of up to about 4, in float64
    off = tolerance.of_sum(4, torch.float64) * 16
    expected = torch.stack([torch.nn.functional.cross_entropy(part.double(), y, reduction="none") for part in z])
    torch.testing.assert_close(cross_entropy(z, y), expected, rtol=0, atol=off)
    kl = torch.nn.functional.kl_div(
        z.double().log_softmax(-1), f.double().log_softmax(-1).expand(3, 5, 4), log_target=True, reduction="none"
    )
    torch.testing.assert_close(kl_to_float(z, f), kl.sum(-1), rtol=0, atol=off)
    assert float(kl_to_float(f, f).abs().max()) == 0.0
