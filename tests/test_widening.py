"""A store widens: a further bit-width or layer measures its own probes and nothing else, and the numbers are those of one go."""

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clado.config import parse_config
from clado.errors import ConfigurationError, IdentityMismatch
from clado.measure import measure_tile
from clado.network import Network
from clado.probes import TEMPERATURES, Tile
from clado.records import RunRecord
from clado.shards import Store
from flows import worker
from flows.session import Session
from flows.stored import StoredRun
from tests import tolerance
from tests.running import run_pipeline
from tests.test_growing import files

LOGITS = tolerance.of_forward(2 * 22, 256)  # of a ResNet-20: its layers and batch norms

LATE = ["conv1.weight", "layer1.*", "layer2.*", "layer3.[01].*"]  # three layers are left
FIRST = {"network": {"fixed": LATE}, "bits": [2, 8]}
MORE_BITS = {"bits": [2, 4, 8]}
ADDITIONS = {
    "a bit-width in the middle": MORE_BITS,
    "bit-widths at both ends": {"bits": [2, 8, 16], "layers": {"bits": {"fc.weight": [1, 2, 8]}}},
    "a bit-width of one layer": {"layers": {"bits": {"layer3.2.conv2.weight": [2, 3, 8]}}},
    "layers in front and between": {"network": {"fixed": ["conv1.weight", "layer1.*", "layer2.*", "layer3.0.*"]}},
    "a bit-width and layers": {**MORE_BITS, "network": {"fixed": ["conv1.weight", "layer1.*", "layer2.*", "layer3.0.*"]}},
    "a bit-width and images": {**MORE_BITS, "data": {"sensitivity_images": 24}},
    "an activation width": {"activations": {"bits": [4, 8]}},
}


def settings(folder: Path, **changed) -> dict:
    data = {"sensitivity_images": 16, "sample_blocks": 2, "calibration_images": 8, "validation_images": 20}
    network = {"name": "resnet20_fashion_mnist", "graph": False}
    return {
        "corrections": [],
        "cluster": {"kind": "inline"},
        "estimators": ["pairwise", "blockwise"],
        "budgets": {"average_bits": [8]},
        "folder": str(folder),
        **{key: value for key, value in {**FIRST, **changed}.items() if key not in ("data", "network")},
        "data": {**data, **changed.get("data", {})},
        "network": {**network, **FIRST["network"], **changed.get("network", {})},
    }


def session_of(folder: Path, **changed) -> Session:
    Session.open.cache_clear()
    return Session.open(parse_config(settings(folder, **changed)))


def measure(session: Session) -> int:
    """Measures what the store lacks, as workers do; returns how many probes (forwards of a sample block) that took."""
    store, document = session.open_store(), session.config.model_dump(mode="json")
    return sum(worker.run_tile(document, tile).evaluations for tile in store.missing(session.plan))


def work(session: Session) -> int:
    """Probes of a whole measurement."""
    return sum(session.plan.evaluations(tile) for tile in session.plan.tiles)


def gathered(session: Session) -> dict[str, np.ndarray]:
    return Store.open(session.store_path).gather(session.plan)


class CountedProbes:
    """Runs of the network with two layers quantized, in sample blocks."""

    def __init__(self, monkeypatch):
        self.count, finish = 0, Network.finish

        def counted(network, state, quantized):
            logits = finish(network, state, quantized)
            if quantized:  # else the float run of a block
                self.count += len(logits) // 8  # images of a block
            return logits

        monkeypatch.setattr(Network, "finish", counted)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for kind, sums in expected.items():
        assert np.isfinite(sums).any()
        if kind == "gradients":  # forwards and backwards, squared
            tolerance.close(found[kind], sums, 4 * LOGITS, least=0.0)
            continue
        for block, expected_block in zip(found[kind], sums, strict=True):
            tolerance.close_tile(kind, block, expected_block, 8, 10, LOGITS)


