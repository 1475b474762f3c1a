"""A tile kind is two files, one for its shape and cost and one for its measurement. The rest knows kinds only through them."""

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from clado.errors import ConfigurationError
from clado.measuring.kinds import TileKind, tile_kind, tile_kinds
from clado.measuring.pair_kind import PairKind
from clado.measuring.plan import Plan, Workload, sample_blocks
from clado.plugins import available
from clado.space import Layer, SearchSpace

ROOT = Path(__file__).parents[2]
SPACE = SearchSpace.uniform([Layer(f"layer{i}.weight", (4, 4), "linear", macs=16) for i in range(3)], (2, 4)).blocked(
    [["layer[02]*"]]
)
PLAN = Plan(SPACE, sample_blocks(10, 2), tuple(tile_kinds()), rows_per_tile=4)
WORKLOAD = Workload(48, (48, 32, 16))
EVERY = pytest.mark.parametrize("kind", tile_kinds().values(), ids=list(tile_kinds()))
HALVES_KIND = '''
"""Halves of the losses of the float network: an example."""

from clado.measuring.kinds import TileKind


class Halves(TileKind):
    """Half of the loss."""

    name = "halves"
    order = 25
    dimensions = ("half",)

    def shape(self, space):
        """(2,)."""
        return (2,)

    def evaluations(self, plan, tile):
        """One."""
        return 1


kind = Halves()
'''
HALVES_MEASUREMENT = '''
"""Halves of the losses of the float network."""

import numpy as np


def measure(bench, tile):
    """(2,) halves of the loss."""
    losses = sum(float(part.loss(bench.packed_criterion)(part.float_logits).sum()) for part in bench.passes(tile.sample_block))
    return np.full(2, losses / 2)
'''
RUN_WITH_HALVES = """
import numpy as np, torch
from pathlib import Path
from torch import nn
from clado.measuring.kinds import tile_kinds
from clado.measuring.measurements import measure_tile
from clado.measuring.plan import Plan
from clado.measuring.workbench import Workbench
from clado.network.network import Network
from clado.quantization.preparation import Recipe, prepare
from clado.quantization.quantizers import WeightQuantizer
from clado.storage.measurement_store import MeasurementStore
network = Network(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.randn(2, 1, 4, 4))
space, x, y = network.search_space((2, 4)), torch.randn(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
prepared, blocks = prepare(network, space, Recipe(WeightQuantizer())), ((0, 4), (4, 6))
bench = Workbench(prepared, "cross_entropy", blocks, lambda a, b: (x[a:b], y[a:b]))
plan = Plan(space, blocks, ("pairs", "halves", "singles"), 1)
assert [tile.kind for tile in plan.tiles][:4] == ["singles", "singles", "halves", "halves"]
assert list(tile_kinds())[:4] == ["singles", "plain_singles", "halves", "pairs"]
store = MeasurementStore.create(Path("store.zarr"), plan, {}, {"blocks": blocks}, {})
for tile in store.missing(plan):
    store.write(tile, measure_tile(bench, tile))
sums = store.gather(plan)
assert store.damaged(plan.tiles) == []
assert sums["halves"].shape == (2, 2)
np.testing.assert_allclose(2 * sums["halves"][:, 0], sums["singles"][:, 0], rtol=1e-12)
"""


def test_kinds_come_in_the_order_of_the_store_and_tiles_of_rows_come_last():
    assert tuple(tile_kinds()) == ("singles", "plain_singles", "pairs", "gram", "block_pairs", "gradients", "trace")
    first_tiles = [tile.kind for tile in PLAN.tiles if (tile.sample_block, tile.number) == (0, 0)]
    assert first_tiles == ["singles", "plain_singles", "gram", "gradients", "trace", "pairs", "block_pairs"]
    assert len({kind.order for kind in tile_kinds().values()}) == len(tile_kinds())


def test_every_kind_has_both_files():
    assert set(available("kinds")) == set(available("measurements")) == set(tile_kinds())
    for name in tile_kinds():
        assert callable(import_module(f"clado.measuring.measurements.{name}").measure)


@EVERY
def test_a_kind_describes_itself(kind: TileKind):
    assert kind.dimensions
    assert len(kind.shape(SPACE)) == len(kind.dimensions)
    assert kind.contained_in in (None, *tile_kinds())
    assert kind.has_row_tiles == isinstance(kind, PairKind)
    tiles = [tile for tile in PLAN.tiles if tile.kind == kind.name]
    assert all(bool(tile.rows) == kind.has_row_tiles for tile in tiles)
    for tile in tiles:
        assert kind.evaluations(PLAN, tile) >= 0
        assert isinstance(kind.macs(PLAN, tile, WORKLOAD), int)
    assert sum(PLAN.evaluations(tile) for tile in tiles) > 0
    assert kind.backwards(PLAN) >= 0


def test_an_unknown_kind_is_named():
    with pytest.raises(ConfigurationError, match=r"unknown tile kind 'singels'; expected one of .*did you mean 'singles'"):
        tile_kind("singels")


def test_pairs_of_blocks_are_among_all_pairs():
    every, within = (kind.mask(SPACE) for kind in tile_kinds().values() if isinstance(kind, PairKind))
    assert (every & within == within).all()
    assert (every.sum(), within.sum()) == (12, 4)
    assert (within.any(1) == np.array([True, True, False, False, False, False])).all()


def test_plan_store_and_sweep_name_no_kind():
    quoted = re.compile("|".join(f"[\"']{name}[\"']" for name in tile_kinds()))
    files = [ROOT / "clado/storage/measurement_store.py", *(ROOT / "clado/measuring").glob("*.py")]
    files += [ROOT / f"clado/measuring/{folder}/__init__.py" for folder in ("kinds", "measurements")]
    assert len(files) > 8
    assert [(file.name, quoted_names) for file in files if (quoted_names := quoted.findall(file.read_text()))] == []


def test_two_files_make_a_kind_that_is_planned_measured_and_stored(tmp_path):
    shutil.copytree(ROOT / "clado", tmp_path / "clado", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors", "*.npz"))
    (tmp_path / "clado/measuring/kinds/halves.py").write_text(HALVES_KIND)
    (tmp_path / "clado/measuring/measurements/halves.py").write_text(HALVES_MEASUREMENT)
    result = subprocess.run(
        [sys.executable, "-c", RUN_WITH_HALVES], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
