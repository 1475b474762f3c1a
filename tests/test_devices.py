"""Nothing of the CPU meets what is on another device: all is computed there as it would be on a GPU, with the same numbers."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clado.data.images import as_slice
from clado.evaluation import count, per_image
from clado.grids import QuantizedLayer
from clado.measuring.kinds import tile_kinds
from clado.measuring.measurements import measure_tile
from clado.measuring.plan import Plan, sample_blocks
from clado.measuring.scores import scores
from clado.measuring.workbench import Workbench
from clado.network.network import Network
from clado.plugins import available
from clado.quantization.preparation import Prepared, Recipe, calibration_batches, prepare
from clado.quantization.quantizers import WeightQuantizer
from tests import tolerance
from tests.contracts.correction import STATISTICS
from tests.elsewhere import ELSEWHERE, Reads, elsewhere, moved
from tests.networks import Attention, Normed, Residual, build, images, labels

pytestmark = pytest.mark.numeric

NETWORKS = pytest.mark.parametrize("kind", [Normed, Attention])
NUM_IMAGES = 8


def test_the_device_refuses_what_a_gpu_refuses() -> None:
    with elsewhere():
        x = torch.ones(3).to(ELSEWHERE)
        assert x.device == ELSEWHERE
        assert (2 * x + torch.tensor(1.0)).cpu().tolist() == [3, 3, 3]
        for wrong in (lambda: x + torch.ones(3), lambda: torch.stack([x, torch.ones(3)]), lambda: x.add_(torch.ones(3))):
            with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
                wrong()
        with pytest.raises((RuntimeError, TypeError)):
            x.numpy()
        y = torch.zeros(2, device=ELSEWHERE)
        y.copy_(torch.ones(2))
        assert y.sum().item() == 2


@cache
def network_of(kind) -> Network:
    return Network(build(kind), images(1))


def prepared(network: Network, corrections: tuple[str, ...] = (), **settings) -> Prepared:
    space = network.search_space((2, 4))
    recipe = Recipe(WeightQuantizer(settings.pop("quantizer", "mse"), **settings), corrections=corrections, adaround_steps=2)
    return prepare(network, space, recipe, calibration_batches(images(64)))


def check_alike(here: QuantizedLayer, moved_one: QuantizedLayer) -> None:
    assert moved_one.weight.device == ELSEWHERE
    for name in ("weight", "bias"):
        one, other = getattr(here, name), getattr(moved_one, name)
        assert (one is None) == (other is None)
        if one is not None:
            tolerance.assert_close(other.cpu(), one, STATISTICS)


@pytest.mark.parametrize("quantizer", available("quantizers"))
@pytest.mark.parametrize("settings", [{}, {"per_channel": False, "symmetric": False}], ids=["per channel", "per tensor"])
def test_layers_are_rounded_there(quantizer, settings) -> None:
    network = network_of(Residual)
    with elsewhere():
        moved_one = prepared(moved(network), quantizer=quantizer, **settings)
        for one, other in zip(prepared(network, quantizer=quantizer, **settings).layers, moved_one.layers, strict=True):
            check_alike(one, other)


@pytest.mark.parametrize("correction", available("corrections"))
def test_layers_are_corrected_there(correction) -> None:
    network = network_of(Normed)
    here = prepared(network, (correction,))
    with elsewhere():
        moved_one = prepared(moved(network), (correction,))
        if correction != "adaround":  # learned by gradients that such a device does not keep
            for one, other in zip(here.layers, moved_one.layers, strict=True):
                check_alike(one, other)
        shipped, chosen = moved_one.deployed(moved_one.space.narrowest)
        logits = shipped.logits(images(4).to(ELSEWHERE), chosen).cpu()
    plain, biases = here.deployed(here.space.narrowest)
    if correction != "adaround":
        tolerance.assert_close(logits, plain.logits(images(4), biases), STATISTICS)


def test_output_statistics_read_back_sums_alone() -> None:
    """Not the outputs: as often, however many batches they come in."""
    network = network_of(Residual)
    with elsewhere():
        place = moved(network)
        space, reads = place.search_space((2, 4)), {}
        for size in (64, 8):
            counts = []
            for corrections in ((), ("output_statistics",)):
                Reads.count = 0
                prepare(place, space, Recipe(corrections=corrections), calibration_batches(images(64), size))
                counts.append(Reads.count)
            reads[size] = counts[1] - counts[0]
    assert reads[8] == reads[64] > 0


def bench_of(ready: Prepared, statistics: bool = False) -> Workbench:
    x, y = images(NUM_IMAGES), labels(NUM_IMAGES)
    blocks = sample_blocks(NUM_IMAGES, 2)
    return Workbench(ready, "cross_entropy", blocks, lambda a, b: (x[a:b], y[a:b]), batch_statistics=statistics)


@NETWORKS
@pytest.mark.parametrize("statistics", [False, True], ids=["running", "batch"])
def test_tiles_are_measured_there(kind, statistics) -> None:
    network = network_of(kind)
    kinds = tuple(name for name in tile_kinds() if name not in ("gradients", "trace"))  # such a device keeps no gradients
    tiles, measured = {}, {}
    with elsewhere():
        for name, place in (("here", network), ("there", moved(network))):
            bench = bench_of(prepared(place), statistics)
            plan = Plan(bench.space, tuple(bench.sample_blocks), kinds, bench.space.num_options)
            tiles[name] = [measure_tile(bench, tile) for tile in plan.tiles]
            measured[name] = scores(bench, bench.space.narrowest, 0).losses
    tolerance.assert_close_losses(measured["there"], measured["here"])
    for tile, one, other in zip(plan.tiles, tiles["here"], tiles["there"], strict=True):
        tolerance.assert_close_tile(tile.kind, other, one, NUM_IMAGES // 2)


@NETWORKS
def test_pairs_are_read_back_once_a_layer(kind) -> None:
    """However many there are: a device computes on while nothing is asked of it."""
    network = network_of(kind)
    with elsewhere():
        reads = {}
        for bits in ((2, 4), (2, 3, 4, 6, 8)):
            place = moved(network)
            space = place.search_space(bits)
            bench = bench_of(prepare(place, space, Recipe()))
            plan = Plan(space, tuple(bench.sample_blocks), ("pairs",), space.num_options)
            measure_tile(bench, plan.tiles[0])
            Reads.count = 0
            measure_tile(bench, plan.tiles[0])
            reads[bits] = Reads.count
    assert set(reads.values()) == {space.num_layers - 1}


@pytest.mark.parametrize("num_vectors", [1, 5])
def test_no_number_of_a_trace_is_read_back_by_itself(num_vectors) -> None:
    ready = prepared(network_of(Normed))
    bench = replace(bench_of(ready), num_vectors=num_vectors)
    reads = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            reads.append(str(func) == "aten._local_scalar_dense.default")
            return func(*args, **(kwargs or {}))

    with Counted():
        measure_tile(bench, Plan(bench.space, tuple(bench.sample_blocks), ("trace",), bench.space.num_options).tiles[0])
    assert sum(reads) == 0


def test_activations_are_fitted_and_rounded_there() -> None:
    network = network_of(Normed)
    space = network.search_space((2, 4)).with_activations((4, 8))
    logits = {}
    with elsewhere():
        for name, place in (("here", network), ("there", moved(network))):
            ready = prepare(place, space, Recipe(), calibration_batches(images(64)))
            shipped, chosen = ready.deployed(space.narrowest)
            logits[name] = shipped.logits(images(4).to(place.device), chosen).cpu()
    tolerance.assert_close_but_for_ties(logits["there"], logits["here"])


@pytest.mark.parametrize("labelled", [True, False])
def test_accuracy_is_counted_there(labelled) -> None:
    """A batch's hits and its loss are read back, nothing else."""
    network = network_of(Normed)
    x, y = images(NUM_IMAGES), labels(NUM_IMAGES)
    data = as_slice((x, y) if labelled else x, image_shape=(1, 8, 8))
    with elsewhere():
        moved_one = prepared(moved(network))
        shipped = moved_one.deployed(moved_one.space.narrowest)
        Reads.count = 0
        counts = count(*shipped, data, 0, NUM_IMAGES, 4, moved_one.network)
        assert Reads.count <= 2 * (NUM_IMAGES // 4)
        each = per_image(*moved_one.deployed(moved_one.space.narrowest), data, 4, moved_one.network)
    ready = prepared(network)
    expected = count(*ready.deployed(ready.space.narrowest), data, 0, NUM_IMAGES, 4, network)
    assert replace(counts, loss=0.0) == replace(expected, loss=0.0)
    tolerance.assert_close_losses([counts.loss, each[0].sum()], [expected.loss] * 2, NUM_IMAGES)