@pytest.mark.parametrize(
    ("addition", "first"),
    [*((addition, "pairwise") for addition in ADDITIONS), *((addition, "blockwise") for addition in list(ADDITIONS)[3:5])],
)
def test_a_wider_store_has_the_numbers_of_one_go_for_the_work_that_is_new_and_keeps_the_old_bit_for_bit(
    tmp_path, monkeypatch, addition, first
):
    base = {"estimators": [first], **({"activations": {"bits": [8]}} if "activation" in addition else {})}
    narrow = session_of(tmp_path / "grown", **base)
    assert measure(narrow) == work(narrow)
    before = gathered(narrow)
    wide = session_of(tmp_path / "grown", **{**base, **ADDITIONS[addition]})
    wide.check()
    places = np.array(narrow.space.places_in(wide.space))
    assert len(places) == narrow.space.num_options < wide.space.num_options
    predicted = sum(wide.plan.evaluations(tile, known) for tile, known in wide.store_todo().items())
    probes = CountedProbes(monkeypatch)
    assert measure(wide) == predicted == work(wide) - work(narrow)
    after = gathered(wide)
    blocks, kind = len(narrow.plan.blocks), narrow.plan.kinds[-1]
    assert probes.count == (np.isfinite(after[kind]).sum() - np.isfinite(before[kind]).sum())
    assert after["singles"][:blocks, [0, *(1 + places)]].tobytes() == before["singles"].tobytes()
    known = np.isfinite(before[kind])
    assert np.array_equal(after[kind][:blocks][:, places[:, None], places][known], before[kind][known])
    assert measure(session_of(tmp_path / "grown", **{**base, **ADDITIONS[addition]})) == 0
    data = {**ADDITIONS[addition].get("data", {}), "sample_blocks": len(wide.blocks)}
    once = session_of(tmp_path / "once", **{**base, **ADDITIONS[addition], "data": data})
    assert measure(once) == work(wide)
    assert_same(after, gathered(once))


def test_widening_again_before_the_first_is_measured_keeps_whatever_is_known(tmp_path):
    narrow = session_of(tmp_path / "run")
    measure(narrow)
    wide = session_of(tmp_path / "run", **MORE_BITS)
    tiles = wide.open_store().missing(wide.plan)
    document = wide.config.model_dump(mode="json")
    spent = sum(worker.run_tile(document, tile).evaluations for tile in tiles[::2])
    assert 0 < spent < work(wide) - work(narrow)
    widest = session_of(tmp_path / "run", bits=[2, 4, 6, 8])
    assert spent + measure(widest) == work(widest) - work(narrow)
    once = session_of(tmp_path / "once", bits=[2, 4, 6, 8])
    measure(once)
    assert_same(gathered(widest), gathered(once))
    assert {part.name for part in widest.store_path.iterdir() if part.is_dir()} == {"wider-2", "counts"}


def test_a_carried_chunk_that_is_damaged_is_measured_whole(tmp_path):
    measure(session_of(tmp_path / "run"))
    wide = session_of(tmp_path / "run", **MORE_BITS)
    store = wide.open_store()
    (tile,) = (tile for tile in store.missing(wide.plan) if tile.kind == "pairs" and tile.block == 1)
    chunk = store.path / "wider-1" / "pairs" / "sums" / "c" / "1" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-7])
    whole, part = wide.plan.evaluations(tile), wide.plan.evaluations(tile, np.zeros(wide.plan.shape("pairs")))
    assert (Store.open(store.path).known(wide.plan, tile), part) == (None, 0)
    receipt = worker.run_tile(wide.config.model_dump(mode="json"), tile)
    assert receipt.evaluations == whole
    measure(wide)
    once = session_of(tmp_path / "once", **MORE_BITS)
    measure(once)
    assert_same(gathered(wide), gathered(once))


def test_a_tile_of_the_narrow_store_that_was_never_measured_or_is_damaged_is_measured_in_the_wide_one(tmp_path):
    narrow = session_of(tmp_path / "run")
    store, document = narrow.open_store(), narrow.config.model_dump(mode="json")
    for tile in narrow.plan.tiles:
        if (tile.kind, tile.block) != ("pairs", 1):
            worker.run_tile(document, tile)
    chunk = store.path / "singles" / "sums" / "c" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-7])
    wide = session_of(tmp_path / "run", **MORE_BITS)
    assert measure(wide) > work(wide) - work(narrow)
    once = session_of(tmp_path / "once", **MORE_BITS)
    measure(once)
    assert_same(gathered(wide), gathered(once))


