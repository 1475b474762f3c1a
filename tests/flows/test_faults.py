"""Faults in measuring, counted: only what was lost is computed again, and the matrix is bit for bit that of a run without.

The phase with workers in this process; faults that need real processes are in tests/system/test_faults.py.
"""

import errno
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from clado.errors import MeasurementError, StoreError
from clado.measuring.plan import Tile
from clado.run.opened_run import open_run
from clado.settings.loading import parse_config
from flows import clusters, worker
from flows.phases.choose import estimate
from flows.phases.measure import Measurement, measure
from tests.running import config

SMALL = {
    "network": {
        "name": "resnet20_fashion_mnist",
        "fixed": ["conv1.weight", "layer1.[12].*", "layer[23].*"],  # three layers are left
    },
    "data": {"sensitivity_images": 4, "sample_blocks": 2, "calibration_images": 0, "validation_images": 50},
    "corrections": [],
    "budgets": {"average_bits": [3.0]},
}
ATTEMPTS = clusters.RETRIES + 1
Fault = Callable[[Tile, int], None]


@dataclass
class Phase:
    """Measuring in a folder, with every attempt at a tile counted; `fault(tile, attempt)` may raise before it is computed."""

    folder: Path
    attempts: Counter[Tile] = field(default_factory=Counter)

    @property
    def store(self) -> Path:
        return self.folder / "store.zarr"

    def run(self, fault: Fault = lambda tile, attempt: None) -> Measurement:
        self.attempts.clear()
        settings = parse_config(config(self.folder, **SMALL))
        run = open_run(settings)
        run.identity.open_store()
        whole = worker.run_tile

        def run_tile(document: dict[str, Any], tile: Tile) -> worker.Receipt:
            self.attempts[tile] += 1
            fault(tile, self.attempts[tile])
            return whole(document, tile)

        with pytest.MonkeyPatch.context() as patch, clusters.start(settings) as workers:
            patch.setattr(worker, "run_tile", run_tile)
            measurement = measure(run, workers)
        estimate(run, measurement.measured)
        return measurement

    def matrices(self) -> dict[str, bytes]:
        return {file.name: np.load(file)["values"].tobytes() for file in (self.folder / "matrices").iterdir()}

    def tiles(self) -> tuple[Tile, ...]:
        return open_run(parse_config(config(self.folder, **SMALL))).plan.tiles


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Phase:
    phase = Phase(tmp_path_factory.mktemp("undisturbed") / "run")
    phase.run()
    assert phase.attempts == dict.fromkeys(phase.tiles(), 1)
    assert set(phase.matrices()) == {"layerwise.npz", "pairwise.npz", "gauss_newton.npz"}
    return phase


@pytest.fixture
def phase(tmp_path) -> Phase:
    """A run that has not begun."""
    return Phase(tmp_path / "run")


@pytest.fixture
def finished_phase(undisturbed, tmp_path) -> Phase:
    """A copy of the measured run."""
    shutil.copytree(undisturbed.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "matrices")
    return Phase(tmp_path / "run")


def test_a_tile_that_fails_twice_and_then_succeeds_costs_two_attempts(phase, undisturbed):
    bad = Tile("gram", 1)

    def fault(tile: Tile, attempt: int) -> None:
        if tile == bad and attempt <= 2:
            raise RuntimeError("a passing fault")

    phase.run(fault)
    assert phase.attempts == {**dict.fromkeys(phase.tiles(), 1), bad: 3}
    assert phase.matrices() == undisturbed.matrices()


def no_room(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def end_of_memory(*arguments: Any) -> None:
    raise RuntimeError("not enough memory:\n you tried to allocate 9 bytes")


def not_finite(*arguments: Any) -> None:
    raise MeasurementError("block 1 has no finite loss")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            end_of_memory,
            MeasurementError,
            ["gram, sample block 1 failed 3 times", "RuntimeError: not enough memory: you", "is kept"],
        ),
        (not_finite, MeasurementError, ["block 1 has no finite loss"]),
    ],
)
def test_a_poison_tile_is_named_and_everything_else_is_kept(error, kind, words, phase, undisturbed):
    bad = Tile("gram", 1)

    def fault(tile: Tile, attempt: int) -> None:
        if tile == bad:
            error()

    with pytest.raises(kind) as told:
        phase.run(fault)
    assert all(text in str(told.value) for text in words), told.value
    assert phase.attempts[bad] == ATTEMPTS
    before = [tile for tile in phase.attempts if tile != bad]
    assert len(before) == phase.tiles().index(bad) > 0
    phase.run()
    assert phase.attempts == dict.fromkeys([tile for tile in phase.tiles() if tile not in before], 1)
    assert phase.matrices() == undisturbed.matrices()


