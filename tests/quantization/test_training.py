"""Fine-tuning stays on the grids, learns, repeats itself, and never leaves the held-out images worse than it found them."""

import gzip
import math
from collections.abc import Mapping
from functools import cache

import pytest
import torch
from PIL import Image
from torch import Tensor

from clado.data.images import MemorySlice, PickedSlice
from clado.data.sources import load_data
from clado.data.sources._training import IMAGES, LABELS, load_training, read_idx
from clado.errors import CladoError, ConfigurationError, DataError, MeasurementError, NetworkError
from clado.evaluation import evaluate_weights
from clado.exporting.packed import export_packed, integers, load_packed
from clado.grids import Grid, QuantizedLayer
from clado.network.network import Network
from clado.quantization.preparation import Recipe, prepare
from clado.quantization.pupil import straight_through
from clado.quantization.quantizers import WeightQuantizer
from clado.quantization.training import FineTuned, Training, augmented, finetune, held_out_loss
from clado.settings.schema import DataSettings
from tests import tolerance
from tests.networks import Attention, Branching, Normed, Recurrent, Residual, build, images, labels, renormalised

pytestmark = pytest.mark.numeric

TRAINING = MemorySlice(images(48, seed=1), labels(48, seed=1))
HELD_OUT = MemorySlice(images(24, seed=2), labels(24, seed=2))
SHORT = Training(epochs=3, learning_rate=1e-3, batch_images=16, patience=3, augment=False)
KINDS = pytest.mark.parametrize("kind", [Residual, Attention, Recurrent, Normed, Branching])


@cache
def start(kind, widths=(), symmetric=True, bits=2) -> tuple[Network, Network, dict[int, QuantizedLayer]]:
    """(the float network, the deployed network, its layers) with corrections, so that there are added biases."""
    model = build(kind)
    model.load_state_dict(renormalised(model, images(40, seed=3)), strict=False)  # else activations hardly vary
    network = Network(model, images(1), graph=kind is not Branching)
    space = network.search_space((bits,)).with_activations(widths)
    corrections = () if kind is Branching else ("output_statistics", "batchnorm_reestimation")
    recipe = Recipe(WeightQuantizer("minmax", True, symmetric), "minmax", corrections)
    return network, *prepare(network, space, recipe, [images(40, seed=3)]).deployed(space.widest)


def tuned_from(kind, training=SHORT, **how) -> tuple[FineTuned, tuple[Network, Network, dict[int, QuantizedLayer]]]:
    begun = start(kind, **how)
    network, shipped, layers = begun
    return finetune(shipped, layers, network, TRAINING, HELD_OUT, training), begun


def state(network: Network, layers: Mapping[int, QuantizedLayer]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict(layers).items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_images_may_be_vectors():
    torch.manual_seed(0)
    network = Network(torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)), torch.randn(1, 6))
    prepared = prepare(network, network.search_space((3,)))
    training, held_out = (MemorySlice(torch.randn(n, 6), labels(n)) for n in (48, 24))
    tuned = finetune(*prepared.deployed(prepared.space.widest), network, training, held_out, SHORT)
    assert len(tuned.epochs) > 1


@KINDS
@pytest.mark.parametrize("learned_scales", [False, True])
def test_weights_lie_on_their_grids_and_the_training_loss_falls(kind, learned_scales):
    training = Training(8, learning_rate=1e-3, batch_images=16, patience=8, augment=False, learned_scales=learned_scales)
    tuned, (network, shipped, layers) = tuned_from(kind, training)
    losses = [epoch.training_loss for epoch in tuned.epochs if epoch.training_loss is not None]
    assert losses[-1] < losses[0]
    assert tuned.best_epoch > 0
    assert held_out_loss(tuned.network, tuned.layers, network, TRAINING, training) < held_out_loss(
        shipped, layers, network, TRAINING, training
    )
    for i, layer in tuned.layers.items():
        assert layer.grid is not None
        assert layer.grid.codes == layers[i].grid.codes
        assert (layer.grid.scale > 0).all()
        integers(network.layers[i].name, layer, layer.grid)  # refuses what is off its grid
    assert not same(state(tuned.network, tuned.layers), state(shipped, layers))


def test_learned_scales_move_and_others_do_not():
    for learned in (False, True):
        tuned, (_, _, layers) = tuned_from(Residual, Training(2, batch_images=16, augment=False, learned_scales=learned))
        moved = [not torch.equal(layer.grid.scale, layers[i].grid.scale) for i, layer in tuned.layers.items()]
        assert tuned.best_epoch > 0
        assert any(moved) == learned


@pytest.mark.parametrize("kind", [Residual, Attention, Branching])
def test_twice_the_same_seed_is_the_same_network_and_nothing_given_is_changed(kind):
    (first, begun), (second, _) = tuned_from(kind), tuned_from(kind)
    assert first.best_epoch > 0
    assert same(state(first.network, first.layers), state(second.network, second.layers))
    assert [e.held_out_loss for e in first.epochs] == [e.held_out_loss for e in second.epochs]
    network, shipped, layers = begun
    fresh_network, fresh_shipped, fresh_layers = start.__wrapped__(kind)
    assert same(state(shipped, layers), state(fresh_shipped, fresh_layers))
    assert same(network.model.state_dict(), fresh_network.model.state_dict())
    assert all(parameter.grad is None for parameter in network.model.parameters())