def test_a_widening_that_dies_half_way_leaves_a_store_that_works_and_can_widen(tmp_path, monkeypatch):
    narrow = session_of(tmp_path / "run")
    measure(narrow)
    before = gathered(narrow)
    wide = session_of(tmp_path / "run", **MORE_BITS)
    store, plan, coverage = Store.open(narrow.store_path), wide.plan, wide.coverage

    class Broken(dict):
        def update(self, *args, **kwargs):
            raise OSError("No space left on device")

    attributes = dict(store.group.attrs)
    with monkeypatch.context() as broken:
        broken.setattr(type(store.group), "attrs", property(lambda group: Broken(attributes)))
        with pytest.raises(OSError, match="No space"):
            store.widen(plan, coverage)
    again = session_of(tmp_path / "run")
    assert again.open_store().missing(again.plan) == []
    assert {kind: sums.tobytes() for kind, sums in gathered(again).items()} == {k: sums.tobytes() for k, sums in before.items()}
    wide = session_of(tmp_path / "run", **MORE_BITS)
    assert measure(wide) == work(wide) - work(narrow)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"bits": [2]}, "bits"),  # fewer
        ({"bits": [4, 8]}, "bits"),  # others
        ({"network": {"fixed": ["conv1.weight", "layer[12].*", "layer3.*"]}}, "layers"),  # fewer layers
        ({"bits": [2, 4, 8], "criterion": "cross_entropy"}, "criterion"),  # another identity beside more bits
        ({"bits": [2, 4, 8], "data": {"seed": 1}}, "sensitivity_set"),  # other images beside more bits
        ({"activations": {"bits": [8]}}, "activation"),
    ],
)
def test_what_is_not_the_same_options_and_more_is_refused_and_nothing_changes(tmp_path, changed, said):
    session_of(tmp_path / "run").open_store()
    before = files(tmp_path)
    for attempt in (Session.check, Session.open_store):
        with pytest.raises(IdentityMismatch, match=said):
            attempt(session_of(tmp_path / "run", **changed))
    assert files(tmp_path) == before


def test_equalization_allows_more_bits_and_refuses_more_layers_which_it_would_scale_too(tmp_path):
    base = {"corrections": ["equalization"]}
    narrow = session_of(tmp_path / "run", **base)
    measure(narrow)
    fewer_fixed = {"network": {"fixed": ["conv1.weight", "layer1.*", "layer2.*", "layer3.0.*"]}}
    with pytest.raises(IdentityMismatch, match=r"layer3\.1\.conv1\.weight.*equalization changes the other layers"):
        session_of(tmp_path / "run", **base, **fewer_fixed).open_store()
    wide = session_of(tmp_path / "run", **base, **MORE_BITS)
    assert measure(wide) == work(wide) - work(narrow)


GRAM = {"estimators": ["layerwise", "gauss_newton"]}


@pytest.mark.parametrize(
    ("addition", "graph"), [*((addition, False) for addition in ADDITIONS), ("a bit-width and layers", True)]
)
def test_a_gram_matrix_grows_by_the_forwards_of_what_is_new_and_keeps_the_old_bit_for_bit(tmp_path, addition, graph):
    def session(folder: str, **changed) -> Session:
        changed = {**GRAM, **({"activations": {"bits": [8]}} if "activation" in addition else {}), **changed}
        return session_of(tmp_path / folder, **{**changed, "network": {**changed.get("network", {}), "graph": graph}})

    narrow = session("grown")
    assert measure(narrow) == work(narrow)
    before = gathered(narrow)["gram"]
    wide = session("grown", **ADDITIONS[addition])
    predicted = sum(wide.plan.evaluations(tile, known) for tile, known in wide.store_todo().items())
    counted = [0]
    module = sys.modules[measure_tile.__module__]
    finished = module._finished_rows
    with pytest.MonkeyPatch.context() as counting:
        counting.setattr(module, "_finished_rows", lambda b, p, rows: counted.append(len(rows)) or finished(b, p, rows))
        assert measure(wide) == predicted == work(wide) - work(narrow)
    blocks, places = len(narrow.blocks), np.array(narrow.space.places_in(wide.space))
    fresh = (len(wide.blocks) - blocks) * wide.space.num_options
    assert sum(counted) == blocks * (wide.space.num_options - len(places)) + fresh  # rows that ran
    after, k = gathered(wide)["gram"], wide.space.num_options
    rows = [0, 1, *(2 + t * k + place for t in range(len(TEMPERATURES)) for place in places)]
    assert after[:blocks][:, rows][:, :, [0, *(1 + places)]].tobytes() == before.tobytes()
    data = {**ADDITIONS[addition].get("data", {}), "sample_blocks": len(wide.blocks)}
    once = session("once", **{**ADDITIONS[addition], "data": data})
    assert measure(once) == work(wide)
    assert_same(gathered(wide), gathered(once))
    assert measure(session("grown", **ADDITIONS[addition])) == 0