@pytest.mark.parametrize("array", ["sums", "done"])
def test_a_full_disk_is_one_message_and_the_run_goes_on_when_there_is_room(array, phase, undisturbed, monkeypatch):
    whole, writes = zarr.Array.__setitem__, Counter()

    def setitem(self: zarr.Array, *arguments: Any) -> None:
        writes[self.name] += 1
        if self.name == f"/gram/{array}" and writes[self.name] > 1:
            no_room()
        whole(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(zarr.Array, "__setitem__", setitem)
        with pytest.raises(StoreError, match=r"gram, sample block 1 could not be written .*No space left.* make room"):
            phase.run()
    assert phase.attempts == {Tile("gram", 0): 1, Tile("gram", 1): ATTEMPTS}
    phase.run()
    assert phase.attempts == dict.fromkeys(phase.tiles()[1:], 1)
    assert phase.matrices() == undisturbed.matrices()


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "kind"), [(flip, "pairs"), (truncate, "gram"), (empty, "gram"), (Path.unlink, "pairs"), (Path.unlink, "gram")]
)
def test_a_chunk_that_is_damaged_is_the_only_one_measured_again(damage, kind, finished_phase, undisturbed):
    damage(finished_phase.store / kind / "sums" / "c" / "1" / "0" / "0")
    measurement = finished_phase.run()
    assert finished_phase.attempts == {next(t for t in finished_phase.tiles() if (t.kind, t.sample_block) == (kind, 1)): 1}
    assert any("1 damaged" in note for note in measurement.notes)
    assert finished_phase.matrices() == undisturbed.matrices()


@pytest.mark.parametrize(
    ("path", "damage", "again"),
    [
        ("gram/done/c/1/0", flip, [("gram", 1)]),
        ("gram/sums", shutil.rmtree, [("gram", 0), ("gram", 1)]),
        ("counts", shutil.rmtree, []),
    ],
)
def test_damage_beside_the_sums_costs_what_it_was_of_and_no_number(path, damage, again, finished_phase, undisturbed):
    """Each kind of damage is in tests/storage/test_measurement_store.py."""
    damage(finished_phase.store / path)
    finished_phase.run()
    assert finished_phase.attempts == dict.fromkeys([t for t in finished_phase.tiles() if (t.kind, t.sample_block) in again], 1)
    assert finished_phase.matrices() == undisturbed.matrices()


def test_damaged_metadata_is_refused_and_the_advice_works(finished_phase, undisturbed):
    empty(finished_phase.store / "pairs" / "sums" / "zarr.json")
    with pytest.raises(StoreError, match=rf"zarr.json is damaged .* delete {finished_phase.store}/pairs: .* measured again"):
        finished_phase.run()
    assert not finished_phase.attempts
    shutil.rmtree(finished_phase.store / "pairs")
    finished_phase.run()
    assert {tile.kind for tile in finished_phase.attempts} == {"pairs"}
    assert finished_phase.matrices() == undisturbed.matrices()


def test_what_is_whole_is_left_alone(finished_phase, undisturbed):
    before = {file: file.stat().st_mtime_ns for file in finished_phase.store.rglob("*")}
    finished_phase.run()
    assert not finished_phase.attempts
    assert {file: file.stat().st_mtime_ns for file in finished_phase.store.rglob("*")} == before
    assert finished_phase.matrices() == undisturbed.matrices()


def test_the_tiles_name_themselves():
    assert str(Tile("singles", 3)) == "the tile of singles, sample block 3"
    assert str(Tile("pairs", 0, 1, 8, 16)) == "the tile of pairs, sample block 0, rows 8 to 15"
