"""The memory limit is kept: the process grows by less than the limit while a tile is measured, and the numbers stay."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import numpy as np, torch
from torch import nn
from clado.measuring.measurements import measure_tile
from clado.measuring.workbench import Workbench, rows_per_tile
from clado.network.network import Network
from clado.measuring.plan import Plan, Tile
from clado.quantization.preparation import Recipe, prepare
from clado.quantization.quantizers import WeightQuantizer

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

torch.manual_seed(0)
torch.set_num_threads(1)
blocks = [part for _ in range(7) for part in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
images = torch.randn(16, 1, 64, 64)
network = Network(model, images[:1])
space = network.search_space((2, 4, 8))
for limit in (20, 40, 80):
    bench = Workbench(prepare(network, space, Recipe(WeightQuantizer("minmax"))), "kl_to_float", ((0, 16),),
                      lambda a, b: (images[a:b], None), memory_limit=limit * 10**6)
    plan = Plan(space, ((0, 16),), ("pairs",), rows_per_tile(network, space, bench.batching, limit * 10**6))
    measure_tile(bench, Tile("pairs", 0, 0, 0, 1))  # libraries' own buffers are there before
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
    before = status("VmRSS")
    sums = np.concatenate([measure_tile(bench, tile) for tile in plan.tiles])
    print(limit, plan.rows_per_tile, bench.batching.images_per_pass, (status("VmHWM") - before) / 1e6, repr(np.nansum(sums)))
"""


@pytest.mark.system
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
def test_a_tile_grows_the_process_by_less_than_the_limit_and_the_numbers_stay() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, cwd=ROOT, env=None, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 3
    for limit, _, _, grown, _ in rows:
        assert float(grown) <= float(limit), done.stdout
    assert int(rows[0][1]) < int(rows[2][1]), "the least limit is met by fewer rows"
    sums = [float(row[4].removeprefix("np.float64(").removesuffix(")")) for row in rows]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-5)
