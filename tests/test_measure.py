"""Laws of measuring: every number of a tile is the loss of an independent run of the module with its weights replaced."""

import numpy as np
import pytest
import torch

from clado import criteria
from clado.measure import Workbench, losses, measure_tile
from clado.network import Network
from clado.probes import Plan, sample_blocks
from clado.quantizers import WeightQuantizer
from clado.space import Assignment
from tests.networks import Attention, Branching, Residual, Tied, Volume, build, images, labels, replaced_logits

NETWORKS = pytest.mark.parametrize("kind", [Residual, Attention, Tied, Volume])
CRITERIA = pytest.mark.parametrize("criterion", ["kl_to_float", "cross_entropy"])
NUM_IMAGES = 12


def bench(kind, criterion="kl_to_float", num_blocks=3, batch_images=16, graph=True) -> Workbench:
    network = Network(build(kind), images(1), graph=graph)
    x, y = images(NUM_IMAGES), labels(NUM_IMAGES)
    space = network.search_space((2, 4))
    blocks = sample_blocks(NUM_IMAGES, num_blocks)
    return Workbench(network, space, WeightQuantizer(), criterion, blocks, lambda a, b: (x[a:b], y[a:b]), batch_images)


def reference(bench: Workbench, assignment: Assignment, block: int) -> np.ndarray:
    """Per-sample losses by the module itself: no graph, no store, weights quantized again."""
    x, y = bench.load(*bench.blocks[block])
    weights = {
        layer.name: bench.quantizer.fake_quantize(bench.network.weights[i], bits, layer.channel_axis)
        for i, (layer, bits) in enumerate(zip(bench.space.layers, assignment.bits, strict=True))
        if bits is not None
    }
    model = bench.network.model
    logits, floats = replaced_logits(model, weights, x), replaced_logits(model, {}, x)
    return criteria.bind(bench.criterion, floats, y)(logits).numpy()


def check_tile(bench: Workbench, plan: Plan, sums: np.ndarray, block: int) -> None:
    """The law for `pairs`: each sum is Σ of the reference losses, within 1e-5 · max(1, loss) a sample."""
    k, n = bench.space.num_options, plan.block_images(block)
    for row in range(k):
        for column in range(k):
            if bench.space.options[row][0] >= bench.space.options[column][0]:
                assert np.isnan(sums[row, column])
                continue
            expected = reference(bench, bench.space.assignment([row, column]), block)
            assert abs(sums[row, column] - expected.sum()) <= n * 1e-5 * max(1.0, expected.max())


@NETWORKS
@CRITERIA
def test_pairs_are_the_losses_of_whole_runs_with_both_weights_replaced(kind, criterion):
    b = bench(kind, criterion)
    plan = Plan(b.space, tuple(b.blocks), ("pairs",), b.space.num_options)
    check_tile(b, plan, measure_tile(b, plan.pair_tile(1, 0)), 1)


def test_the_law_fails_for_a_wrong_entry():
    b = bench(Residual)
    plan = Plan(b.space, tuple(b.blocks), ("pairs",), b.space.num_options)
    sums = measure_tile(b, plan.pair_tile(0, 0))
    sums[1, 7] += 1e-3
    with pytest.raises(AssertionError):
        check_tile(b, plan, sums, 0)


@NETWORKS
@CRITERIA
def test_whole_forwards_measure_the_same_numbers(kind, criterion):
    tiles = []
    for graph in (True, False):
        b = bench(kind, criterion, graph=graph)
        plan = Plan(b.space, tuple(b.blocks), ("singles", "pairs", "gram"), 3)
        tiles.append([measure_tile(b, tile) for tile in plan.tiles])
    for resumed, whole in zip(*tiles, strict=True):
        np.testing.assert_allclose(whole, resumed, rtol=1e-4, atol=1e-5)