def test_a_gram_matrix_grows_twice_and_from_what_was_measured_in_part(tmp_path):
    measure(session_of(tmp_path / "run", **GRAM))
    wide = session_of(tmp_path / "run", **GRAM, **MORE_BITS)
    first, _ = wide.open_store().missing(wide.plan)
    spent = worker.run_tile(wide.config.model_dump(mode="json"), first).evaluations
    widest = session_of(tmp_path / "run", **GRAM, bits=[2, 4, 6, 8])
    layers = widest.space.num_layers
    assert (spent, measure(widest)) == (layers, layers + 2 * layers)
    once = session_of(tmp_path / "once", **GRAM, bits=[2, 4, 6, 8])
    measure(once)
    assert_same(gathered(widest), gathered(once))


@pytest.mark.parametrize("when", ["before the store is wider", "after"])
@pytest.mark.parametrize("fault", ["damaged", "gone", "never kept"])
def test_a_gram_matrix_whose_changes_are_not_there_is_measured_whole(tmp_path, when, fault):
    narrow = session_of(tmp_path / "run", **GRAM)
    measure(narrow)
    wide = session_of(tmp_path / "run", **GRAM, **MORE_BITS)
    if when == "after":
        wide.open_store()
    (kept,) = narrow.store_path.rglob("changes")
    chunk = kept / "c" / "1" / "0" / "0" / "0"
    if fault == "damaged":
        chunk.write_bytes(chunk.read_bytes()[:-7])
    else:
        shutil.rmtree(kept if fault == "never kept" else chunk.parent)  # earlier versions kept none
    lost = 2 if fault == "never kept" else 1
    assert measure(wide) == (2 - lost) * wide.space.num_layers + lost * (1 + wide.space.num_options)
    once = session_of(tmp_path / "once", **GRAM, **MORE_BITS)
    measure(once)
    assert_same(gathered(wide), gathered(once))


def test_changes_of_more_bytes_than_are_kept_are_measured_again(tmp_path, monkeypatch):
    narrow = session_of(tmp_path / "run", **GRAM)
    assert narrow.plan.changes_bytes == narrow.plan.stored_bytes() - replace(narrow.plan, num_logits=0).stored_bytes() > 0
    monkeypatch.setattr("flows.session.CHANGES_BYTES", narrow.plan.changes_bytes - 1)
    measure(session_of(tmp_path / "run", **GRAM))
    assert not [*narrow.store_path.rglob("changes")]
    wide = session_of(tmp_path / "run", **GRAM, **MORE_BITS)
    assert measure(wide) == work(wide)


def test_kinds_whose_numbers_do_not_stand_alone_are_measured_whole(tmp_path):
    base = {"estimators": ["mpqco"]}
    measure(session_of(tmp_path / "run", **base))
    wide = session_of(tmp_path / "run", **base, **MORE_BITS)
    assert measure(wide) == work(wide)
    for tile, kind in ((wide.plan.tiles[0], "gradients"), (Tile("gram", 0), "gram")):
        with pytest.raises(ConfigurationError, match=r"in part.*singles, pairs, block_pairs, or gram with its changes"):
            measure_tile(wide.bench, tile, np.zeros(wide.plan.shape(kind)))
    once = session_of(tmp_path / "once", **base, **MORE_BITS)
    measure(once)
    assert_same(gathered(wide), gathered(once))


def test_a_run_in_the_folder_of_a_narrower_one_says_what_it_measured_and_its_record_is_of_the_wider_space(tmp_path):
    def run(**changed):
        document = {
            **settings(tmp_path / "run", **changed),
            "search": {"evaluations": 0},
            "estimators": ["layerwise", "pairwise"],
        }
        run_pipeline(document, tracked=False)
        return RunRecord.load(tmp_path / "run" / "record.json")

    narrow = run()
    assert not any("grew" in note for note in narrow.notes)
    fixed = {"network": {"fixed": ["conv1.weight", "layer1.*", "layer2.*", "layer3.0.*"]}}
    wide = run(**MORE_BITS, **fixed)
    (note,) = (note for note in wide.notes if "grew" in note)
    new, whole = (int(number.replace(",", "")) for number in re.findall(r"[\d,]+(?= (?:of|evaluations))", note))
    session = session_of(tmp_path / "run", **MORE_BITS, **fixed, estimators=["layerwise", "pairwise"])
    assert (new, whole) == (work(session) - 2 * (1 + 6 + 12), work(session))
    assert set(narrow.layer_names) < set(wide.layer_names) == set(session.space.names)
    assert StoredRun.open(tmp_path / "run").measured.space.options == session.space.options
    assert {len(row.assignment.bits) for row in wide.results} == {len(wide.layer_names)}
