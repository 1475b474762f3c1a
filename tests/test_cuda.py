"""On a CUDA device: the numbers of the CPU, whose own laws are in test_measure.py. Skipped where there is none.

Needs pytest, torch and NumPy alone, so that it runs on a bare GPU machine: pytest --noconftest tests/test_cuda.py
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from clado.exporting._torch_module import as_module
from clado.grids import QuantizedLayer
from clado.measuring.measurements import measure_tile
from clado.measuring.plan import Plan, sample_blocks
from clado.measuring.workbench import Workbench, rows_per_tile
from clado.network.network import Network, computing
from clado.quantization.preparation import Recipe, calibration_batches, prepare
from tests.networks import Attention, Normed, Recurrent, Residual, Tied, Volume, build, images, labels
from tests.tolerance import LOSS, assert_close_but_for_ties, assert_close_losses, of_forward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NUM_IMAGES = 12
KINDS = pytest.mark.parametrize("kind", [Residual, Attention, Tied, Recurrent, Volume, Normed])
SOME = pytest.mark.parametrize("kind", [Residual, Attention])
TILES = ("singles", "pairs", "gram")


def moved(layer: QuantizedLayer, device: str) -> QuantizedLayer:
    return replace(layer, weight=layer.weight.to(device), bias=None if layer.bias is None else layer.bias.to(device), grid=None)


def sums_on(device: str, kind, tiles=TILES, rows=None, batch_images=16, statistics=False, **settings) -> list[np.ndarray]:
    """Every tile of a network on a device; layers are quantized once, on the CPU, so that both devices round alike."""
    x, y = images(NUM_IMAGES), labels(NUM_IMAGES)
    plain = Network(build(kind), images(1))
    plain_layers = prepare(plain, plain.search_space((2, 4)), Recipe())
    model = build(kind).to(device)
    if settings.get("channels_last"):
        model = model.to(memory_format=torch.channels_last)
    network = Network(model, images(1).to(device), **settings)
    ready = replace(plain_layers, network=network, layers=tuple(moved(layer, device) for layer in plain_layers.layers))
    blocks = sample_blocks(NUM_IMAGES, 3)
    bench = Workbench(ready, "cross_entropy", blocks, lambda a, b: (x[a:b], y[a:b]), batch_images, batch_statistics=statistics)
    plan = Plan(ready.space, blocks, tiles, rows or ready.space.num_options)
    return [measure_tile(bench, tile) for tile in plan.tiles]


def check_equal(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Sums over four images: within 1e-5 · max(1, loss) for each of them."""
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(np.isnan(one), np.isnan(other))
        assert np.nanmax(np.abs(one - other) / np.maximum(1, np.abs(other))) <= 4 * LOSS


@KINDS
def test_every_tile_has_the_numbers_of_the_cpu(kind) -> None:
    check_equal(sums_on("cuda", kind), sums_on("cpu", kind))


@SOME
def test_channels_last_changes_nothing_beyond_rounding(kind) -> None:
    check_equal(sums_on("cuda", kind, channels_last=True), sums_on("cpu", kind))


@SOME
def test_rows_and_batches_change_nothing_beyond_rounding(kind) -> None:
    expected = np.concatenate(sums_on("cuda", kind, ("pairs",)))
    for rows, batch in ((1, 1), (3, 7), (4, 1000)):
        actual = np.concatenate(sums_on("cuda", kind, ("pairs",), rows, batch))
        check_equal([actual], [expected])


@SOME
def test_equal_settings_give_equal_bits(kind) -> None:
    for one, other in zip(sums_on("cuda", kind), sums_on("cuda", kind), strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("kind", [Residual, Normed])
def test_batch_statistics_are_those_of_the_cpu(kind) -> None:
    check_equal(sums_on("cuda", kind, statistics=True), sums_on("cpu", kind, statistics=True))


def test_float32_is_without_tf32_and_what_the_process_had_chosen_comes_back() -> None:
    """TF32 keeps ten bits: large enough a network shows it."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    try:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 64, 3),
            torch.nn.ReLU(),
            torch.nn.Conv2d(64, 64, 3),
            torch.nn.Flatten(),
            torch.nn.Linear(64 * 144, 8),
        ).cuda()
        x = torch.randn(8, 3, 16, 16, device="cuda")
        exact = Network(model.double(), x.double()).logits(x.double())
        model.float()
        far = {
            mode: float((Network(model, x, numeric=mode).logits(x) - exact).abs().max())
            for mode in ("float32", "tf32", "bfloat16")
        }
        assert far["float32"] < of_forward(3, 64 * 144)
        assert 1e-4 < far["tf32"] < far["bfloat16"]
        assert torch.backends.cudnn.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize(
    "corrections", [("gptq", "output_statistics"), ("adaround",), ("equalization", "batchnorm_reestimation")]
)
def test_corrections_are_those_of_the_cpu_beyond_ties(corrections) -> None:
    """Codes may differ where a weight lies midway; outputs are as near to the float layer's."""
    errors = {}
    for device in ("cpu", "cuda"):
        x = images(64).to(device)
        network = Network(build(Normed).to(device), x[:1])
        ready = prepare(
            network, network.search_space((2, 4)), Recipe(corrections=corrections, adaround_steps=100), calibration_batches(x)
        )
        shipped, chosen = ready.deployed(ready.space.narrowest)
        errors[device] = float((shipped.logits(x, chosen) - network.logits(x)).square().mean())
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.1)


def test_memory_stays_within_the_limit() -> None:
    """The device's own peak, beyond what was there before."""
    torch.manual_seed(0)
    blocks = [part for _ in range(7) for part in (torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.ReLU())]
    head = (torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4))
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), *blocks, *head).cuda()
    x = torch.randn(16, 1, 64, 64)
    network = Network(model, x[:1].cuda())
    ready = prepare(network, network.search_space((2, 4, 8)), Recipe())
    peaks = []
    for limit in (20, 40, 80):
        bench = Workbench(ready, "kl_to_float", ((0, 16),), lambda a, b: (x[a:b], None), memory_limit=limit * 10**6)
        plan = Plan(ready.space, ((0, 16),), ("pairs",), rows_per_tile(network, ready.space, bench.batching, limit * 10**6))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        peaks.append(np.concatenate([measure_tile(bench, tile) for tile in plan.tiles]))
        assert torch.cuda.max_memory_allocated() - before < limit * 10**6
    for sums in peaks[1:]:
        assert_close_losses(sums, peaks[0], len(x))


@KINDS
def test_a_quantized_module_moves_to_the_gpu_and_back(kind) -> None:
    """Weights, added biases and grids of inputs all move."""
    network = Network(build(kind), images(1))
    space = network.search_space((2, 4)).with_activations((8,))
    prepared = prepare(network, space, Recipe(corrections=("output_statistics",)), [images(40, seed=3)])
    module, x = as_module(*prepared.deployed(space.narrowest)), images(6, seed=5)
    with torch.no_grad(), computing("float32", torch.device("cuda")):
        expected = module(x)
        assert_close_but_for_ties(module.to("cuda")(x.to("cuda")).cpu(), expected)
        assert torch.equal(module.to("cpu")(x), expected)