def test_a_network_without_a_graph_is_measured_by_whole_forwards():
    b = bench(Branching, graph=False)
    plan = Plan(b.space, tuple(b.blocks), ("pairs",), b.space.num_options)
    check_tile(b, plan, measure_tile(b, plan.pair_tile(2, 0)), 2)


@NETWORKS
@CRITERIA
def test_singles_are_the_losses_of_whole_runs(kind, criterion):
    b = bench(kind, criterion)
    plan = Plan(b.space, tuple(b.blocks), ("singles",), b.space.num_options)
    sums = measure_tile(b, plan.tiles[2])
    expected = [reference(b, b.space.nothing, 2).sum()]
    expected += [reference(b, b.space.assignment([option]), 2).sum() for option in range(b.space.num_options)]
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("criterion", ["kl_to_float", "cross_entropy"])
def test_gram_is_the_gauss_newton_form_of_the_logits_changes(criterion):
    b = bench(Residual, criterion)
    plan = Plan(b.space, tuple(b.blocks), ("gram",), b.space.num_options)
    sums = measure_tile(b, plan.tiles[0])
    x, y = b.load(*b.blocks[0])
    z = replaced_logits(b.network.model, {}, x).double()
    u = torch.stack([b.network.logits(x, b.weights(b.space.assignment([k]))).double() - z for k in range(b.space.num_options)])
    p = z.softmax(-1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    np.testing.assert_allclose(sums[1:], torch.einsum("knc,ncd,lnd->kl", u, fisher, u), rtol=1e-4, atol=1e-9)
    assert np.linalg.eigvalsh(sums[1:])[0] > -1e-9
    slope = p - torch.nn.functional.one_hot(y, 4) if criterion == "cross_entropy" else torch.zeros_like(p)
    np.testing.assert_allclose(sums[0], torch.einsum("knc,nc->k", u, slope), rtol=1e-4, atol=1e-9)


@NETWORKS
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_row_tiles_and_batch_sizes_change_nothing_beyond_rounding(kind, rows):
    whole = bench(kind)
    plan = Plan(whole.space, tuple(whole.blocks), ("pairs",), whole.space.num_options)
    expected = measure_tile(whole, plan.pair_tile(0, 0))
    for batch in (1, 7, 1000):
        b = bench(kind, batch_images=batch)
        cut = Plan(b.space, tuple(b.blocks), ("pairs",), rows)
        parts = [measure_tile(b, cut.pair_tile(0, number)) for number in range(cut.num_row_tiles)]
        np.testing.assert_allclose(np.concatenate(parts), expected, rtol=1e-5, atol=1e-5 * plan.block_images(0))


@NETWORKS
def test_equal_settings_give_equal_bits(kind):
    tiles = []
    for _ in range(2):
        b = bench(kind)
        plan = Plan(b.space, tuple(b.blocks), ("singles", "pairs", "gram"), b.space.num_options)
        tiles.append([measure_tile(b, tile) for tile in plan.tiles])
    for first, second in zip(*tiles, strict=True):
        assert first.tobytes() == second.tobytes()


def test_losses_of_an_assignment_are_those_of_the_module():
    b = bench(Residual)
    for assignment in (b.space.widest, b.space.narrowest, b.space.nothing.replace(2, 4)):
        np.testing.assert_allclose(losses(b, assignment, 1), reference(b, assignment, 1), rtol=1e-5, atol=1e-7)


def test_cross_entropy_and_kl_are_torchs_own():
    z, f, y = torch.randn(3, 5, 4), torch.randn(5, 4), labels(5)
    expected = torch.stack([torch.nn.functional.cross_entropy(part.double(), y, reduction="none") for part in z])
    torch.testing.assert_close(criteria.cross_entropy(z, y), expected)
    kl = torch.nn.functional.kl_div(
        z.double().log_softmax(-1), f.double().log_softmax(-1).expand(3, 5, 4), log_target=True, reduction="none"
    )
    torch.testing.assert_close(criteria.kl_to_float(z, f), kl.sum(-1))
    assert float(criteria.kl_to_float(f, f).abs().max()) == 0.0
