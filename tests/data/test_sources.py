"""Sources: networks and images arrive whole, checked and the same each time, or are refused in words that help."""

import os
import socket
import sys
import textwrap
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clado.data import zoo
from clado.data.decoding import EncodedSlice
from clado.data.images import ImageSlice, KeptSlice, MemorySlice, as_slice, check_batch, check_slice, kept
from clado.data.sources import LoadedNetwork, load_data, load_network
from clado.data.sources.folder import ImageFile
from clado.errors import DataError, NetworkError
from clado.settings.schema import DataSettings, NetworkSettings


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a source opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# --- networks -------------------------------------------------------------------------------------------------------

NET = """
    import torch
    from torch import nn

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.bn = nn.BatchNorm2d(4)
            self.a = nn.Linear(4, 4, bias=False)
            self.b = nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight
            self.drop = nn.Dropout()

        def forward(self, x):
            return self.b(self.a(self.drop(self.bn(self.conv(x)).mean((2, 3)))))

    def make():
        return Tied()

    def with_example():
        return Tied(), torch.ones(1, 3, 8, 8)

    def many_examples():
        return Tied(), torch.ones(5, 3, 8, 8)

    def nothing():
        return None

    def three():
        return Tied(), torch.ones(1, 3, 8, 8), 1

    def flat_example():
        return Tied(), torch.ones(3, 8, 8)

    def nan_example():
        return Tied(), torch.full((2, 3, 8, 8), float("nan"))

    def half():
        return Tied().half()

    def broken():
        raise RuntimeError("no luck")

    constant = 3
"""
MakeModule = Callable[[str], str]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeModule:
    """Writes a module into the current directory, under a name of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(text: str) -> str:
        name = f"net_{uuid4().hex}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        return name

    return write


def factory(name: str, **settings: Any) -> LoadedNetwork:
    return load_network(NetworkSettings(source="factory", name=name, **{"image_shape": (3, 8, 8), **settings}))


def test_a_factory_of_the_current_directory(module: MakeModule) -> None:
    name = module(NET)
    loaded = factory(f"{name}:make")
    assert loaded.example_input.shape == (2, 3, 8, 8)
    assert loaded.example_input.dtype == torch.float32
    assert loaded.image_shape == (3, 8, 8)
    assert name in loaded.description
    assert not any(part.training for part in loaded.model.modules())
    assert loaded.model(loaded.example_input).shape == (2, 4)


def test_a_factory_may_import_its_neighbours(module: MakeModule) -> None:
    neighbour = module(NET)
    name = module(f"def make():\n    from {neighbour} import make\n    return make()\n")
    assert factory(f"{name}:make").model.conv.weight.shape == (4, 3, 3, 3)


def test_the_factorys_example_is_used(module: MakeModule) -> None:
    name = module(NET)
    one = factory(f"{name}:with_example", image_shape=None)
    many = factory(f"{name}:many_examples", image_shape=None)
    for loaded in (one, many):
        assert torch.equal(loaded.example_input, torch.ones(2, 3, 8, 8))
    with pytest.raises(NetworkError, match=r"shape.*\[3, 224, 224\].*example"):
        factory(f"{name}:make", image_shape=None)
    with pytest.raises(DataError, match=r"\(3, 8, 8\); expected \(3, 9, 9\)"):
        factory(f"{name}:with_example", image_shape=(3, 9, 9))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("mke", "no function 'mke' (did you mean 'make'?)"),
        ("constant", "no function 'constant'"),
        ("nothing", "returned NoneType; expected a torch.nn.Module"),
        ("three", "returned (Tied, Tensor, int)"),
        ("broken", "raised RuntimeError: no luck"),
        ("half", "conv.weight is torch.float16"),
        ("flat_example", "expected four axes"),
        ("nan_example", "NaN or infinite"),
    ],
)
def test_bad_factories_are_refused(module: MakeModule, function: str, expected: str) -> None:
    name = module(NET)
    with pytest.raises((NetworkError, DataError)) as refusal:
        factory(f"{name}:{function}")
    assert expected in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import no_such_module_at_all\n", "importing .* failed: No module named 'no_such_module_at_all'"),
        ("def make(:\n", "importing .* failed: SyntaxError"),
        ("1 / 0\n", "importing .* failed: ZeroDivisionError"),
    ],
)
def test_modules_that_do_not_import_are_refused(module: MakeModule, text: str, expected: str) -> None:
    with pytest.raises(NetworkError, match=expected):
        factory(f"{module(text)}:make")


@pytest.mark.parametrize("name", ["no_such_package:make", "no_such_package.inner:make", "json.no_such:make"])
def test_modules_that_are_not_there_are_named(module: MakeModule, name: str) -> None:
    with pytest.raises(NetworkError, match=r"no module '(no_such_package|json\.no_such)'"):
        factory(name)


def test_every_process_builds_the_same_network(module: MakeModule) -> None:
    """Random weights are drawn from a seed, and the caller's random numbers are left as they were."""
    name = module(NET)
    before = torch.get_rng_state()
    first = factory(f"{name}:make")
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    second = factory(f"{name}:make")
    assert first.weights_sha256 == second.weights_sha256
    assert torch.equal(first.example_input, second.example_input)


