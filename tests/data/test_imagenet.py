"""ImageNet in: synsets are class numbers, weights bring their preprocessing, slices are balanced, damage is named."""

import io
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clado.data.decoding import SUFFIXES, EncodedSlice, Preprocessing, imagenet_numbers
from clado.data.images import DataSlices, check_slice
from clado.data.sources import folder as folder_source
from clado.data.sources import load_data, load_network
from clado.data.sources.folder import ImageFile
from clado.errors import ConfigurationError, DataError, NetworkError, UnreadableImage
from clado.settings.loading import parse_config
from clado.settings.schema import DataSettings, NetworkSettings
from tests.running import config, run_pipeline

SHAPE = (3, 16, 16)
CLASSES, EACH = 50, 20
SYNSETS = sorted(imagenet_numbers())[7::20]  # fifty of the thousand, real names


def jpeg(k: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(k).integers(0, 256, (18, 20, 3), np.uint8)
    Image.fromarray(pixels).save(file, "jpeg")
    return file.getvalue()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of 50 classes × 20 images with real synset names. Read only."""
    root = tmp_path_factory.mktemp("imagenet")
    for c, synset in enumerate(SYNSETS):
        (root / synset).mkdir()
        for k in range(EACH):
            (root / synset / f"{synset}_{k}.JPEG").write_bytes(jpeg(c * EACH + k))
    return root


def settings(path: Path, **changes: Any) -> DataSettings:
    return DataSettings(
        **{"source": "folder", "path": path, "sensitivity_images": 100, "calibration_images": 150, "sample_blocks": 1, **changes}
    )


def parts_of(slices: DataSlices) -> list[EncodedSlice]:
    return [getattr(slices, name) for name in ("sensitivity", "calibration", "validation", "selection")]


def names(images: Any) -> list[str]:
    """The names of a slice's images, of one that is kept too."""
    return [image.name for image in getattr(images, "source", images).images]


# --- class numbers --------------------------------------------------------------------------------------------------


def test_the_thousand_synsets_are_imagenets_class_numbers() -> None:
    numbers = imagenet_numbers()
    assert list(numbers) == sorted(numbers)
    assert list(numbers.values()) == list(range(1000))
    known = {
        "n01440764": 0,
        "n02123045": 281,
        "n02504458": 386,
        "n15075141": 999,
    }  # tench, tabby, African elephant, toilet tissue
    assert {synset: numbers[synset] for synset in known} == known


def test_a_part_of_imagenet_is_labelled_as_the_network_counts(imagenet: Path) -> None:
    slices = load_data(settings(imagenet), SHAPE)
    assert slices.imagenet
    for images in parts_of(slices)[:3]:
        assert images.num_classes == 1000
        assert images.labels == [imagenet_numbers()[name.partition("/")[0]] for name in names(images)]
    plain = load_data(settings(imagenet, class_numbers="folders"), SHAPE)
    assert not plain.imagenet
    assert plain.sensitivity.num_classes == CLASSES
    assert max(parts_of(plain)[0].labels or ()) < CLASSES
    assert plain.sensitivity.sha256 != slices.sensitivity.sha256


def test_train_and_val_of_the_imagenet_layout(tmp_path: Path) -> None:
    for part, count in (("train", 4), ("val", 2)):
        for synset in SYNSETS[:3] if part == "train" else SYNSETS[1:3]:
            (tmp_path / part / synset).mkdir(parents=True)
            for k in range(count):
                (tmp_path / part / synset / f"{k}.JPEG").write_bytes(jpeg(k))
    slices = load_data(settings(tmp_path, sensitivity_images=4, calibration_images=3), SHAPE)
    labels = slices.validation.load(0, 4)[1]
    assert labels is not None
    assert labels.tolist() == [27, 27, 47, 47]


def test_names_that_are_no_synsets_are_folders_or_refused(tmp_path: Path) -> None:
    for name in ("cat", SYNSETS[0]):
        (tmp_path / name).mkdir()
        for k in range(6):
            (tmp_path / name / f"{k}.jpg").write_bytes(jpeg(k))
    few = {"sensitivity_images": 2, "calibration_images": 2}
    slices = load_data(settings(tmp_path, **few), SHAPE)
    assert (slices.imagenet, slices.sensitivity.num_classes) == (False, 2)
    with pytest.raises(DataError, match=r"not ImageNet's: cat; expected names such as n01440764"):
        load_data(settings(tmp_path, class_numbers="imagenet", **few), SHAPE)


# --- balance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sensitivity", "calibration", "validation"), [(100, 150, 250), (70, 130, 333), (50, 0, 50), (3, 7, 11)])
def test_balanced_slices_hold_every_class_alike_are_disjoint_and_nested(
    imagenet: Path, sensitivity: int, calibration: int, validation: int
) -> None:
    counts = {"sensitivity_images": sensitivity, "calibration_images": calibration, "validation_images": validation}
    slices = load_data(settings(imagenet, class_balanced=True, **counts), SHAPE)
    all_names: list[str] = []
    for images, count in zip(parts_of(slices)[:3], counts.values(), strict=True):
        per_class = Counter(images.labels or ())
        assert sum(per_class.values()) == len(images) == count
        assert not count or max(per_class.values()) - (min(per_class.values()) if len(per_class) == CLASSES else 0) <= 1
        all_names += names(images)
    all_names += names(slices.selection)
    assert len(set(all_names)) == len(all_names) == CLASSES * EACH
    fewer = load_data(settings(imagenet, class_balanced=True, **{**counts, "sensitivity_images": 2}), SHAPE)
    assert names(fewer.sensitivity) == names(slices.sensitivity)[:2]
    assert names(fewer.calibration) == names(slices.calibration)
    drawn = load_data(settings(imagenet, **counts), SHAPE)
    assert sensitivity < CLASSES or max(Counter(parts_of(drawn)[0].labels or ()).values()) > -(-sensitivity // CLASSES)


def test_what_cannot_be_balanced_is_refused(imagenet: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"too few images for balanced slices \(610 for sensitivity and 389 for calibration"):
        load_data(settings(imagenet, class_balanced=True, sensitivity_images=610, calibration_images=389), SHAPE)
    for k in range(9):
        (tmp_path / f"{k}.jpg").write_bytes(jpeg(k))
    with pytest.raises(DataError, match=r"has no labels; data\.class_balanced needs them"):
        load_data(settings(tmp_path, class_balanced=True, sensitivity_images=2, calibration_images=2), SHAPE)
    for name, count in (("a", 2), ("b", 20)):
        (tmp_path / name).mkdir()
        for k in range(count):
            (tmp_path / name / f"{k}.jpg").write_bytes(jpeg(k))
    with pytest.raises(DataError, match=r"class a of .* has 2 images left; balanced slices of 10 images need"):
        load_data(settings(tmp_path, class_balanced=True, sensitivity_images=10, calibration_images=0), SHAPE)


# --- tar shards -----------------------------------------------------------------------------------------------------


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def shards(root: Path, label: Any = str, per_shard: int = 4) -> None:
    for s in range(5):
        members: dict[str, bytes] = {}
        for k in range(s * per_shard, (s + 1) * per_shard):
            members[f"part/{k:05}.jpg"] = jpeg(k)
            if (said := label(k % 3)) is not None:
                members[f"part/{k:05}.cls"] = said.encode()
            members[f"part/{k:05}.json"] = b"{}"
        write_shard(root / f"shard-{s:03}.tar", members)


FEW = {"source": "tar", "sensitivity_images": 6, "calibration_images": 5}


@pytest.mark.parametrize(
    ("label", "expected"),
    [(lambda c: f"{c}\n", [0, 1, 2]), (lambda c: SYNSETS[c], [7, 27, 47]), (lambda c: None, None)],
)
def test_shards_hold_what_a_folder_of_the_same_files_holds(tmp_path: Path, label: Any, expected: list[int] | None) -> None:
    shards(tmp_path / "tar", label)
    slices = load_data(settings(tmp_path / "tar", **FEW), SHAPE)
    parts = parts_of(slices)[:3]
    drawn = [name for images in parts for name in names(images)]
    assert sorted(drawn) == [f"shard-{k // 4:03}.tar/part/{k:05}.jpg" for k in range(20)]
    preprocessing = Preprocessing.of(DataSettings(), SHAPE)
    for images in parts:
        pixels, labels = images.load(0, len(images))
        assert (labels is None) == (expected is None)
        for i, name in enumerate(names(images)):
            k = int(name[-9:-4])
            (tmp_path / "one.jpg").write_bytes(jpeg(k))

            class One:
                name = "one"

                def read(self) -> bytes:
                    return (tmp_path / "one.jpg").read_bytes()

            assert torch.equal(pixels[i], preprocessing(One()))
            assert labels is None or expected is None or int(labels[i]) == expected[k % 3]
    assert load_data(settings(tmp_path / "tar", **FEW), SHAPE).validation.sha256 == slices.validation.sha256
    assert load_data(settings(tmp_path / "tar", **FEW, seed=1), SHAPE).validation.sha256 != slices.validation.sha256


def test_train_and_val_shards(tmp_path: Path) -> None:
    shards(tmp_path / "train")
    shards(tmp_path / "val")
    slices = load_data(settings(tmp_path, **FEW, validation_images=8), SHAPE)
    train, validation = names(slices.sensitivity) + names(slices.calibration), names(slices.validation)
    assert all(name.startswith("train/shard") for name in train)
    assert all(name.startswith("val/shard") for name in validation)
    assert (len(set(train)), len(set(validation))) == (11, 8)


def test_shards_that_will_not_do_are_refused(tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(DataError) as refusal:
            load_data(settings(path, **FEW), SHAPE)
        return str(refusal.value)

    (tmp_path / "empty").mkdir()
    assert "holds no tar shards" in refused(tmp_path / "empty")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.tar").write_bytes(b"not a tar file at all" * 100)
    assert "a.tar is not a readable tar file" in refused(tmp_path / "bad")
    write_shard(tmp_path / "bare" / "a.tar", {"notes.txt": b"nothing"})
    assert "hold no images" in refused(tmp_path / "bare")
    write_shard(tmp_path / "half" / "a.tar", {"a.jpg": jpeg(0), "b.jpg": jpeg(1), "b.cls": b"1"})
    assert "a.jpg in" in refused(tmp_path / "half")
    assert "has no .cls file" in refused(tmp_path / "half")
    write_shard(tmp_path / "words" / "a.tar", {"a.jpg": jpeg(0), "a.cls": b"cat"})
    assert "says 'cat'; expected a class number" in refused(tmp_path / "words")
    write_shard(tmp_path / "twice" / "a.tar", {"a.jpg": jpeg(0), "a.png": jpeg(1)})
    assert "holds both a.jpg and a.png; expected one image for each key" in refused(tmp_path / "twice")
    write_shard(tmp_path / "dots" / "a.tar", {"a.jpg": jpeg(0), "a.mask.png": jpeg(1), "b.1.jpg": jpeg(1)})
    assert "b.1.jpg in" in refused(tmp_path / "dots")
    assert "has a dot in its key" in refused(tmp_path / "dots")
    for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        write_shard(tmp_path / "links" / "a.tar", {"a.jpg": jpeg(0)})
        with tarfile.open(tmp_path / "links" / "a.tar", "a") as archive:
            link = tarfile.TarInfo("b.jpg")
            link.type, link.linkname = kind, "a.jpg"
            archive.addfile(link)
        assert "b.jpg in" in refused(tmp_path / "links")
        assert "is a link; expected files themselves" in refused(tmp_path / "links")
    with pytest.raises(ConfigurationError, match="source tar needs a path"):
        parse_config({"network": {"name": "a:b", "source": "factory"}, "data": {"source": "tar"}})


# --- damage ---------------------------------------------------------------------------------------------------------

MAKE = """
import torch
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 1000),
    )
"""


@pytest.fixture
def small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a run on twenty images of two synsets, three of them damaged in different ways."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network_of_a_run.py").write_text(MAKE)
    for c, synset in enumerate(SYNSETS[:2]):
        (tmp_path / "photos" / synset).mkdir(parents=True)
        for k in range(12):
            (tmp_path / "photos" / synset / f"{k:02}.JPEG").write_bytes(jpeg(c * 12 + k))
    for name, content in (("03", b""), ("07", jpeg(7)[:300]), ("11", b"not a picture")):
        (tmp_path / "photos" / SYNSETS[0] / f"{name}.JPEG").write_bytes(content)
    data = {"source": "folder", "path": "photos", "sensitivity_images": 6, "calibration_images": 6, "sample_blocks": 2}
    network = {"source": "factory", "name": "network_of_a_run:make", "image_shape": SHAPE}
    return config(tmp_path / "run", network=network, data=data, corrections=[], estimators=["layerwise"])


DAMAGED = [f"{SYNSETS[0]}/{k}.JPEG" for k in ("03", "07", "11")]


def test_a_damaged_image_is_refused_by_name(small_run: dict[str, Any]) -> None:
    from clado.run.checks import checked
    from clado.run.opened_run import open_run

    run = open_run(parse_config(small_run))
    with pytest.raises(UnreadableImage, match=r"cannot be read .* or allow some with data.max_corrupt_images") as refusal:
        checked(run)
    assert refusal.value.image in DAMAGED
    small_run["data"]["max_corrupt_images"] = 2
    with pytest.raises(
        DataError, match=r"more images below photos cannot be read than data\.max_corrupt_images: 2 allows"
    ) as many:
        checked(open_run(parse_config(small_run)))
    assert all(name in str(many.value) for name in DAMAGED)
    assert not run.folder.exists()


def test_labels_are_known_where_the_first_image_is_one_of_them(small_run: dict[str, Any]) -> None:
    from clado.run.checks import checked
    from clado.run.opened_run import open_run

    small_run["data"]["max_corrupt_images"] = 3
    small_run["criterion"] = "cross_entropy"
    images = open_run(parse_config(small_run)).slices.sensitivity.source
    first = images.images[0].path
    for name in DAMAGED:
        (first.parents[1] / name).write_bytes(jpeg(1))
    first.write_bytes(b"not a picture")
    run = checked(open_run(parse_config({**small_run, "bits": [2, 8]})))
    assert list(run.config.data.skip) == [images.images[0].name]


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_sixteen_bits_are_scaled_and_wider_ones_refused(tmp_path: Path, channels: int) -> None:
    from PIL import Image

    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    for synset, image in zip(SYNSETS, (ramp, ramp.astype(np.int32), ramp.astype(np.float32)), strict=False):
        (tmp_path / synset).mkdir()
        for k in range(4):
            Image.fromarray(image).save(tmp_path / synset / f"{k}.tiff")
    settings = DataSettings(
        source="folder", path=tmp_path, sensitivity_images=4, calibration_images=0, mean=(0.0,) * channels, std=(1.0,) * channels,
        validation_images=4, sample_blocks=2,
    )  # fmt: skip
    everything = load_data(settings, (channels, 8, 8))
    read = 0
    for part in parts_of(everything):
        for k, image in enumerate(part.images):
            if SYNSETS[0] in image.name:
                pixels = part.load(k, k + 1)[0][0]
                np.testing.assert_allclose(pixels.numpy(), np.broadcast_to(ramp / 65535, (channels, 8, 8)), atol=0.5 / 255 + 1e-6)
                read += 1
            else:
                with pytest.raises(DataError, match="values of 32 bits"):
                    part.load(k, k + 1)
    assert read == 4


def test_so_many_damaged_images_are_left_out_and_the_record_says_so(small_run: dict[str, Any]) -> None:
    from clado.records.run_record import RunRecord
    from clado.run.checks import checked
    from clado.run.opened_run import open_run

    small_run["data"]["max_corrupt_images"] = 3
    settings = parse_config(small_run)
    run = checked(open_run(settings))
    assert sorted(run.config.data.skip) == DAMAGED
    assert run.config.run_folder == settings.run_folder
    assert checked(run) is run
    used = [name for images in run.slices.used for name in names(images)]
    assert len(set(used)) == len(used) == 24 - 3
    check_slice(run.slices.validation)
    run_pipeline(run.config.model_dump(mode="json"), tracked=False)
    record = RunRecord.load(run.folder / "record.json")
    note = next(note for note in record.notes if "left out" in note)
    assert "3 images are left out" in note
    assert all(name in note for name in DAMAGED)


def test_a_flow_that_no_command_started_checks_images_and_budgets_itself(small_run: dict[str, Any], tmp_path: Path) -> None:
    from clado.errors import InfeasibleError
    from clado.settings.loading import load_run_config

    small_run["data"]["max_corrupt_images"] = 3
    with pytest.raises(InfeasibleError, match="budget 1 bits"):
        run_pipeline({**small_run, "budgets": {"average_bits": [1.0]}}, tracked=False)
    assert not (tmp_path / "run" / "store.zarr").exists()
    run_pipeline(small_run, tracked=False)
    assert sorted(load_run_config(tmp_path / "run").data.skip) == DAMAGED


def test_a_damaged_image_to_choose_on_is_left_out_where_that_is_asked_for(small_run: dict[str, Any]) -> None:
    from clado.run.checks import checked, with_readable_selection
    from clado.run.opened_run import open_run

    small_run["data"] |= {"max_corrupt_images": 4, "validation_images": 5}
    run = checked(open_run(parse_config(small_run)))
    before = [names(images) for images in parts_of(run.slices)[:3]]
    other = next(name for name in names(run.slices.selection) if name not in DAMAGED)
    (run.config.data.path / other).write_bytes(b"")  # type: ignore[operator]
    checked_run = with_readable_selection(checked(open_run(run.config)))
    assert set(checked_run.config.data.skip) == {*DAMAGED, other}
    assert [names(images) for images in parts_of(checked_run.slices)[:3]] == before
    check_slice(checked_run.slices.selection)


def test_there_may_be_no_images_to_choose_on(small_run: dict[str, Any]) -> None:
    from clado.run.checks import checked, with_readable_selection
    from clado.run.opened_run import open_run

    small_run["data"] |= {"max_corrupt_images": 3, "validation_images": 9}
    checked_run = with_readable_selection(checked(open_run(parse_config(small_run))))  # the last one left was damaged
    assert len(checked_run.slices.selection) == 0
    assert with_readable_selection(checked_run) is checked_run


def test_images_to_train_on_are_left_out_where_they_cannot_be_read_and_so_many_are_allowed(
    small_run: dict[str, Any], tmp_path: Path
) -> None:
    """A training set of its own is read before anything is trained."""
    from clado.run.checks import checked
    from clado.run.opened_run import open_run
    from flows.commands.finetune import images_of

    more = tmp_path / "more"
    for synset in SYNSETS[:2]:
        (more / synset).mkdir(parents=True)
        for k in range(10):
            (more / synset / f"{k}.JPEG").write_bytes(jpeg(k))
    (more / SYNSETS[0] / "4.JPEG").write_bytes(b"")
    small_run["data"]["max_corrupt_images"] = 3
    run = checked(open_run(parse_config(small_run)))
    images = images_of(run, more, seed=0)
    assert len(images.training) + len(images.held_out) == 19
    check_slice(images.training)
    check_slice(images.held_out)
    strict = run.config.model_copy(update={"data": run.config.data.model_copy(update={"max_corrupt_images": 0})})
    with pytest.raises(UnreadableImage, match=r"4\.JPEG cannot be read"):
        images_of(replace(run, config=strict), more, seed=0)
    for k in range(3):
        (more / SYNSETS[1] / f"{k}.JPEG").write_bytes(b"")
    with pytest.raises(DataError, match=r"more images below .*more cannot be read than data\.max_corrupt_images: 3 allows: "):
        images_of(run, more, seed=0)


def test_a_plan_needs_no_images(small_run: dict[str, Any]) -> None:
    from clado.run.opened_run import open_run
    from flows.commands.plan import plan_text

    planned = open_run(parse_config({**small_run, "data": {**small_run["data"], "validation_images": 5}}), planning=True)
    expected = plan_text(planned)
    assert len(planned.slices.validation.load(0, 0)[0]) == 0
    small_run["data"]["path"] = "nowhere"
    absent = open_run(parse_config(small_run), planning=True)
    assert plan_text(absent) == expected
    with pytest.raises(DataError, match="nowhere is not a folder; without images a run can be planned, but not measured"):
        absent.slices.sensitivity.load(0, 1)
    with pytest.raises(DataError, match=r"data.path nowhere \(in .*\) is not a folder"):
        open_run(parse_config(small_run))


# --- preprocessing --------------------------------------------------------------------------------------------------


def torchvision(**changes: Any) -> NetworkSettings:
    return NetworkSettings(**{"source": "torchvision", "name": "resnet18", "weights": "random", **changes})


def test_torchvisions_weights_bring_their_preprocessing(tmp_path: Path, imagenet: Path) -> None:
    """The pixels of the weights' own transforms, whether they are named or known by the published file's name."""
    from torchvision.models import ResNet18_Weights, resnet18

    weights = ResNet18_Weights.IMAGENET1K_V1
    state = resnet18(weights=None).state_dict()
    published = tmp_path / weights.url.rsplit("/")[-1]
    torch.save(state, published)
    save_file(state, tmp_path / "mine.safetensors")
    images = sorted((imagenet / SYNSETS[0]).iterdir())[:1]
    for network in (
        torchvision(weights=published),
        torchvision(weights=tmp_path / "mine.safetensors", weights_name="IMAGENET1K_V1"),
        torchvision(weights_name="IMAGENET1K_V1"),
    ):
        loaded = load_network(network)
        assert loaded.image_shape == (3, 224, 224)
        slices = load_data(settings(imagenet), loaded.image_shape, loaded.preprocessing)
        parts = parts_of(slices)
        part, k = next((part, names(part).index(images[0].relative_to(imagenet).as_posix())) for part in parts[:3]
                       if images[0].relative_to(imagenet).as_posix() in names(part))  # fmt: skip
        assert torch.allclose(part.load(k, k + 1)[0][0], weights.transforms()(Image.open(images[0])), rtol=0, atol=1e-6)
    assert torch.equal(load_network(torchvision(weights=published)).model.conv1.weight, state["conv1.weight"])
    assert load_network(torchvision()).preprocessing == {}


def test_what_the_settings_say_goes_before_what_the_weights_bring(imagenet: Path) -> None:
    stated = {"resize": 256, "interpolation": "bicubic", "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}

    def preprocessing(**changes: Any) -> Preprocessing:
        return parts_of(load_data(settings(imagenet, **changes), (3, 224, 224), stated))[0].preprocessing

    assert preprocessing() == Preprocessing((3, 224, 224), 256, (0.5,) * 3, (0.25,) * 3, "bicubic")
    changes = {"resize": 230, "interpolation": "bilinear", "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}
    for key, value in changes.items():
        changed = preprocessing(**{key: value})
        assert getattr(changed, key) == value
        assert all(getattr(changed, other) == stated[other] for other in stated if other != key)


def test_weights_of_other_crops_and_unknown_names() -> None:
    assert load_network(torchvision(name="efficientnet_b1", weights_name="IMAGENET1K_V2")).image_shape == (3, 240, 240)
    with pytest.raises(NetworkError, match=r"'IMAGENET1K_V3' .* resnet18 .*did you mean 'IMAGENET1K_V1'"):
        load_network(torchvision(weights_name="IMAGENET1K_V3"))
    with pytest.raises(ConfigurationError, match="weights_name is for source torchvision"):
        parse_config({"network": {"source": "zoo", "name": "resnet20_fashion_mnist", "weights_name": "IMAGENET1K_V1"}})


def test_timms_weights_bring_theirs() -> None:
    network = NetworkSettings(source="timm", name="resnet18.a1_in1k", weights="random")
    loaded = load_network(network)
    assert loaded.preprocessing == {
        "resize": int(224 / 0.95), "interpolation": "bicubic", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    }  # fmt: skip
    with pytest.raises(NetworkError, match="timm has no weights 'a1_in2k' of resnet18"):
        load_network(network.model_copy(update={"name": "resnet18.a1_in2k"}))


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "not a state_dict"), (b"junk" * 50, "not a state_dict"), (None, "and no state_dict")],
)
def test_pth_files_that_will_not_do_are_refused(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save([1, 2], path) if content is None else path.write_bytes(content)
    with pytest.raises(NetworkError, match=expected):
        load_network(torchvision(weights=path))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(61, 40), (40, 61), (37, 37), (24, 90), (200, 33)])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_torchvisions_bit_for_bit(tmp_path: Path, interpolation: str, size: tuple[int, int], channels: int) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    rng = np.random.default_rng(size[0] * 1000 + size[1])
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    preprocessing = Preprocessing((channels, 32, 29), 37, (0.4,) * channels, (0.3,) * channels, interpolation)
    resized = F.resize(image.convert("RGB" if channels == 3 else "L"), [37], InterpolationMode(interpolation), antialias=True)
    expected = F.pil_to_tensor(F.center_crop(resized, [32, 29]))
    encoded = ImageFile(tmp_path, tmp_path / "image.png")
    assert torch.equal(preprocessing.pixels(encoded), expected)
    assert torch.equal(preprocessing(encoded), (expected.float() / 255 - torch.full((channels, 1, 1), 0.4)) / 0.3)


def test_a_folder_is_listed_as_torchvision_lists_it(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert SUFFIXES == IMG_EXTENSIONS
    for name in ("b/2.JPG", "b/10.png", "b/deep/1.jpg", "b/note.txt", "a/z.webp", "a/.hidden.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, "png")
    (tmp_path / "linked").symlink_to(tmp_path / "b", target_is_directory=True)
    listing = folder_source._list(tmp_path, tmp_path)
    theirs = ImageFolder(str(tmp_path))
    assert [(str(image), label) for image, label in zip(listing.images, listing.labels or (), strict=True)] == theirs.samples
    assert list(listing.classes or ()) == theirs.classes
