"""Laws of the store: what is written is read back bit for bit, what is damaged is found, what is not ours is refused."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from clado.errors import IdentityMismatch, StoreError
from clado.measuring.kinds import tile_kind, tile_kinds
from clado.measuring.kinds.gram import TEMPERATURES
from clado.measuring.plan import Plan, Tile, sample_blocks
from clado.space import Layer, SearchSpace
from clado.storage.differences import differences
from clado.storage.measurement_store import MeasurementStore

SPACE = SearchSpace.uniform([Layer(f"layer{i}.weight", (4, 3, 3, 3), "conv2d") for i in range(4)], (2, 4, 8))
KINDS = tuple(tile_kinds())
PLAN = Plan(SPACE, sample_blocks(10, 3), KINDS, rows_per_tile=5)
LAYERS = [{"name": layer.name, "shape": [4, 3, 3, 3], "operator": "conv2d", "bits": [2, 4, 8]} for layer in SPACE.layers]
IDENTITY = {
    "weights": "abc",
    "layers": LAYERS,
    "quantizer": {"weights": "mse", "granularity": "per_channel"},
    "numeric": {"dtype": "float32"},
}
COVERAGE = {"blocks": [[0, 3], [3, 6], [6, 10]], "sensitivity_set": "123"}
PROVENANCE = {"torch": "2.8.0", "device": "cpu", "threads": 1}


def new_store(folder: Path, plan: Plan = PLAN) -> MeasurementStore:
    return MeasurementStore.create(folder / "store.zarr", plan, IDENTITY, COVERAGE, PROVENANCE)


def sums_of(tile: Tile) -> np.ndarray:
    """Made-up sums, other ones for each tile, with the NaNs that a `pairs` tile has."""
    kind = tile_kind(tile.kind)
    shape = kind.shape(SPACE)
    shape = (len(tile.rows), *shape[1:]) if kind.has_row_tiles else shape
    values = np.random.default_rng([KINDS.index(tile.kind), tile.sample_block, tile.number]).normal(size=shape)
    if kind.has_row_tiles:
        values[:, :2] = np.nan
    return values


def full_store(folder: Path) -> MeasurementStore:
    store = new_store(folder)
    for tile in PLAN.tiles:
        store.write(tile, sums_of(tile))
    return store


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def chunk_of(store: MeasurementStore, tile: Tile) -> Path:
    """The only file below sums/ that a tile's write changes: found by looking, not by the store's own rule."""
    where = store.path / tile.kind / "sums" / "c" / str(tile.sample_block)
    files = [path for path in where.rglob("*") if path.is_file()]
    return sorted(files)[tile.number]


def test_what_is_written_is_read_back_bit_for_bit_by_another_process_too(tmp_path):
    store = full_store(tmp_path)
    for again in (store, MeasurementStore.open(store.path)):
        for tile in PLAN.tiles:
            assert again.read(tile).tobytes() == sums_of(tile).tobytes()


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_gather_puts_every_tile_in_its_place_whatever_the_order_of_writing(tmp_path, order):
    store = new_store(tmp_path)
    for tile in PLAN.tiles if order == "forward" else PLAN.tiles[::-1]:
        store.write(tile, sums_of(tile))
    gathered = store.gather(PLAN)
    assert gathered.keys() == set(KINDS)
    k = SPACE.num_options
    assert {kind: array.shape for kind, array in gathered.items()} == {
        "singles": (3, 1 + k), "pairs": (3, k, k), "gram": (3, 2 + len(TEMPERATURES) * k, 1 + k), "block_pairs": (3, k, k),
        "gradients": (3, 2, 1 + k), "trace": (3, 1 + k), "plain_singles": (3, 1 + k),
    }  # fmt: skip
    for tile in PLAN.tiles:
        rows = slice(tile.first, tile.stop) if tile.rows else slice(None)
        assert gathered[tile.kind][tile.sample_block][rows].tobytes() == sums_of(tile).tobytes()
    assert store.counts.tolist() == [3, 3, 4]


def test_missing_is_what_was_not_written_in_the_plans_order(tmp_path):
    store = new_store(tmp_path)
    assert tuple(store.missing(PLAN)) == PLAN.tiles
    written = PLAN.tiles[1::3]
    for tile in written:
        store.write(tile, sums_of(tile))
    assert MeasurementStore.open(store.path).missing(PLAN) == [tile for tile in PLAN.tiles if tile not in written]
    with pytest.raises(StoreError, match=f"lacks {len(PLAN.tiles) - len(written)} of {len(PLAN.tiles)} tiles"):
        store.gather(PLAN)


@pytest.mark.parametrize("tile", PLAN.tiles, ids=str)
def test_a_tile_writes_one_chunk_of_its_own_and_its_done_cell(tmp_path, tile):
    store = new_store(tmp_path)
    before = files(store.path)
    store.write(tile, sums_of(tile))
    new = {name for name, content in files(store.path).items() if before.get(name) != content}
    assert len([name for name in new if name.startswith(f"{tile.kind}/sums/c/")]) == 1
    assert len([name for name in new if name.startswith(f"{tile.kind}/done/c/")]) == 1
    assert len(new) == 2
    missing = store.missing(PLAN)
    assert [t for t in PLAN.tiles if t not in missing] == [tile]


def test_no_two_tiles_share_a_chunk(tmp_path):
    full_store(tmp_path)
    for kind in KINDS:
        tiles = [tile for tile in PLAN.tiles if tile.kind == kind]
        chunks = [name for name in files(tmp_path / "store.zarr") if name.startswith(f"{kind}/sums/c/")]
        assert len(chunks) == len(tiles)


def test_writing_a_tile_again_changes_nothing(tmp_path):
    store = full_store(tmp_path)
    before = files(store.path)
    store.write(PLAN.tiles[-2], sums_of(PLAN.tiles[-2]))
    assert files(store.path) == before


@pytest.mark.parametrize("tile", [PLAN.tiles[0], PLAN.tiles[-1]], ids=str)
def test_a_tile_of_nans_is_not_a_missing_tile(tmp_path, tile):
    store = new_store(tmp_path)
    nans = np.full_like(sums_of(tile), np.nan)
    store.write(tile, nans)
    again = MeasurementStore.open(store.path)
    assert tile not in again.missing(PLAN)
    assert again.damaged([tile]) == []
    assert np.isnan(again.read(tile)).all()


def flip(position: float):
    def harm(chunk: Path) -> None:
        content = bytearray(chunk.read_bytes())
        content[int(position * (len(content) - 1))] ^= 0x10
        chunk.write_bytes(content)

    return harm


def truncate(share: float):
    return lambda chunk: os.truncate(chunk, int(share * chunk.stat().st_size))


HARMS = {
    "first byte flipped": flip(0),
    "middle byte flipped": flip(0.5),
    "last byte flipped": flip(1),
    "cut in half": truncate(0.5),
    "emptied": truncate(0),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("tile", [PLAN.tiles[1], PLAN.tiles[5], PLAN.tiles[-2]], ids=str)
@pytest.mark.parametrize("harm", HARMS.values(), ids=list(HARMS))
def test_damage_is_found_and_only_the_damaged_tile_is_measured_again(tmp_path, harm, tile):
    store = full_store(tmp_path)
    harm(chunk_of(store, tile))
    with pytest.raises(StoreError, match=r"damaged|missing"):
        store.read(tile)
    with pytest.raises(StoreError, match=r"damaged|missing"):
        store.gather(PLAN)
    assert store.damaged(PLAN.tiles) == [tile]
    assert MeasurementStore.open(store.path).missing(PLAN) == [tile]
    store.write(tile, sums_of(tile))
    assert store.damaged(PLAN.tiles) == []
    assert store.read(tile).tobytes() == sums_of(tile).tobytes()


def used(path: Path) -> list[Tile]:
    """What a run does with a store before it measures: the tiles that it will measure. Then they are written."""
    store = MeasurementStore.open(path)
    store.check(IDENTITY, COVERAGE)
    plan = replace(PLAN, rows_per_tile=store.rows_per_tile)
    store.extend(plan)
    missing = store.missing(plan)
    store.damaged(tile for tile in plan.tiles if tile not in missing)
    again = store.missing(plan)
    for tile in again:
        store.write(tile, sums_of(tile))
    return again


@pytest.mark.parametrize(
    ("path", "harm", "lost"),
    [
        *(("pairs/done/c/1/0", harm, ("pairs", 1, 0)) for harm in HARMS.values()),
        ("singles/done/c/2/0", flip(0.5), ("singles", 2)),
        ("gram/done/c", shutil.rmtree, ("gram",)),
        ("gram/done", shutil.rmtree, ("gram",)),
        ("gram/done/zarr.json", Path.unlink, ("gram",)),
        ("pairs/sums/c/1", shutil.rmtree, ("pairs", 1)),
        ("pairs/sums", shutil.rmtree, ("pairs",)),
        ("pairs/sums/zarr.json", Path.unlink, ("pairs",)),
        ("pairs/zarr.json", Path.unlink, ("pairs",)),
        ("pairs", shutil.rmtree, ("pairs",)),
        *((f"counts/{file}", harm, None) for file in ("c/0", "zarr.json") for harm in HARMS.values()),
        ("counts", shutil.rmtree, None),
    ],
)  # fmt: skip
def test_damage_beside_the_sums_costs_what_it_was_of_and_no_number(tmp_path, path, harm, lost):
    store = full_store(tmp_path)
    harm(store.path / path)
    assert used(store.path) == [t for t in PLAN.tiles if lost and (t.kind, t.sample_block, t.number)[: len(lost)] == lost]
    again = MeasurementStore.open(store.path)
    assert all(again.read(tile).tobytes() == sums_of(tile).tobytes() for tile in PLAN.tiles)
    assert (again.missing(PLAN), again.counts.tolist()) == ([], [3, 3, 4])


def replaced(old: str, new: str):
    def harm(file: Path) -> None:
        content = file.read_text()
        assert content.count(old) >= 1
        file.write_text(content.replace(old, new))

    return harm


RESTORE = "restore the store from a copy"
AGAIN = "measured again"


@pytest.mark.parametrize(
    ("path", "harm", "words"),
    [
        *(("zarr.json", harm, ["not a store of clado"]) for harm in (truncate(0.5), truncate(0), Path.unlink, flip(0))),
        ("zarr.json", replaced('"clado-store/1"', '"clado-store/4"'), ["format is 'clado-store/4'"]),
        ("zarr.json", replaced('"coverage"', '"coverbge"'), ["coverage is None", RESTORE]),
        ("zarr.json", replaced('"identity"', '"idemtity"'), ["identity is None", RESTORE]),
        ("zarr.json", replaced('"abc"', '"abd"'), ["fingerprint is not that of the identity", RESTORE]),
        ("zarr.json", replaced('"fingerprint": "', '"fingerprint": "0'), ["fingerprint is not that of the identity", RESTORE]),
        ("zarr.json", replaced('"sensitivity_set": "123"', '"sensitivity_set": "124"'), ["sensitivity_set: the store has '124'"]),
        ("zarr.json", replaced('"rows_per_tile": 5', '"rows_per_tile": 6'), ["pairs/sums is damaged", "of (1, 6, 12)", AGAIN]),
        ("zarr.json", replaced('"rows_per_tile": 5', '"rows_per_tile": 0'), ["rows_per_tile is 0", RESTORE]),
        ("zarr.json", replaced('"rows_per_tile"', '"rows_per_tyle"'), ["rows_per_tile is None", RESTORE]),
        *((f"{file}/zarr.json", harm, [f"{file}/zarr.json is damaged", f"/{file.split('/')[0]}: that kind", AGAIN])
          for file in ("pairs", "pairs/sums", "pairs/done") for harm in (truncate(0.5), truncate(0), flip(0))),
        ("singles/sums/zarr.json", replaced('"float64"', '"float32"'), ["singles/sums is damaged", "float32", AGAIN]),
        ("singles/sums/zarr.json", replaced("13", "12"), ["singles/sums is damaged", AGAIN]),
        ("pairs/done/zarr.json", replaced('"uint8"', '"int8"'), ["pairs/done is damaged", AGAIN]),
    ],
)  # fmt: skip
def test_what_would_make_numbers_mean_something_else_is_refused_and_changed_nowhere(tmp_path, path, harm, words):
    store = full_store(tmp_path)
    harm(store.path / path)
    before = files(store.path)
    with pytest.raises(StoreError) as told:
        used(store.path)
    assert all(word in str(told.value) for word in words), told.value
    assert files(store.path) == before


def test_a_sound_store_has_no_damage(tmp_path):
    store = full_store(tmp_path)
    before = files(store.path)
    assert store.damaged(PLAN.tiles) == []
    assert files(store.path) == before


@pytest.mark.parametrize(
    ("identity", "coverage", "said"),
    [
        ({**IDENTITY, "weights": "def"}, COVERAGE, ["weights: the store has 'abc', this run 'def'"]),
        (
            {**IDENTITY, "quantizer": {"weights": "minmax", "granularity": "per_tensor"}},
            COVERAGE,
            ["quantizer.weights: the store has 'mse', this run 'minmax'", "quantizer.granularity"],
        ),
        ({**IDENTITY, "criterion": "kl_to_float"}, COVERAGE, ["criterion: the store has None, this run 'kl_to_float'"]),
        (IDENTITY, {**COVERAGE, "sensitivity_set": "456"}, ["sensitivity_set: the store has '123'"]),
        (IDENTITY, {**COVERAGE, "blocks": [[0, 10]]}, ["blocks: the store has 3 entries, this run 1"]),
        (
            {**IDENTITY, "layers": [*LAYERS[:3], {**LAYERS[3], "bits": [2, 4]}]},
            COVERAGE,
            ["bits: the store has [2, 4, 8], this run [2, 4] (layers: layer3.weight)"],
        ),
        (
            {**IDENTITY, "layers": [{**row, "bits": [2, 16]} for row in LAYERS]},
            COVERAGE,
            ["bits: the store has [2, 4, 8], this run [2, 16] (layers: layer0.weight, layer1.weight, layer2.weight and 1 more)"],
        ),
        (
            {**IDENTITY, "layers": [*LAYERS[1:], {**LAYERS[0], "name": "fc.weight"}]},
            COVERAGE,
            ["layers: only the store has layer0.weight", "layers: only this run has fc.weight"],
        ),
        ({**IDENTITY, "layers": LAYERS[::-1]}, COVERAGE, ["layers: the store has them in another order than this run"]),
        ({**IDENTITY, "activations": {"bits": [8]}}, COVERAGE, ["activations.bits: the store has None, this run [8]"]),
        ({"weights": "def"}, {}, ["weights", "layers", "quantizer", "numeric", "blocks", "sensitivity_set"]),
    ],
)
def test_other_settings_are_refused_and_named(tmp_path, identity, coverage, said):
    store = new_store(tmp_path)
    with pytest.raises(IdentityMismatch) as caught:
        store.check(identity, coverage)
    for line in said:
        assert line in str(caught.value)
    assert "another folder" in str(caught.value)


def test_the_same_settings_are_accepted_in_any_order(tmp_path):
    new_store(tmp_path)
    shuffled = dict(reversed(IDENTITY.items()))
    again = MeasurementStore.open(tmp_path / "store.zarr")
    again.check(shuffled, dict(COVERAGE))
    assert (again.identity, again.coverage, again.rows_per_tile) == (IDENTITY, COVERAGE, 5)
    assert len(again.fingerprint) == 64


def test_versions_and_device_are_a_difference_that_warns(tmp_path):
    store = new_store(tmp_path)
    assert store.provenance_differences(PROVENANCE) == []
    lines = store.provenance_differences({**PROVENANCE, "torch": "2.9.0", "device": "cuda"})
    assert lines == ["device: the store has 'cpu', this run 'cuda'", "torch: the store has '2.8.0', this run '2.9.0'"]


def plain_folder(path: Path) -> None:
    path.mkdir()
    (path / "letter.txt").write_text("dear")


FOREIGN = {
    "nothing there": (lambda path: None, "does not exist"),
    "a file": (lambda path: path.write_text("x"), "is not a folder"),
    "an empty folder": (Path.mkdir, "not a store of clado"),
    "a plain folder": (plain_folder, "not a store of clado"),
    "another's group": (lambda path: zarr.open_group(path, mode="w", zarr_format=3), "not a store of clado"),
    "another's group of version 2": (lambda path: zarr.open_group(path, mode="w", zarr_format=2), "not a store of clado"),
    "an array": (lambda path: zarr.create_array(path, shape=(2,), dtype="f8", zarr_format=3), "not a store of clado"),
    "broken metadata": (lambda path: (path.mkdir(), (path / "zarr.json").write_text("{")), "not a store of clado"),
    "a later format": (
        lambda path: zarr.open_group(path, mode="w", zarr_format=3).attrs.update(format="clado-store/99"),
        "its format is 'clado-store/99', expected 'clado-store/1'",
    ),
}


@pytest.mark.parametrize(("make", "message"), FOREIGN.values(), ids=list(FOREIGN))
def test_what_is_not_a_store_of_ours_is_refused_untouched(tmp_path, make, message):
    path = tmp_path / "store.zarr"
    make(path)
    before = files(tmp_path)
    with pytest.raises(StoreError, match=message):
        MeasurementStore.open(path)
    assert files(tmp_path) == before


def test_a_store_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def full_disk(self, target):
        raise OSError("No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", full_disk)
        with pytest.raises(OSError, match="No space"):
            new_store(tmp_path)
    assert not (tmp_path / "store.zarr").exists()
    new_store(tmp_path)  # the remains of the failed try do no harm
    assert [path.name for path in tmp_path.iterdir()] == ["store.zarr"]


def test_a_store_that_is_there_is_never_replaced(tmp_path):
    full_store(tmp_path)
    before = files(tmp_path / "store.zarr")
    with pytest.raises(OSError, match=r"not empty|exists"):
        new_store(tmp_path)
    assert files(tmp_path / "store.zarr") == before


def test_differences_of_equal_documents_are_none():
    assert differences({"a": [1, {"b": 2}]}, {"a": (1, {"b": 2})}) == []


def test_a_store_made_before_a_kind_existed_opens_and_measures_what_is_new(tmp_path):
    store = full_store(tmp_path)
    before = {tile: store.read(tile).tobytes() for tile in PLAN.tiles if tile.kind in ("singles", "pairs", "gram")}
    for kind in ("block_pairs", "gradients", "trace"):
        del store.group[kind]
    again = MeasurementStore.open(store.path)
    assert {tile.kind for tile in again.missing(PLAN)} == {"block_pairs", "gradients", "trace"}
    with pytest.raises(StoreError, match="lacks"):
        again.gather(PLAN)
    again.extend(PLAN)
    for tile in again.missing(PLAN):
        again.write(tile, sums_of(tile))
    assert again.missing(PLAN) == []
    assert all(again.read(tile).tobytes() == sums for tile, sums in before.items())


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({"num_vectors": 3}, {"trace"}),
        ({"seed": 1}, {"trace", "gradients"}),
        ({"space": SPACE.blocked([["layer0*", "layer3*"]])}, {"block_pairs"}),
    ],
)
def test_other_terms_of_a_kind_are_measured_anew_and_nothing_else_is(tmp_path, change, lost):
    store, other = full_store(tmp_path), replace(PLAN, **change)
    assert {tile.kind for tile in store.missing(other)} == lost
    store.extend(other)
    assert {tile.kind for tile in store.missing(other)} == lost
    for tile in store.missing(other):
        store.write(tile, sums_of(tile))
    assert MeasurementStore.open(store.path).missing(other) == []