def test_the_weights_hash_sees_every_tensor(module: MakeModule) -> None:
    name = module(NET)
    hashes = {factory(f"{name}:make").weights_sha256}
    names = list(factory(f"{name}:make").model.state_dict())
    for key in names:
        loaded = factory(f"{name}:make")
        with torch.no_grad():
            loaded.model.state_dict()[key].view(-1)[-1:].add_(1)
        hashes.add(loaded.weights_sha256)
    tied = 1  # a.weight is b.weight
    assert len(hashes) == 1 + len(names) - tied


# --- weights files --------------------------------------------------------------------------------------------------


def state_of(loaded: LoadedNetwork) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}


def test_a_weights_file_replaces_the_weights(module: MakeModule, tmp_path: Path) -> None:
    name = module(NET)
    plain = factory(f"{name}:make")
    state = state_of(plain)
    state["conv.weight"] += 1
    save_file(state, tmp_path / "own.safetensors")
    loaded = factory(f"{name}:make", weights=tmp_path / "own.safetensors")
    for key, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, state[key])
    assert loaded.weights_sha256 != plain.weights_sha256
    assert "own.safetensors" in loaded.description


def test_a_shared_tensor_need_be_stored_once_and_batches_need_no_count(module: MakeModule, tmp_path: Path) -> None:
    name = module(NET)
    state = state_of(factory(f"{name}:make"))
    del state["b.weight"], state["bn.num_batches_tracked"]
    state["a.weight"] = torch.eye(4)
    save_file(state, tmp_path / "own.safetensors")
    model = factory(f"{name}:make", weights=tmp_path / "own.safetensors").model
    assert torch.equal(model.b.weight, torch.eye(4))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.pop("conv.bias"), ["missing conv.bias"]),
        (lambda s: s.update(extra=torch.ones(1)), ["unexpected extra"]),
        (lambda s: s.update({"conv.bias": torch.ones(5)}), ["conv.bias is (5,), the network's (4,)"]),
        (lambda s: (s.pop("conv.bias"), s.update(extra=torch.ones(1))), ["missing conv.bias", "unexpected extra"]),
        (
            lambda s: s.clear() or s.update({f"x{k}": torch.ones(1) for k in range(9)}),
            ["unexpected x0, x1, x2, x3, x4 and 4 more"],
        ),
        (lambda s: s["bn.running_var"].fill_(float("inf")), ["bn.running_var has 4 NaN or infinite values of 4"]),
        (lambda s: s["conv.weight"][0, 0, 0].fill_(float("nan")), ["conv.weight has 3 NaN or infinite values of 108"]),
    ],
)
def test_weights_that_do_not_fit_are_named(
    module: MakeModule, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], expected: list[str]
) -> None:
    name = module(NET)
    state = state_of(factory(f"{name}:make"))
    change(state)
    save_file(state, tmp_path / "own.safetensors")
    with pytest.raises(NetworkError) as refusal:
        factory(f"{name}:make", weights=tmp_path / "own.safetensors")
    for words in expected:
        assert words in str(refusal.value)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_of_a_training_script_is_read(module: MakeModule, tmp_path: Path, key: str, prefix: str) -> None:
    name = module(NET)
    state = state_of(factory(f"{name}:make"))
    state["conv.bias"] += 1
    checkpoint = {"epoch": 3, key: {prefix + tensor: value for tensor, value in state.items()}, "optimizer": {"lr": 0.1}}
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    loaded = factory(f"{name}:make", weights=tmp_path / "checkpoint.pth")
    assert torch.equal(loaded.model.state_dict()["conv.bias"], state["conv.bias"])


def test_a_file_without_a_state_is_answered_with_what_it_holds(module: MakeModule, tmp_path: Path) -> None:
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "other.pth")
    with pytest.raises(NetworkError, match=r"the keys epoch, optimizer and no state_dict; expected .*under state_dict"):
        factory(f"{module(NET)}:make", weights=tmp_path / "other.pth")


