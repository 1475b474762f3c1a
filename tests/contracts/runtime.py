"""What every runtime keeps to: subclass `RuntimeContract`, and name the runtime."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clado.exporting.runtimes import Runtime, runtime_of
from clado.grids import QuantizedLayer
from clado.network.network import Network
from clado.quantization.preparation import Recipe, prepare
from clado.quantization.quantizers import WeightQuantizer


class Inverted(nn.Module):
    """What a mobile network is made of: a stem, a depthwise and two 1x1 convolutions, a shortcut, pooling, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(2)
        self.expand = nn.Conv2d(16, 64, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(64)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(64)
        self.project = nn.Conv2d(64, 16, 1)
        self.project_norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.stem_norm(self.stem(x))))
        y = nn.functional.relu6(self.expand_norm(self.expand(x)))
        y = nn.functional.relu6(self.depthwise_norm(self.depthwise(y)))
        return self.head((x + self.project_norm(self.project(y))).mean((2, 3)))


def inverted() -> tuple[Network, Tensor]:
    """The network with batch norms that have seen images, some of their factors negative; and 64 images."""
    torch.manual_seed(0)
    model, x = Inverted(), torch.randn(64, 1, 12, 12)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    with torch.no_grad():
        for _ in range(20):
            model(x)
    return Network(model.eval(), x[:1]), x


def quantized(network: Network, x: Tensor, bits: int, activation_bits: int | None) -> dict[int, QuantizedLayer]:
    """Every layer at one option."""
    space = network.search_space((bits,)).with_activations([] if activation_bits is None else [activation_bits])
    prepared = prepare(network, space, Recipe(WeightQuantizer("mse"), "mse", ()), [x])
    return prepared.deployed(space.widest)[1]


@pytest.mark.numeric
class RuntimeContract:
    """The laws of a runtime."""

    name: str
    """Of the runtime."""
    options: tuple[tuple[int, int | None], ...] = ((8, 8), (8, None), (4, None))
    """(weight bits, activation bits) that the laws are tried at."""

    @pytest.fixture(scope="class")
    @classmethod
    def runtime(cls) -> Runtime:
        return runtime_of(cls.name)

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls) -> tuple[Network, Tensor]:
        return inverted()

    @pytest.fixture(scope="class")
    @classmethod
    def files(cls, runtime, case, tmp_path_factory) -> dict[tuple[int, int | None] | None, Path]:
        """The float network, and the uniform ones."""
        network, x = case
        folder = tmp_path_factory.mktemp("runtime")
        written = {}
        for option in (None, *cls.options):
            layers = {} if option is None else quantized(network, x, *option)
            written[option] = folder / f"{option}-{runtime.file}"
            runtime.write(written[option], network, layers, x)
        return written

    def test_the_float_network_computes_the_same(self, runtime, case, files):
        network, x = case
        logits = torch.from_numpy(runtime.open(files[None], 1)(x.numpy()))
        torch.testing.assert_close(logits, network.logits(x), rtol=1e-3, atol=1e-3)

    def test_quantized_networks_compute_what_was_measured_but_for_a_second_rounding(self, runtime, case, files):
        """A kernel may round results to eight bits that clado leaves in float: a step of 1/255 of a range at each of 6 layers."""
        network, x = case
        for option in self.options:
            layers = quantized(network, x, *option)
            measured = network.logits(x, layers)
            logits = torch.from_numpy(runtime.open(files[option], 1)(x.numpy()))
            spread = float(measured.max() - measured.min())
            assert float((logits - measured).abs().mean()) <= 6 * spread / 255, option
            assert float((logits.argmax(1) == measured.argmax(1)).float().mean()) >= 0.9, option

    def test_another_network_is_told_apart(self, runtime, case, files):
        """The comparison above can fail."""
        network, x = case
        measured = network.logits(x, quantized(network, x, 2, None))
        logits = torch.from_numpy(runtime.open(files[(8, 8)], 1)(x.numpy()))
        assert float((logits - measured).abs().mean()) > 6 * float(measured.max() - measured.min()) / 255

    def test_a_batch_is_its_images(self, runtime, case, files):
        run, x = runtime.open(files[(8, 8)], 1), case[1].numpy()
        torch.testing.assert_close(torch.from_numpy(run(x[:3])[1:2]), torch.from_numpy(run(x[1:2])), rtol=1e-4, atol=1e-4)

    def test_every_part_of_the_time_belongs_to_a_layer_or_to_the_rest(self, runtime, case, files):
        network, x = case
        names = [layer.name for layer in network.layers]
        for file in files.values():
            times = runtime.profile(file, 1, x[:1].numpy(), names, 3)
            assert list(times.layers) == names
            assert all(seconds > 0 for seconds in times.layers.values())
            assert times.rest > 0

    def test_codes_of_each_layer_are_in_the_file(self, runtime, case, files):
        network = case[0]
        assert runtime.code_bytes(files[None]) == {}
        for bits, activation_bits in self.options:
            stored = runtime.code_bytes(files[(bits, activation_bits)])
            assert list(stored) == [layer.name for layer in network.layers]
            for layer in network.layers:
                assert stored[layer.name] >= layer.weight_bytes(bits)
            claimed = sum(layer.weight_bytes(bits) + 4 * layer.num_channels for layer in network.layers)
            assert sum(stored.values()) <= 1.02 * claimed + 8 * len(stored)

    def test_versions_are_said(self, runtime):
        assert all(isinstance(key, str) and version for key, version in runtime.versions().items())
        assert runtime.versions()
