"""A store in a bucket: the laws of a folder's store that could differ, against an S3 server on loopback."""

import logging

import numpy as np
import pytest

from clado.errors import ConfigurationError, IdentityMismatch, StoreError
from clado.run.checks import check
from clado.settings.loading import parse_config
from clado.storage.measurement_store import MeasurementStore, exists
from tests.running import config
from tests.storage.test_growing import measure, opened
from tests.storage.test_measurement_store import COVERAGE, IDENTITY, PLAN, PROVENANCE, full_store, sums_of

BUCKET = "s3://measured"


@pytest.fixture(scope="module")
def server():
    """Where the server answers; it keeps everything in memory."""
    moto = pytest.importorskip("moto.server", reason="pip install 'clado[dev]'")
    pytest.importorskip("obstore", reason="pip install 'clado[dev]'")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = moto.ThreadedMotoServer("127.0.0.1", 0)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(server, monkeypatch, request):
    import urllib.request

    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hunter2", "AWS_REGION": "us-east-1"}
    environment = {**keys, "AWS_ENDPOINT_URL": server, "AWS_ALLOW_HTTP": "true"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    urllib.request.urlopen(urllib.request.Request(f"{server}/measured", method="PUT"), timeout=300).close()
    return f"{BUCKET}/{request.node.name}"


def new_store(url: str) -> MeasurementStore:
    return MeasurementStore.create(url, PLAN, IDENTITY, COVERAGE, PROVENANCE)


def test_a_bucket_holds_what_a_folder_holds(bucket, tmp_path):
    assert not exists(bucket)
    store = new_store(bucket)
    assert exists(bucket)
    for tile in PLAN.tiles[:-1]:
        store.write(tile, sums_of(tile))
    assert MeasurementStore.open(bucket).missing(PLAN) == [PLAN.tiles[-1]]
    with pytest.raises(StoreError, match="lacks 1"):
        store.gather(PLAN)
    store.write(PLAN.tiles[-1], sums_of(PLAN.tiles[-1]))
    gathered, expected = MeasurementStore.open(bucket).gather(PLAN), full_store(tmp_path).gather(PLAN)
    assert {kind: sums.tobytes() for kind, sums in gathered.items()} == {kind: sums.tobytes() for kind, sums in expected.items()}


@pytest.mark.parametrize("harm", ["flip", "delete"])
def test_a_damaged_or_deleted_chunk_is_found(bucket, harm):
    import obstore

    store, tile = new_store(bucket), PLAN.tiles[-1]
    for each in PLAN.tiles:
        store.write(each, sums_of(each))
    files = obstore.store.from_url(bucket)
    listed = [
        one["path"]
        for page in obstore.list(files)
        for one in page
        if one["path"].startswith(f"{tile.kind}/sums/c/{tile.sample_block}/")
    ]
    (chunk,) = sorted(listed)[tile.number :][:1]
    if harm == "delete":
        obstore.delete(files, chunk)
    else:
        content = bytearray(obstore.get(files, chunk).bytes())
        content[len(content) // 2] ^= 0x10
        obstore.put(files, chunk, bytes(content))
    again = MeasurementStore.open(bucket)
    assert again.damaged(PLAN.tiles) == [tile]
    assert again.missing(PLAN) == [tile]
    again.write(tile, sums_of(tile))
    assert np.array_equal(again.read(tile), sums_of(tile), equal_nan=True)


def test_a_store_in_a_bucket_grows_by_images_and_measures_only_what_is_new(bucket, tmp_path):
    first = opened(tmp_path / "run", bucket)
    assert measure(first) == list(first.plan.tiles)
    grown = opened(tmp_path / "run", bucket, sensitivity_images=64)
    assert check(grown) == []
    assert measure(grown) == [tile for tile in grown.plan.tiles if tile.sample_block >= 2]
    assert not (tmp_path / "run" / "store.zarr").exists()
    at_once = opened(tmp_path / "once", sensitivity_images=64, sample_blocks=4)
    measure(at_once)
    actual, expected = (run.identity.open_store().gather(run.plan) for run in (grown, at_once))
    assert {kind: sums.tobytes() for kind, sums in actual.items()} == {kind: sums.tobytes() for kind, sums in expected.items()}


def test_other_settings_are_refused(bucket):
    new_store(bucket)
    with pytest.raises(IdentityMismatch, match="weights"):
        MeasurementStore.open(bucket).check({**IDENTITY, "weights": "xyz"}, COVERAGE)


def test_a_store_whose_making_was_cut_short_is_made_anew(bucket):
    import zarr

    from clado.storage.measurement_store import _bucket

    zarr.open_group(_bucket(bucket), mode="a").create_array("singles/sums", shape=(1, 1), dtype="f4")
    assert not exists(bucket)
    assert tuple(new_store(bucket).missing(PLAN)) == PLAN.tiles


@pytest.mark.parametrize("other", ["attributes", "array"])
def test_what_is_not_ours_is_refused_and_kept(bucket, other):
    import zarr

    from clado.storage.measurement_store import _bucket

    group = zarr.open_group(_bucket(bucket), mode="a", attributes={"mine": 1} if other == "attributes" else {})
    group.create_array("photos", shape=(2,), dtype="f4")[:] = 7
    with pytest.raises(StoreError, match="that clado did not write"):
        new_store(bucket)
    assert zarr.open_group(_bucket(bucket), mode="r")["photos"][:].tolist() == [7, 7]


def test_a_bucket_that_is_not_there_is_one_message(server, bucket):
    with pytest.raises(StoreError, match="s3://absent/x cannot be used"):
        exists("s3://absent/x")


@pytest.mark.parametrize("url", ["s3://key:hunter2@bucket/x", "ftp://host/x", "bucket/x", "s3://"])
def test_a_url_that_is_no_place_for_a_store_is_refused(url, tmp_path):
    with pytest.raises(ConfigurationError, match="store") as caught:
        parse_config({**config(tmp_path), "store": url})
    assert "hunter2" not in str(caught.value)