def test_weights_files_that_are_not_there_or_not_safetensors(module: MakeModule, tmp_path: Path) -> None:
    name = module(NET)
    with pytest.raises(NetworkError, match=r"none\.safetensors does not exist"):
        factory(f"{name}:make", weights=tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("these are not weights")
    with pytest.raises(NetworkError, match="not a readable safetensors file"):
        factory(f"{name}:make", weights=tmp_path / "text.safetensors")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(NetworkError, match="not a readable safetensors file"):
        factory(f"{name}:make", weights=tmp_path / "empty.safetensors")


# --- torchvision and the zoo ----------------------------------------------------------------------------------------


def test_torchvision_by_name_with_a_local_file(tmp_path: Path) -> None:
    random = load_network(NetworkSettings(source="torchvision", name="mobilenet_v3_small", weights="random"))
    assert random.example_input.shape == (2, 3, 224, 224)
    assert "random weights" in random.description
    state = state_of(random)
    state["classifier.3.bias"] += 1
    save_file(state, tmp_path / "own.safetensors")
    settings = NetworkSettings(
        source="torchvision", name="mobilenet_v3_small", weights=tmp_path / "own.safetensors", image_shape=(3, 64, 64)
    )
    loaded = load_network(settings)
    assert loaded.example_input.shape == (2, 3, 64, 64)
    assert torch.equal(loaded.model.state_dict()["classifier.3.bias"], state["classifier.3.bias"])


def test_torchvision_networks_are_named_when_unknown() -> None:
    with pytest.raises(NetworkError, match=r"no network 'resnet19' \(did you mean 'resnet1[018]+'\?\).*vit_b_16"):
        load_network(NetworkSettings(source="torchvision", name="resnet19", weights="random"))


def test_a_torchvision_network_that_warns_of_its_initialisation() -> None:
    assert not load_network(NetworkSettings(source="torchvision", name="googlenet", weights="random")).model.training


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_published_weights_come_with_the_input_that_they_were_trained_on(name: str) -> None:
    """Torchvision changes the normalisation of these two if its own weights are requested."""
    from clado.data.sources import torchvision as source

    published = NetworkSettings(source="torchvision", name=name, weights="random", weights_name="IMAGENET1K_V1")
    assert source.load_network(published)[0].transform_input
    assert not source.load_network(published.model_copy(update={"weights_name": None}))[0].transform_input


def test_names_of_before_are_read_as_torchvision_reads_them(tmp_path: Path) -> None:
    from torchvision.models import DenseNet, VisionTransformer

    from clado.data.sources import load_weights

    def check(make: Callable[[], nn.Module], renamed: Callable[[str], str], suffix: str = ".pth") -> None:
        torch.manual_seed(0)
        model = make()
        state = {renamed(name): tensor for name, tensor in state_of(LoadedNetwork(model, torch.zeros(1), "")).items()}
        file = tmp_path / f"file{suffix}"
        save_file(state, file) if suffix != ".pth" else torch.save(state, file)
        torch.manual_seed(1)
        other = make()
        load_weights(other, file)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))

    check(
        lambda: VisionTransformer(8, 4, 1, 1, 8, 8, num_classes=3),
        lambda name: name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."),
    )
    check(
        lambda: DenseNet(4, (2, 1), 8, num_classes=3),
        lambda name: name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.") if "denselayer" in name else name,
    )
    for suffix in (".pth", ".safetensors"):  # its modules ask which version saved them, which neither file says
        from torchvision.models import MNASNet

        check(lambda: MNASNet(0.2, num_classes=3), lambda name: name, suffix)


def test_timm_by_name_for_the_images_asked_for() -> None:
    pytest.importorskip("timm")
    convolutional = load_network(NetworkSettings(source="timm", name="test_resnet", weights="random"))
    assert convolutional.example_input.shape[1] == 3
    transformer = load_network(NetworkSettings(source="timm", name="test_vit", weights="random", image_shape=(1, 32, 32)))
    assert transformer.model(torch.randn(2, 1, 32, 32)).shape[0] == 2
    with pytest.raises(NetworkError, match=r"no network 'test_vitt' \(did you mean"):
        load_network(NetworkSettings(source="timm", name="test_vitt", weights="random"))


ZOO_NAME = "resnet20_fashion_mnist"