def test_another_seed_is_another_network():
    (first, _), (second, _) = (
        tuned_from(Residual),
        tuned_from(Residual, Training(3, SHORT.criterion, SHORT.learning_rate, 16, 3, False, False, 1)),
    )
    assert not same(state(first.network, first.layers), state(second.network, second.layers))


def test_zero_epochs_change_nothing():
    tuned, (_, shipped, layers) = tuned_from(Normed, Training(epochs=0))
    assert same(state(tuned.network, tuned.layers), state(shipped, layers))
    assert [epoch.number for epoch in tuned.epochs] == [0]
    assert tuned.best_epoch == 0


def test_what_gets_no_better_ends_early_and_the_start_is_kept():
    awful = Training(epochs=9, learning_rate=30.0, batch_images=16, patience=2, augment=False)
    tuned, (_, shipped, layers) = tuned_from(Residual, awful)
    assert tuned.best_epoch == 0
    assert len(tuned.epochs) == 3
    assert same(state(tuned.network, tuned.layers), state(shipped, layers))


@pytest.mark.parametrize("widths", [(), (8,)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_result_is_exported_packed_and_loads_as_what_was_trained(tmp_path, widths, symmetric):
    tuned, (network, _, _) = tuned_from(Normed, widths=widths, symmetric=symmetric)
    assert tuned.best_epoch > 0
    export_packed(tmp_path / "a.safetensors", tuned.network, tuned.layers)
    loaded = load_packed(tmp_path / "a.safetensors", network)
    x = images(16, seed=5)
    with torch.no_grad():
        tolerance.assert_close_but_for_ties(loaded(x), tuned.network.logits(x, tuned.layers), images=1 if widths else 0)
    assert all(layer.activation == (None if not widths else layer.activation) for layer in tuned.layers.values())


def test_labels_are_learned_from_with_cross_entropy():
    network, shipped, layers = start(Residual)
    tuned = finetune(shipped, layers, network, TRAINING, TRAINING, Training(8, "cross_entropy", 3e-2, 16, 8, augment=False))
    assert evaluate_weights(tuned.network, tuned.layers, TRAINING).loss < evaluate_weights(shipped, layers, TRAINING).loss
    assert all(not torch.equal(layer.weight, layers[i].weight) for i, layer in tuned.layers.items())  # to other codes


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_straight_through_is_rounding_forwards_and_the_identity_within_the_range_backwards(bits, symmetric):
    grid = WeightQuantizer("minmax", True, symmetric).grid(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), bits)
    weight = (2 * torch.randn(4, 5, generator=torch.Generator().manual_seed(1))).requires_grad_()
    straight_through(weight, grid).sum().backward()
    tolerance.assert_close(straight_through(weight, grid), grid.fake_quantize(weight), 4 * tolerance.eps())
    position = weight.detach() / grid.scale + grid.zero_point
    inside = (position >= grid.codes.low) & (position <= grid.codes.high)
    assert torch.equal(weight.grad != 0, inside)
    tolerance.assert_close(weight.grad[inside], torch.ones(int(inside.sum())), 4 * tolerance.eps())
    assert not inside.all()


def test_the_gradient_of_a_scale_is_that_of_lsq():
    """Esser et al., equation 3: round(v) − v within the range, the end of the range beyond it, for v = w / s."""
    grid = WeightQuantizer().grid(torch.ones(1, 1), 3)
    weight = torch.tensor([[-9.0, -0.4, 0.3, 0.7, 9.0]])
    scale = torch.full((1, 1), 0.25, requires_grad=True)
    values = straight_through(weight, Grid(scale, torch.zeros(1, 1), grid.codes))
    (slope,) = torch.autograd.grad(values.sum(), scale)
    v = weight / 0.25
    expected = torch.where(v.abs() < 3, v.round() - v, v.clamp(-3, 3)).sum()
    assert slope.item() == pytest.approx(expected.item(), rel=0, abs=tolerance.of_sum(2 * 5) * 9 / 0.25)


def test_augmentation_moves_and_mirrors_and_keeps_shape_and_values():
    x = images(32, seed=4)
    moved = augmented(x, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape
    assert not torch.equal(moved, x)
    assert all(torch.isin(moved[k], x[k]).all() for k in range(len(x)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": -1}, "epochs"),
        ({"batch_images": 1}, "batch_images"),
        ({"patience": 0}, "patience"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"criterion": "hinge"}, "criterion"),
    ],
)
def test_settings_that_are_none_are_refused(change, words):
    with pytest.raises(ConfigurationError, match=words):
        Training(**change)


def test_what_cannot_be_trained_is_refused():
    network, shipped, layers = start(Residual)
    few, unlabelled = MemorySlice(images(1)), MemorySlice(images(24, seed=2))
    bare = {i: QuantizedLayer(layer.weight) for i, layer in layers.items()}
    labelled = Training(criterion="cross_entropy")
    beyond = MemorySlice(images(24), torch.tensor([0, 99] * 12))
    refused: list[tuple[type[CladoError], str, tuple]] = [
        (ConfigurationError, "no layer is quantized", (shipped, {}, network, TRAINING, HELD_OUT)),
        (NetworkError, "no grid", (shipped, bare, network, TRAINING, HELD_OUT)),
        (DataError, "1 training images", (shipped, layers, network, few, HELD_OUT)),
        (DataError, "1 held-out images", (shipped, layers, network, TRAINING, few)),
        (DataError, "labels", (shipped, layers, network, TRAINING, unlabelled, labelled)),
        (DataError, "labels reach from 0 to 99; expected 0 to", (shipped, layers, network, TRAINING, beyond, labelled)),
        (DataError, "labels reach from 0 to 99; expected 0 to", (shipped, layers, network, beyond, HELD_OUT, labelled)),
        (MeasurementError, "diverged", (shipped, layers, network, MemorySlice(images(24) * torch.inf), HELD_OUT)),
    ]
    for error, words, arguments in refused:
        with pytest.raises(error, match=words):
            finetune(*arguments)


def test_picked_images_are_those_of_their_slices():
    parts = [TRAINING, HELD_OUT]
    numbers = [50, 0, 47, 48, 71]
    picked = PickedSlice(parts, numbers)
    x, y = picked.load(0, 5)
    every_x = torch.cat([part.load(0, len(part))[0] for part in parts])
    every_y = torch.cat([part.load(0, len(part))[1] for part in parts])
    assert torch.equal(x, every_x[numbers])
    assert torch.equal(y, every_y[numbers])
    assert torch.equal(picked.load(1, 3)[0], every_x[[0, 47]])
    assert len(PickedSlice(parts)) == len(every_x)
    assert picked.sha256 != PickedSlice(parts, numbers[::-1]).sha256
    assert PickedSlice([TRAINING, MemorySlice(images(3))], [0, 48]).load(0, 2)[1] is None


def write_idx(path, array: Tensor, packed: bool) -> None:
    header = bytes((0, 0, 8, array.ndim)) + b"".join(length.to_bytes(4, "big") for length in array.shape)
    raw = header + array.to(torch.uint8).numpy().tobytes()
    path.write_bytes(gzip.compress(raw) if packed else raw)


@pytest.mark.parametrize("packed", [True, False])
def test_a_training_set_of_idx_files_is_read_whole(tmp_path, packed):
    generator = torch.Generator().manual_seed(0)
    pixels, classes = torch.randint(0, 256, (7, 28, 28), generator=generator), torch.arange(7)
    end = ".gz" if packed else ""
    write_idx(tmp_path / f"{IMAGES}{end}", pixels, packed)
    write_idx(tmp_path / f"{LABELS}{end}", classes, packed)
    images = load_training(tmp_path, DataSettings(), (1, 28, 28), HELD_OUT)
    x, y = images.load(0, 7)
    assert torch.equal(y, classes)
    assert (x[3] - x[3].min()).argmax() == pixels[3].argmax()
    with pytest.raises(DataError, match="the network takes"):
        load_training(tmp_path, DataSettings(), (3, 32, 32), HELD_OUT)


@pytest.mark.parametrize("content", [b"", b"PK", bytes((0, 0, 8, 3, 0, 0, 0, 9)), bytes((0, 0, 13, 1, 0, 0, 0, 1, 0))])
def test_a_damaged_idx_file_is_named(tmp_path, content):
    for path, raw in ((tmp_path / "a", content), (tmp_path / "a.gz", content)):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=str(path)):
            read_idx(path)


def test_classes_of_a_training_folder_have_the_numbers_of_the_run(tmp_path):
    def draw(folder, names):
        for name in names:
            (folder / name).mkdir(parents=True)
            for k in range(6):
                Image.new("L", (8, 8), 20 * k).save(folder / name / f"{k}.png")

    draw(tmp_path / "run", ("cat", "dog", "horse"))
    draw(tmp_path / "more", ("dog", "horse"))
    draw(tmp_path / "other", ("cow", "dog"))
    data = {"source": "folder", "path": tmp_path / "run", "mean": (0.0,), "std": (1.0,), "resize": 8}
    settings = DataSettings(**data, sensitivity_images=3, calibration_images=3, sample_blocks=1, validation_images=6)
    validation = load_data(settings, (1, 8, 8)).validation
    images = load_training(tmp_path / "more", settings, (1, 8, 8), validation)
    assert sorted(images.load(0, 12)[1].tolist()) == [1] * 6 + [2] * 6
    with pytest.raises(DataError, match="classes that the run lacks: cow"):
        load_training(tmp_path / "other", settings, (1, 8, 8), validation)


def test_a_folder_that_is_no_training_set_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="idx"):
            load_training(folder, DataSettings(), (1, 28, 28), HELD_OUT)
