"""What corrections of the stages `layer` and `final` keep. Subclass, set `name`, and the tests come with it."""

from functools import cache

import pytest
import torch
from torch import Tensor

from clado.errors import DataError
from clado.grids import QuantizedLayer
from clado.network.network import Network
from clado.quantization.corrections import LayerCorrection, LayerSample, at_stage, correction_of
from clado.quantization.preparation import Prepared, Recipe, layer_inputs, layer_sample, prepare
from clado.quantization.quantizers import WeightQuantizer
from tests import tolerance
from tests.networks import Attention, Normed, Residual, build, images

KINDS = pytest.mark.parametrize("kind", [Residual, Attention, Normed])
SCALES = pytest.mark.parametrize("per_channel", [True, False], ids=["per channel", "per tensor"])
SPLIT = "attention with queries, keys and values apart"
NUM_IMAGES = 48
# sums over the images and up to 256 positions
STATISTICS = tolerance.FORWARD + tolerance.of_forward(1, NUM_IMAGES * 256)


def calibration(*sizes: int) -> list[Tensor]:
    """The calibration images in batches of these sizes; all at once for none."""
    return list(images(NUM_IMAGES, seed=3).split(sizes or (NUM_IMAGES,)))


@cache
def network_of(kind) -> Network:
    """A network that tests share: no correction changes it."""
    if kind == SPLIT:
        return Network(build(Attention), images(1), split=("*.in_proj_weight",))
    return Network(build(kind), images(1))


def corrected(kind, *names: str, per_channel: bool = True, sizes: tuple[int, ...] = (), widths: tuple[int, ...] = ()) -> Prepared:
    """The network at 2 and 4 bits with these corrections."""
    network = network_of(kind)
    space = network.search_space((2, 4)).with_activations(widths)
    return prepare(network, space, Recipe(WeightQuantizer(per_channel=per_channel), corrections=names), calibration(*sizes))


def sample_at(network: Network, layer: int, batches: list[Tensor]) -> LayerSample:
    """What a layer sees of calibration images."""
    inputs = layer_inputs(network, network.search_space((2,)), Recipe(corrections=("output_statistics",)), batches)
    sample = layer_sample(network, layer, inputs[layer])
    assert sample is not None
    return sample


def tensors_of(ready: Prepared) -> dict[str, Tensor]:
    """Everything that corrections may change, at each option and for the narrowest assignment."""
    tensors = {f"{k}.weight": layer.weight for k, layer in enumerate(ready.layers)}
    tensors |= {f"{k}.bias": layer.bias for k, layer in enumerate(ready.layers) if layer.bias is not None}
    tensors |= {f"{k}.scale": layer.grid.scale for k, layer in enumerate(ready.layers)}
    return tensors | ready.final(ready.space.narrowest)


class CorrectionContract:
    """Laws of a static or final correction (features: method, section 10)."""

    name: str

    @KINDS
    def test_nothing_quantized_changes_nothing(self, kind):
        ready = corrected(kind, self.name)
        assert ready.final(ready.space.nothing) == {}
        network, chosen = ready.deployed(ready.space.nothing)
        assert chosen == {}
        assert torch.equal(network.logits(images(4)), network_of(kind).logits(images(4)))

    @KINDS
    def test_a_layer_as_it_was_stays_as_it_was(self, kind):
        network = network_of(kind)
        for i, weight in enumerate(network.weights):
            sample = sample_at(network, i, calibration())
            for correction in at_stage([self.name], LayerCorrection).values():
                assert correction.correct(sample, []) == []
                (same,) = correction.correct(sample, [QuantizedLayer(weight)])
                assert torch.equal(same.weight, weight)
                float_bias = network.biases[i]
                expected = torch.zeros_like(same.bias) if float_bias is None else float_bias
                tolerance.assert_close(same.bias, expected, STATISTICS)

    @KINDS
    def test_what_it_is_given_is_not_changed(self, kind):
        network, images = network_of(kind), calibration(20, 28)
        plain = prepare(network, network.search_space((2, 4)))
        correction = correction_of(self.name)
        tensors = [tensor for layer in plain.layers for tensor in (layer.weight, layer.grid.scale, layer.grid.zero_point)]
        before = [tensor.clone() for tensor in (*tensors, *images)]
        if isinstance(correction, LayerCorrection):
            for i in range(plain.space.num_layers):
                correction.correct(
                    sample_at(network, i, images), plain.layers[plain.space.offsets[i] : plain.space.offsets[i + 1]]
                )
        else:
            chosen = plain.chosen(plain.space.narrowest)
            correction.reestimate(network, chosen, images, correction.reference(network, images))
        assert all(torch.equal(now, then) for now, then in zip((*tensors, *images), before, strict=True))
        state = network.model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in build(kind).state_dict().items())

    @KINDS
    @SCALES
    def test_twice_is_the_same_bit_for_bit(self, kind, per_channel):
        first, second = (tensors_of(corrected(kind, self.name, per_channel=per_channel, sizes=(20, 28))) for _ in range(2))
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

    @KINDS
    def test_batches_change_it_by_rounding_only(self, kind):
        whole = tensors_of(corrected(kind, self.name))
        for sizes in ((16, 16, 16), (1, 47)):
            cut = tensors_of(corrected(kind, self.name, sizes=sizes))
            for name, tensor in whole.items():
                tolerance.assert_close(cut[name], tensor, STATISTICS)

    @KINDS
    @SCALES
    def test_weights_stay_on_the_grid_they_state_with_the_codes_they_had(self, kind, per_channel):
        plain = corrected(kind, per_channel=per_channel)
        for layer, before in zip(corrected(kind, self.name, per_channel=per_channel).layers, plain.layers, strict=True):
            codes = before.grid.quantize(before.weight)
            assert torch.equal(layer.grid.quantize(layer.weight), codes)
            assert torch.equal(layer.grid.dequantize(codes), layer.weight)
            assert layer.grid.codes == before.grid.codes
            assert torch.equal(layer.grid.zero_point, before.grid.zero_point)
            assert layer.grid.scale.shape == before.grid.scale.shape
            assert layer.weight.dtype == before.weight.dtype

    @KINDS
    def test_grids_of_activations_stay(self, kind):
        plain, changed = corrected(kind, widths=(4, 8)), corrected(kind, self.name, widths=(4, 8))
        assert [layer.activation for layer in changed.layers] == [layer.activation for layer in plain.layers]

    @pytest.mark.parametrize("none", [[], [images(0)]], ids=["no batch", "an empty batch"])
    def test_it_says_that_it_needs_images(self, none):
        network = network_of(Residual)
        with pytest.raises(DataError, match=f"{self.name} need calibration images and there are none; expected 256 or more"):
            prepare(network, network.search_space((2,)), Recipe(corrections=(self.name,)), none)
