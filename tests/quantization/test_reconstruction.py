"""Reconstruction is never worse on the images held out, stays on the grids, reads no labels, and goes on where it was stopped."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from clado.criteria.kl_to_float import kl_to_float
from clado.errors import ConfigurationError, DataError, NetworkError
from clado.exporting._onnx_agreement import compare
from clado.exporting.onnx import export_onnx
from clado.exporting.packed import export_packed, integers, load_packed
from clado.grids import QuantizedLayer
from clado.network.network import Network
from clado.quantization.reconstruction import EFFORTS, HELD_OUT, Effort, Reconstructed, reconstruct
from clado.space import RECONSTRUCTED
from tests import tolerance
from tests.exporting.test_onnx import run as run_onnx
from tests.networks import Attention, Branching, Normed, Recurrent, Residual, images
from tests.quantization.test_training import same, start, state

pytestmark = pytest.mark.numeric

SHORT = Effort(proposals=1, block_steps=12, network_steps=6, batch_images=16)
IMAGES = images(48, seed=1)
KINDS = pytest.mark.parametrize("kind", [Residual, Attention, Recurrent, Normed, Branching])


def made_of(
    kind, effort=SHORT, widths=(), seed=0, **keywords
) -> tuple[Reconstructed, Network, Network, dict[int, QuantizedLayer]]:
    """(what was made, the float network, the deployed network, its layers)."""
    network, deployed, layers = start(kind, widths=widths)
    blocks = network.search_space((2,)).blocks
    return reconstruct([(deployed, layers)], network, IMAGES, blocks, effort, seed, **keywords), network, deployed, layers


def held_out(seed: int = 0) -> Tensor:
    """The images that are held out, drawn here once more."""
    order = torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(seed))
    return IMAGES[order[: int(HELD_OUT * len(IMAGES))]]


@KINDS
@pytest.mark.parametrize("widths", [(), (4,)], ids=["float inputs", "inputs on grids"])
def test_it_is_better_or_the_start_and_every_weight_lies_on_the_grid_of_its_codes(kind, widths):
    if kind is Branching and widths:
        pytest.skip("whole forwards observe no inputs")
    made, network, deployed, layers = made_of(kind, widths=widths)
    x = held_out()
    before, after = (
        float(kl_to_float(n.logits(x, q), network.logits(x)).mean()) for n, q in ((deployed, layers), (made.network, made.layers))
    )
    assert after <= before + tolerance.FORWARD
    assert made.loss <= made.start_loss
    assert (made.loss == made.start_loss) == same(state(made.network, made.layers), state(deployed, layers))
    for i, layer in made.layers.items():
        assert layer.grid is not None
        assert layer.grid.codes == layers[i].grid.codes
        assert (layer.grid.scale > 0).all()
        integers(network.layers[i].name, layer, layer.grid)  # refuses what is off its grid
        assert (layer.activation is None) == (not widths)


def test_blocks_of_two_layers_and_more_come_nearer_to_the_float_network():
    made, *_ = made_of(Attention, Effort(1, 60, 30, 16))
    assert made.loss < 0.8 * made.start_loss
    assert all(after <= before for before, after in made.errors)
    assert any(after < 0.8 * before for before, after in made.errors)


@pytest.mark.parametrize("kind", [Attention, Branching])
def test_twice_the_same_seed_is_the_same_network_and_nothing_given_is_changed(kind):
    (first, network, deployed, layers), (second, *_) = made_of(kind), made_of(kind)
    assert first.loss < first.start_loss
    assert same(state(first.network, first.layers), state(second.network, second.layers))
    fresh_network, fresh_deployed, fresh_layers = start.__wrapped__(kind)
    assert same(state(deployed, layers), state(fresh_deployed, fresh_layers))
    assert same(network.model.state_dict(), fresh_network.model.state_dict())
    other, *_ = made_of(kind, seed=1)
    assert not same(state(first.network, first.layers), state(other.network, other.layers))


def test_stopped_behind_any_block_it_goes_on_to_the_same_network():
    parts: list[dict[str, Tensor]] = []
    whole, *_ = made_of(Attention, keep=parts.append)
    assert len(parts) == len(whole.errors) > 2
    for part in parts:
        steps: list[int] = []
        again, *_ = made_of(Attention, kept=part, progress=lambda done, total, steps=steps: steps.append(done))
        assert same(state(whole.network, whole.layers), state(again.network, again.layers))
        assert again.errors == whole.errors
        assert len(steps) == (len(whole.errors) - len(part["errors"])) * SHORT.block_steps + SHORT.network_steps


def test_inputs_that_do_not_fit_the_memory_limit_are_computed_again_to_the_same_end():
    kept, *_ = made_of(Attention)
    again, *_ = made_of(Attention, memory_limit=1)
    assert again.loss == pytest.approx(kept.loss, rel=0.1)  # the same but for the last digits of what is computed again


@pytest.mark.parametrize(("kind", "left"), [(Residual, (0,)), (Attention, (0, 3)), (Branching, (1,))])
def test_layers_in_float_are_not_changed(kind, left):
    network, deployed, layers = start(kind)
    some = {i: layer for i, layer in layers.items() if i not in left}
    made = reconstruct([(deployed, some)], network, IMAGES, network.search_space((2,)).blocks, Effort(1, 30, 15, 16))
    assert made.loss < made.start_loss
    assert made.layers.keys() == some.keys()
    for i in left:
        place = network.places[i]
        for name in (place.parameter, place.bias_name):
            if name is not None and not any(name in (network.places[j].parameter, network.places[j].bias_name) for j in some):
                assert torch.equal(made.network.model.state_dict()[name], network.model.state_dict()[name])
                assert name not in made.network.changed or torch.equal(made.network.changed[name], deployed.changed[name])


def test_of_several_starts_the_best_is_taken():
    network, deployed, layers = start(Normed)
    worse = {
        i: replace(layer, weight=-layer.weight, grid=replace(layer.grid, scale=-layer.grid.scale)) for i, layer in layers.items()
    }
    made = reconstruct([(deployed, worse), (deployed, layers)], network, IMAGES, (), Effort(1, 0, 0))
    assert same(state(made.network, made.layers), state(deployed, layers))
    assert made.loss == made.start_loss


def test_what_diverges_ends_as_the_start(monkeypatch):
    from clado.quantization import reconstruction
    from clado.quantization.pupil import Rates

    for name in ("BLOCK_RATES", "NETWORK_RATES"):
        monkeypatch.setattr(reconstruction, name, Rates(1e4, 1e4, 1e12))
    made, _, deployed, layers = made_of(Normed)
    assert made.loss == made.start_loss
    assert same(state(made.network, made.layers), state(deployed, layers))


@pytest.mark.parametrize("widths", [(), (8,)])
def test_the_result_is_exported_packed_and_loads_as_what_was_made(tmp_path, widths):
    made, network, *_ = made_of(Attention, widths=widths)
    assert made.loss < made.start_loss
    export_packed(tmp_path / "a.safetensors", made.network, made.layers)
    loaded, x = load_packed(tmp_path / "a.safetensors", network), images(16, seed=5)
    with torch.no_grad():
        tolerance.assert_close_but_for_ties(loaded(x), made.network.logits(x, made.layers), images=1 if widths else 0)


@pytest.mark.parametrize("widths", [(), (8,)], ids=["float inputs", "inputs on grids"])
def test_effort_balanced_is_exported_to_onnx_as_what_was_measured(tmp_path, widths):
    """Logits differ by at most 1e-3. On grids this holds for most images: an input between two codes may fall to either side."""
    made, _, deployed, layers = made_of(Attention, EFFORTS["balanced"], widths)
    assert made.loss < made.start_loss
    export_onnx(tmp_path / "n.onnx", made.network, made.layers)
    x = images(64, seed=5)
    with torch.no_grad():
        measured = made.network.logits(x, made.layers)
        unlike = deployed.logits(x, layers)  # the comparison can fail: the network before the reconstruction
    exported = run_onnx(tmp_path / "n.onnx", x)
    difference, other = ((exported - logits).abs().amax(1) for logits in (measured, unlike))
    assert float(difference.median() if widths else difference.max()) <= 1e-3 < float(other.median())
    agreement = compare(tmp_path / "n.onnx", made.network, made.layers, x)
    assert agreement.num_images == 64
    assert agreement.disagreements <= (1 if widths else 0)


def test_what_cannot_be_reconstructed_is_refused():
    network, deployed, layers = start(Residual)
    bare = {i: QuantizedLayer(layer.weight) for i, layer in layers.items()}
    refused: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (DataError, "9 calibration images", lambda: reconstruct([(deployed, layers)], network, IMAGES[:9], (), SHORT)),
        (ConfigurationError, "no layer is quantized", lambda: reconstruct([(deployed, {})], network, IMAGES, (), SHORT)),
        (NetworkError, "no grid", lambda: reconstruct([(deployed, bare)], network, IMAGES, (), SHORT)),
    ]
    for error, words, call in refused:
        with pytest.raises(error, match=words):
            call()


def test_efforts_have_the_names_that_assignments_know():
    assert tuple(EFFORTS) == RECONSTRUCTED