@pytest.fixture
def small_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of 20, 20 and 50 random images and an untrained network, with a true manifest."""
    import hashlib
    import json

    folder = tmp_path / "zoo"
    folder.mkdir()
    draw = np.random.default_rng(0)
    arrays = {}
    for part, n in (("calibration", 20), ("sensitivity", 20), ("test", 50)):
        arrays[f"{part}_images"] = draw.integers(0, 256, (n, 28, 28), np.uint8)
        arrays[f"{part}_labels"] = draw.integers(0, 10, n).astype(np.uint8)
    np.savez(folder / "fashion_mnist_test.npz", **{k: v for k, v in arrays.items() if "test" in k})
    np.savez(folder / "fashion_mnist_train_slices.npz", **{k: v for k, v in arrays.items() if "test" not in k})
    with torch.random.fork_rng():
        save_file(zoo.NETWORKS[ZOO_NAME]().state_dict(), folder / f"{ZOO_NAME}.safetensors")
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"sha256": digests}))
    monkeypatch.setattr(zoo, "ZOO", folder)
    return folder


def zoo_settings(**settings: Any) -> DataSettings:
    return DataSettings(**{"sensitivity_images": 16, "calibration_images": 8, **settings})


def test_the_zoos_network_has_the_files_weights(small_zoo: Path) -> None:
    loaded = load_network(NetworkSettings(name=ZOO_NAME))
    file = load_file(small_zoo / f"{ZOO_NAME}.safetensors")
    assert {k: v.sum() for k, v in loaded.model.state_dict().items()} == {k: v.sum() for k, v in file.items()}
    assert loaded.example_input.shape == (2, 1, 28, 28)
    with pytest.raises(NetworkError, match=r"'resnet20_fashion'.*did you mean 'resnet20_fashion_mnist'"):
        load_network(NetworkSettings.model_construct(source="zoo", name="resnet20_fashion", weights=None, image_shape=None))


@pytest.mark.parametrize(
    "name", [f"{ZOO_NAME}.safetensors", "fashion_mnist_test.npz", "fashion_mnist_train_slices.npz", "manifest.json"]
)
def test_a_damaged_or_missing_zoo_file_is_refused(small_zoo: Path, name: str) -> None:
    def load() -> None:
        load_network(NetworkSettings(name=ZOO_NAME))
        load_data(zoo_settings(), (1, 28, 28))

    load()
    raw = bytearray((small_zoo / name).read_bytes())
    if name != "manifest.json":
        raw[len(raw) // 2] ^= 1
        (small_zoo / name).write_bytes(raw)
        with pytest.raises((NetworkError, DataError), match=f"{name} is damaged"):
            load()
    (small_zoo / name).unlink()
    with pytest.raises((NetworkError, DataError), match=f"{name} is missing"):
        load()


def test_zoo_images_are_drawn_by_seed_and_nested(small_zoo: Path) -> None:
    small, large, other = (
        load_data(zoo_settings(**change), (1, 28, 28))
        for change in (
            {},
            {"sensitivity_images": 20, "calibration_images": 20, "validation_images": 30},
            {"seed": 1, "validation_images": 30},
        )
    )
    for part in ("sensitivity", "calibration"):
        a, b, c = (getattr(slices, part) for slices in (small, large, other))
        assert torch.equal(a.load(0, len(a))[0], b.load(0, len(a))[0])
        assert a.sha256 != b.sha256
        assert a.sha256 != c.sha256
    assert len(small.validation) == 50
    assert len(large.validation) == 30
    assert large.validation.sha256 != other.validation.sha256
    again = load_data(zoo_settings(), (1, 28, 28))
    assert again.sensitivity.sha256 == small.sensitivity.sha256
    assert again.validation.sha256 == small.validation.sha256


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sensitivity_images": 21}, "data.sensitivity_images asks for 21 images; the zoo ships 20"),
        ({"calibration_images": 21}, "data.calibration_images asks for 21 images; the zoo ships 20"),
        ({"validation_images": 51}, "data.validation_images asks for 51 images; the zoo ships 50"),
    ],
)
def test_more_images_than_the_zoo_has_are_refused(small_zoo: Path, change: dict[str, int], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        load_data(zoo_settings(**change), (1, 28, 28))


def test_zoo_images_are_for_the_zoos_shape(small_zoo: Path) -> None:
    with pytest.raises(DataError, match=r"\(1, 28, 28\).*\(3, 224, 224\)"):
        load_data(zoo_settings(), (3, 224, 224))


# --- folders --------------------------------------------------------------------------------------------------------

SHAPE = (3, 16, 16)


def draw_images(folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (20, 24), mode: str = "RGB") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(zlib.crc32(os.fsencode(f"{folder.name} {seed}")))
    for k in range(count):
        pixels = draw.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{k:03}.png")


def folder_settings(path: Path, **settings: Any) -> DataSettings:
    return DataSettings(
        **{"source": "folder", "path": path, "sensitivity_images": 4, "calibration_images": 3, "sample_blocks": 1, **settings}
    )


def files_of(images: ImageSlice) -> list[Path]:
    assert isinstance(images, EncodedSlice)
    return [image.path for image in images.images if isinstance(image, ImageFile)]


def test_a_folder_reads_as_torchvision_does(tmp_path: Path) -> None:
    """The same files, classes and pixels as ImageFolder with Resize, CenterCrop, ToTensor and Normalize."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    draw_images(tmp_path / "cat", 6)
    draw_images(tmp_path / "ant", 5, size=(33, 18))
    draw_images(tmp_path / "cow", 2, mode="L")
    slices = load_data(folder_settings(tmp_path, resize=17), SHAPE)
    steps = [
        transforms.Resize(17),
        transforms.CenterCrop(16),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    reference = ImageFolder(str(tmp_path), transforms.Compose(steps))
    by_file = {Path(file): reference[k] for k, (file, _) in enumerate(reference.samples)}
    for part in (slices.calibration, slices.sensitivity, slices.validation):
        images, labels = part.load(0, len(part))
        assert labels is not None
        assert part.num_classes == 3
        check_batch(images, labels, SHAPE, 3)
        for file, image, label in zip(files_of(part), images, labels, strict=True):
            assert torch.allclose(image, by_file[file][0], rtol=0, atol=1e-6)
            assert int(label) == by_file[file][1]


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        draw_images(tmp_path / name, 4)
    before = load_data(folder_settings(tmp_path), SHAPE)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    draw_images(tmp_path / ".cache", 2)
    after = load_data(folder_settings(tmp_path), SHAPE)
    for name in ("sensitivity", "calibration", "validation"):
        assert getattr(after, name).sha256 == getattr(before, name).sha256
        assert getattr(after, name).num_classes == 2


@pytest.mark.parametrize(
    ("sensitivity", "calibration", "validation", "seed"), [(4, 3, None, 0), (1, 0, 5, 1), (9, 9, 2, 2), (10, 9, 1, 3)]
)
def test_slices_of_one_folder_are_disjoint(
    tmp_path: Path, sensitivity: int, calibration: int, validation: int | None, seed: int
) -> None:
    draw_images(tmp_path / "a", 12)
    draw_images(tmp_path / "b", 8)
    settings = folder_settings(
        tmp_path, sensitivity_images=sensitivity, calibration_images=calibration, validation_images=validation, seed=seed
    )
    slices = load_data(settings, SHAPE)
    parts = [files_of(part) for part in (slices.sensitivity, slices.calibration, slices.validation)]
    files = [file for part in parts for file in part]
    assert len(files) == len(set(files))
    assert [len(part) for part in parts] == [sensitivity, calibration, validation or 20 - sensitivity - calibration]
    assert len(slices.calibration.load(0, calibration)[0]) == calibration
    smaller = load_data(settings.model_copy(update={"sensitivity_images": max(1, sensitivity // 2)}), SHAPE)
    assert files_of(smaller.sensitivity) == parts[0][: max(1, sensitivity // 2)]
    assert files_of(smaller.calibration) == parts[1]


def test_slices_of_train_and_val(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        draw_images(tmp_path / "train" / name, 4)
    draw_images(tmp_path / "val" / "c", 5)
    draw_images(tmp_path / "val" / "b", 2)
    slices = load_data(folder_settings(tmp_path), SHAPE)
    measured = files_of(slices.sensitivity) + files_of(slices.calibration)
    assert len(set(measured)) == 7
    assert all(file.is_relative_to(tmp_path / "train") for file in measured)
    assert all(file.is_relative_to(tmp_path / "val") for file in files_of(slices.validation))
    labels = slices.validation.load(0, 7)[1]
    assert labels is not None
    assert labels.tolist() == [{"a": 0, "b": 1, "c": 2}[file.parent.name] for file in files_of(slices.validation)]
    assert labels.tolist() == [1] * 2 + [2] * 5
    few = load_data(folder_settings(tmp_path, validation_images=3), SHAPE)
    more = load_data(folder_settings(tmp_path, validation_images=5), SHAPE)
    assert files_of(few.validation) == files_of(more.validation)[:3]


def test_a_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    draw_images(tmp_path, 10)
    (tmp_path / "notes.txt").write_text("not an image")
    slices = load_data(folder_settings(tmp_path), SHAPE)
    images, labels = slices.sensitivity.load(1, 3)
    assert images.shape == (2, *SHAPE)
    assert labels is None
    assert slices.sensitivity.num_classes is None
    assert len(slices.validation) == 3


def test_folders_without_images_beside_images_are_no_classes(tmp_path: Path) -> None:
    draw_images(tmp_path, 10)
    (tmp_path / "thumbs").mkdir()
    assert load_data(folder_settings(tmp_path), SHAPE).sensitivity.num_classes is None


def test_names_may_be_of_any_bytes(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"the"):
        draw_images(tmp_path / os.fsdecode(name), 6)
    images = load_data(folder_settings(tmp_path), SHAPE).sensitivity
    assert len(images.sha256) == 64
    assert len(images.load(0, 4)[0]) == 4


def test_grey_networks_get_grey_images(tmp_path: Path) -> None:
    draw_images(tmp_path, 9)
    slices = load_data(folder_settings(tmp_path, mean=(0.0,), std=(1.0,)), (1, 28, 20))
    image = slices.sensitivity.load(0, 1)[0]
    assert image.shape == (1, 1, 28, 20)
    assert 0 <= image.min() < image.max() <= 1


def test_the_folders_hash_covers_content_labels_order_and_preprocessing(tmp_path: Path) -> None:
    draw_images(tmp_path / "a", 6)
    draw_images(tmp_path / "b", 6)

    def digest(**settings: Any) -> str:
        return load_data(folder_settings(tmp_path, **settings), SHAPE).sensitivity.sha256

    plain = digest()
    assert digest() == plain
    assert digest(validation_images=2) == plain
    assert len({plain, digest(seed=1), digest(resize=18), digest(std=(1.0, 1.0, 1.0)), digest(sensitivity_images=3)}) == 5
    (tmp_path / "0").mkdir()
    draw_images(tmp_path / "0", 0)
    assert digest() != plain  # every label is one higher
    (tmp_path / "0").rmdir()
    assert digest() == plain
    file = files_of(load_data(folder_settings(tmp_path), SHAPE).sensitivity)[0]
    raw = bytearray(file.read_bytes())
    raw[-20] ^= 1
    file.write_bytes(raw)
    assert digest() != plain


def test_a_moved_folder_keeps_its_hash(tmp_path: Path) -> None:
    draw_images(tmp_path / "here" / "a", 9)
    before = load_data(folder_settings(tmp_path / "here"), SHAPE).sensitivity.sha256
    (tmp_path / "here").rename(tmp_path / "there")
    assert load_data(folder_settings(tmp_path / "there"), SHAPE).sensitivity.sha256 == before


def test_reading_the_folder_decodes_nothing(tmp_path: Path) -> None:
    draw_images(tmp_path / "a", 9)
    for file in (tmp_path / "a").iterdir():
        file.write_bytes(b"not a picture")
    slices = load_data(folder_settings(tmp_path), SHAPE)
    assert len(slices.validation) == 2
    with pytest.raises(DataError, match="cannot be read"):
        slices.validation.load(0, 1)


@pytest.mark.parametrize("damage", [b"", b"not a picture", None])
def test_an_unreadable_image_is_named(tmp_path: Path, damage: bytes | None) -> None:
    draw_images(tmp_path / "a", 9)
    slices = load_data(folder_settings(tmp_path), SHAPE)
    file = files_of(slices.sensitivity)[2]
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2] if damage is None else damage)
    with pytest.raises(DataError, match=str(file)):
        check_slice(slices.sensitivity)


def test_folders_that_will_not_do_are_refused(tmp_path: Path) -> None:
    def refused(path: Path, shape: tuple[int, int, int] = SHAPE, **settings: Any) -> str:
        with pytest.raises(DataError) as refusal:
            load_data(folder_settings(path, **settings), shape)
        return str(refusal.value)

    assert "nowhere is not a folder" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused(tmp_path / "empty")
    (tmp_path / "hollow" / "a").mkdir(parents=True)
    assert "holds no images" in refused(tmp_path / "hollow")

    draw_images(tmp_path / "few" / "a", 7)
    said = refused(tmp_path / "few")
    assert "holds 7 images; 8 are needed" in said
    assert "4 for sensitivity and 3 for calibration, and at least 1 for validation" in said
    assert "17 are needed" in refused(tmp_path / "few", validation_images=10)

    draw_images(tmp_path / "pair" / "train" / "a", 7)
    draw_images(tmp_path / "pair" / "val" / "a", 2)
    assert "val holds 2 images; 3 are needed" in refused(tmp_path / "pair", validation_images=3)
    assert "train holds 7 images; 8 are needed" in refused(tmp_path / "pair", sensitivity_images=5)
    draw_images(tmp_path / "pair" / "val" / "z", 1)
    assert "lacks: z" in refused(tmp_path / "pair")
    draw_images(tmp_path / "mixed" / "train" / "a", 7)
    draw_images(tmp_path / "mixed" / "val", 2)
    assert "class sub-folders" in refused(tmp_path / "mixed")
    draw_images(tmp_path / "deep" / "train" / "a", 9)
    assert "one level down" in refused(tmp_path / "deep")

    draw_images(tmp_path / "good" / "a", 9)
    assert "4 channels" in refused(tmp_path / "good", (4, 16, 16))
    assert "data.mean has 3 values" in refused(tmp_path / "good", (1, 16, 16))
    assert "data.std has 3 values" in refused(tmp_path / "good", (1, 16, 16), mean=(0.5,))
    assert "data.resize is 15 pixels" in refused(tmp_path / "good", resize=15)


# --- images in memory -----------------------------------------------------------------------------------------------

X = torch.arange(6 * 3 * 4 * 5, dtype=torch.float32).reshape(6, 3, 4, 5)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    ("images", "labels", "expected"),
    [
        (X.numpy(), Y, "ndarray; expected a torch tensor"),
        (X[0], None, "shape (3, 4, 5); expected four axes (N, C, H, W); a single image becomes a batch with"),
        (X.flatten(), None, "expected four axes"),
        (X[:0], None, "empty"),
        (X[:, :, :3], Y, "shape (3, 3, 5); expected (3, 4, 5)"),
        (X[:, :1], Y, "shape (1, 4, 5); expected (3, 4, 5)"),
        (X.double(), Y, "torch.float64; expected torch.float32: images.float()"),
        (X.to(torch.uint8), Y, "torch.uint8; expected torch.float32: images.float() / 255"),
        (X.where(X != 70, torch.nan), Y, "NaN or infinite pixels in 1 of 6 images, the first at index 1"),
        (X / (X > 100), Y, "the first at index 0"),
        (X, Y.tolist(), "labels of type list"),
        (X, Y.float(), "labels of torch.float32"),
        (X, Y > 0, "labels of torch.bool"),
        (X, Y[:5], "labels of shape (5,) for 6 images; expected (6,)"),
        (X, Y[:, None], "labels of shape (6, 1) for 6 images"),
        (X, Y + 1, "labels from 1 to 3; expected labels within 0..2, for 3 classes"),
        (X, Y - 1, "labels from -1 to 1; expected labels within 0..2"),
    ],
)
def test_bad_batches_are_refused(images: object, labels: object, expected: str) -> None:
    with pytest.raises(DataError) as refusal:
        check_batch(images, labels, (3, 4, 5), 3, "mine")
    assert expected in str(refusal.value)
    assert str(refusal.value).startswith("mine ")


def test_good_batches_pass() -> None:
    check_batch(X, Y, (3, 4, 5), 3)
    check_batch(X, Y.int())
    check_batch(X, None, (3, 4, 5))
    with pytest.raises(DataError, match="at least 0"):
        check_batch(X, Y - 1)


LABELLED: dict[str, Callable[[], object]] = {
    "a pair": lambda: (X, Y),
    "a list of pairs": lambda: [(X[:4], Y[:4]), (X[4:], Y[4:])],
    "a generator": lambda: ((X[k : k + 1], Y[k : k + 1]) for k in range(6)),
    "a data loader": lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 4),
    "32-bit labels": lambda: [[X, Y.int()]],
    "a slice": lambda: MemorySlice(X, Y),
}
UNLABELLED: dict[str, Callable[[], object]] = {
    "a tensor": lambda: X,
    "a list": lambda: [X[:1], X[1:]],
    "a tuple of two batches": lambda: (X[:3], X[3:]),
    "a data loader": lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), 5),
    "a plain data loader": lambda: torch.utils.data.DataLoader(X, 5),  # type: ignore[arg-type]
    "a gradient": lambda: X.clone().requires_grad_(),
    "pairs without labels": lambda: [(X, None)],
}


@pytest.mark.parametrize("form", LABELLED)
def test_every_form_of_labelled_data_is_one_slice(form: str) -> None:
    images = as_slice(LABELLED[form]())
    x, y = images.load(0, len(images))
    assert y is not None
    assert y.dtype == torch.int64
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    assert images.image_shape == (3, 4, 5)
    assert images.sha256 == MemorySlice(X, Y).sha256
    assert torch.equal(images.load(2, 4)[0], X[2:4])


@pytest.mark.parametrize("form", UNLABELLED)
def test_every_form_of_unlabelled_data_is_one_slice(form: str) -> None:
    images = as_slice(UNLABELLED[form]())
    x, y = images.load(0, len(images))
    assert y is None
    assert torch.equal(x, X)
    assert not x.requires_grad
    assert images.sha256 == MemorySlice(X).sha256


def test_the_hash_of_a_slice_sees_pixels_labels_shape_and_order() -> None:
    variants = [
        (X, Y),
        (X, None),
        (X.flip(0), Y),
        (X, Y.flip(0)),
        (X.reshape(6, 5, 4, 3), Y),
        (X + (X == 7), Y),
        (X[:5], Y[:5]),
        (X, Y + 1),
    ]
    assert len({MemorySlice(x, y).sha256 for x, y in variants}) == len(variants)
    turned = X.contiguous(memory_format=torch.channels_last)
    assert MemorySlice(turned, Y).sha256 == MemorySlice(X, Y).sha256


class Reading(MemorySlice):
    """Remembers what was read of it."""

    def load(self, start, stop):
        self.read = [*getattr(self, "read", []), *range(start, stop)]
        return super().load(start, stop)


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_half_of_the_sensitivity_images_is_held_out_and_the_others_are_those_of_a_smaller_set(small_zoo, tmp_path, count):
    for name in ("one", "two"):
        draw_images(tmp_path / "images" / name, 8)
    sources = {
        "zoo": lambda n: load_data(zoo_settings(sensitivity_images=n, sample_blocks=1), (1, 28, 28)),
        "folder": lambda n: load_data(folder_settings(tmp_path / "images", sensitivity_images=n), SHAPE),
    }
    for name, of in sources.items():
        count = count if name == "zoo" else min(count, 4)
        whole, split = of(count), of(count).held_out()
        if count == 1:
            assert split.decision is None
            continue
        measured, decision = split.sensitivity, split.decision
        assert len(measured) - len(decision) in (0, 1)
        assert len(measured) + len(decision) == count
        for k, (part, first) in enumerate(((measured, 0), (decision, len(measured)))):
            images, labels = part.load(0, len(part))
            expected, expected_labels = whole.sensitivity.load(first, first + len(part))
            assert torch.equal(images, expected), k
            assert torch.equal(labels, expected_labels)
        # so that a store may grow by more images
        assert measured.sha256 == of(len(measured)).sensitivity.sha256
        assert decision.sha256 != measured.sha256
        assert decision in split.used
        assert split.calibration.sha256 == whole.calibration.sha256


@pytest.mark.parametrize("labels", [Y, None], ids=["labelled", "unlabelled"])
def test_a_slice_that_keeps_what_it_reads_gives_the_same_and_reads_each_image_once(labels):
    whole, reading = MemorySlice(X, labels), Reading(X, labels)
    keeping = KeptSlice(reading)
    assert (len(keeping), keeping.image_shape, keeping.sha256) == (len(X), whole.image_shape, whole.sha256)
    for start, stop in [(2, 4), (0, 2), (1, 4), (4, 6), (0, 6), (3, 3), (5, 99)]:
        (images, labels_read), (expected, expected_labels) = keeping.load(start, min(stop, 6)), whole.load(start, min(stop, 6))
        assert torch.equal(images, expected)
        assert (labels_read is None and expected_labels is None) or torch.equal(labels_read, expected_labels)
    assert sorted(reading.read) == sorted(set(reading.read)) == list(range(6))


def test_only_what_fits_into_the_limit_is_kept_and_what_does_not_fit_the_protocol_is_refused_as_ever():
    size = X.numel() * 4
    other = slice_of(X)
    assert isinstance(kept(other, size), KeptSlice)
    assert kept(other, size - 1) is other
    in_memory = MemorySlice(X)
    assert kept(in_memory, size) is in_memory
    for wrong in (X.to(torch.uint8), X[..., :2]):
        with pytest.raises(DataError):
            check_slice(KeptSlice(slice_of(X, wrong)), tuple(X.shape[1:]))


def slice_of(images: Tensor, labels: Tensor | None = None) -> ImageSlice:
    """A user-defined slice class, which returns other images than it claims."""

    class Other:
        image_shape, num_classes, sha256 = tuple(images.shape[1:]), None, "0"

        def __len__(self) -> int:
            return len(images)

        def load(self, start: int, stop: int) -> tuple[Tensor, None]:
            return (images if labels is None else labels)[start:stop], None

    return Other()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (3, "data is a int"),
        ([], "data is empty"),
        (iter(()), "already read"),
        ([X, X[:, :, :2]], "mixed size: batch 1 has shape (3, 2, 5), batch 0 has (3, 4, 5)"),
        ([X, X[:, :2]], "mixed size"),
        ([(X, Y), X], "batch 1 is unlabelled"),
        ([X, (X, Y)], "batch 1 is labelled"),
        ([(X, Y, Y)], "3 parts"),
        ([X[0], X[1]], "batch 0 holds images of shape (3, 4, 5)"),
        ([(X[0], 1)], "torch.utils.data.DataLoader"),
        ([(X, Y), (X, -Y)], "batch 1 has labels from -2 to 0"),
        ((X, Y.float()), "labels of torch.float32"),
        ("images", "type str"),
    ],
)
def test_bad_data_is_refused(data: object, expected: str) -> None:
    with pytest.raises(DataError) as refusal:
        as_slice(data)
    assert expected in str(refusal.value)


def test_data_of_another_shape_or_range_is_refused() -> None:
    with pytest.raises(DataError, match=r"expected \(3, 32, 32\)"):
        as_slice([X], image_shape=(3, 32, 32))
    with pytest.raises(DataError, match="for 2 classes"):
        as_slice((X, Y), num_classes=2)
    with pytest.raises(DataError, match="images 4 to 5 has labels from 2 to 5"):
        check_slice(
            MemorySlice(X, torch.arange(6).clamp(min=2).where(torch.arange(6) > 4, torch.tensor(2))), num_classes=3, batch=4
        )
    with pytest.raises(DataError, match="empty"):
        check_slice(MemorySlice(X[:0]))


def test_slices_meet_the_interface(tmp_path: Path) -> None:
    draw_images(tmp_path, 9)
    for images in (MemorySlice(X, Y), load_data(folder_settings(tmp_path), SHAPE).sensitivity):
        assert isinstance(images, ImageSlice)
    assert not isinstance(nn.Identity(), ImageSlice)
