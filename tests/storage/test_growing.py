"""A store grows: further sensitivity images measure their own blocks and nothing else, and the numbers are those of one go."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from clado.errors import IdentityMismatch
from clado.measuring.measurements import measure_tile
from clado.measuring.plan import Tile, grown_sample_blocks, sample_blocks
from clado.run.checks import check
from clado.run.opened_run import OpenedRun, open_run
from clado.settings.loading import parse_config
from clado.storage.measurement_store import MeasurementStore

FIXED = ["conv1.weight", "layer1.*", "layer2.*", "layer3.[01].*"]


def opened(folder: Path, store: str | None = None, **data) -> OpenedRun:
    """Four layers of the shipped network, without corrections; its store in the folder, or at a URL."""
    settings = {"sensitivity_images": 32, "sample_blocks": 2, "calibration_images": 0, "validation_images": 20, **data}
    return open_run(
        parse_config(
            {
                "network": {"name": "resnet20_fashion_mnist", "graph": False, "fixed": FIXED},
                "data": settings,
                "bits": [2, 4],
                "estimators": ["pairwise", "gauss_newton"],
                "corrections": [],
                "cluster": {"kind": "inline"},
                "folder": str(folder),
                **({"store": store} if store else {}),
            }
        )
    )


def measure(run: OpenedRun) -> list[Tile]:
    """Measures what the store lacks and says what that was."""
    store = run.identity.open_store()
    todo = store.missing(run.plan)
    for tile in todo:
        store.write(tile, measure_tile(run.evaluation.bench, tile))
    return todo


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_grown_store_is_bit_for_bit_the_one_measured_at_once_and_measures_only_what_is_new(tmp_path):
    first = opened(tmp_path / "grown")
    assert first.space.num_layers <= 5
    assert measure(first) == list(first.plan.tiles)
    chunks = {name: content for name, content in files(first.store_path).items() if "/c/" in name and "sums" in name}
    grown = opened(tmp_path / "grown", sensitivity_images=64)
    assert check(grown) == []
    assert grown.sample_blocks == sample_blocks(32, 4)
    before = files(first.store_path)
    assert grown.identity.missing_tiles() == [
        tile for tile in grown.plan.tiles if tile.sample_block >= 2
    ]  # what `clado plan` says
    assert files(first.store_path) == before
    new = measure(grown)
    assert new == [tile for tile in grown.plan.tiles if tile.sample_block >= 2]
    assert measure(opened(tmp_path / "grown", sensitivity_images=64)) == []
    after = files(grown.store_path)
    assert {name: after[name] for name in chunks} == chunks
    once = opened(tmp_path / "once", sensitivity_images=64, sample_blocks=4)
    measure(once)
    stores = [MeasurementStore.open(run.store_path) for run in (grown, once)]
    assert stores[0].coverage == stores[1].coverage
    assert stores[0].counts.tolist() == stores[1].counts.tolist() == [8, 8, 8, 8]
    both = [store.gather(once.plan) for store in stores]
    assert set(both[0]) == set(both[1]) == set(once.plan.kinds)
    for kind in both[0]:
        assert np.isfinite(both[0][kind]).any()
        assert both[0][kind].tobytes() == both[1][kind].tobytes()


def test_a_store_grows_for_weights_that_bring_their_preprocessing(tmp_path):
    save_images(tmp_path / "photos")
    weights = tmp_path / "squeezenet.pth"
    torch.save(torchvision.models.get_model("squeezenet1_1", weights=None).state_dict(), weights)

    def of(images: int) -> OpenedRun:
        network = {"source": "torchvision", "name": "squeezenet1_1", "weights": str(weights), "weights_name": "IMAGENET1K_V1"}
        data = {"source": "folder", "path": str(tmp_path / "photos"), "sensitivity_images": images, "sample_blocks": 2}
        document = {"network": {**network, "fixed": ["features.*"]}, "data": {**data, "calibration_images": 0}, "corrections": []}
        return open_run(parse_config({**document, "estimators": ["layerwise"], "folder": str(tmp_path / "run")}))

    first = of(8)
    assert first.loaded.preprocessing
    first.folder.mkdir()
    first.identity.open_store()
    assert of(16).identity.adds_images(MeasurementStore.open(first.store_path))


def save_images(folder: Path) -> None:
    """Forty images of two classes."""
    rng = np.random.default_rng(0)
    for k in range(40):
        path = folder / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"sensitivity_images": 64, "seed": 1}, "sensitivity_set"),  # other images
        ({"sensitivity_images": 24}, "sensitivity_set"),  # fewer
        ({"sample_blocks": 4}, "blocks"),  # other blocks of the same images
        ({"sensitivity_images": 64, "sample_blocks": 3}, "blocks"),
    ],
)
def test_what_is_not_the_same_images_and_more_is_refused_and_nothing_changes(tmp_path, data, said):
    opened(tmp_path / "run").identity.open_store()
    before = files(tmp_path)
    for attempt in (check, lambda run: run.identity.open_store()):
        with pytest.raises(IdentityMismatch, match=said):
            attempt(opened(tmp_path / "run", **data))
    assert files(tmp_path) == before


def test_a_growth_that_dies_half_way_leaves_a_store_that_works_and_can_grow(tmp_path, monkeypatch):
    first = opened(tmp_path / "run")
    measure(first)
    sums = MeasurementStore.open(first.store_path).gather(first.plan)
    grown = opened(tmp_path / "run", sensitivity_images=48)
    store, plan, coverage = MeasurementStore.open(first.store_path), grown.plan, grown.identity.coverage

    class Broken(dict):
        def __setitem__(self, key, value):
            raise OSError("No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(type(store.group), "attrs", property(lambda group: Broken()))
        with pytest.raises(OSError, match="No space"):
            store.grow(plan, coverage)
    again = opened(tmp_path / "run")
    same_store = again.identity.open_store()
    assert same_store.missing(again.plan) == []
    assert same_store.counts.tolist() == [8, 8]
    assert {kind: values.tobytes() for kind, values in same_store.gather(again.plan).items()} == {
        kind: values.tobytes() for kind, values in sums.items()
    }
    assert measure(opened(tmp_path / "run", sensitivity_images=48)) == [t for t in grown.plan.tiles if t.sample_block == 2]


@pytest.mark.parametrize("count", [1, 3, 16])
@pytest.mark.parametrize("first", [16, 37, 256])
def test_blocks_stay_cover_the_images_and_new_ones_are_as_large_as_the_old(first, count):
    stored = sample_blocks(first, count)
    for images in (first, first + 1, 2 * first, 5 * first + 3):
        blocks = grown_sample_blocks(stored, images, count)
        assert blocks[: len(stored)] == stored
        assert [start for start, _ in blocks[1:]] == [stop for _, stop in blocks[:-1]]
        assert (blocks[0][0], blocks[-1][1]) == (0, images)
        assert max(stop - start for start, stop in blocks) <= 1.5 * max(stop - start for start, stop in stored) + 1
        assert grown_sample_blocks(blocks, images, count) == blocks
    assert grown_sample_blocks(stored, 2 * first, count) == sample_blocks(2 * first, 2 * count)
