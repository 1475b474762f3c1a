"""Generality: in networks people use, every weight is found, and a resumed and stacked run is the module's own whole run."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clado import criteria
from clado.network.network import Network
from clado.quantization.quantizers import WeightQuantizer
from tests import tolerance
from tests.networks import replaced_logits

pytestmark = pytest.mark.numeric

QUANTIZER = WeightQuantizer("minmax")


@dataclass(frozen=True)
class Case:
    """A network by name, the side of its images, its number of searched layers (method, section 4; 2 more than its table)."""

    name: str
    layers: int
    size: int = 64
    options: dict[str, Any] = field(default_factory=dict)
    source: str = "torchvision"


QUICK = [Case("resnet18", 21, 32)]
FULL = [
    Case("resnet18", 21),
    Case("resnet34", 37),
    Case("resnet50", 54),
    Case("mobilenet_v2", 53),
    Case("mobilenet_v3_large", 64),
    Case("regnet_x_3_2gf", 81),
    Case("regnet_y_3_2gf", 111),
    Case("vit_b_16", 50, 64, {"image_size": 64}),
    Case("swin_t", 53),
    Case("convnext_tiny", 59),
    Case("efficientnet_b0", 82),
    Case("densenet121", 121),
    Case("vit_tiny_patch16_224", 50, 64, {"img_size": 64}, "timm"),
    Case("resnext26ts", 32, 64, {}, "timm"),
]


def build(case: Case) -> nn.Module:
    """Random weights, with batch-norm statistics of a batch, so that activations neither vanish nor explode."""
    torch.manual_seed(0)
    if case.source == "timm":
        timm = pytest.importorskip("timm")
        model = timm.create_model(case.name, pretrained=False, **case.options)
    else:
        from torchvision import models

        model = models.get_model(case.name, weights=None, **case.options)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(8, 3, case.size, case.size))
        for norm in norms:
            norm.running_mean.add_(0.1 * torch.randn_like(norm.running_mean) * norm.running_var.sqrt())
            norm.running_var.mul_(0.8 + 0.4 * torch.rand_like(norm.running_var)).add_(1e-3)
    return model


def check_random_pairs(model: nn.Module, network: Network, x: Tensor, columns: int, rows: int = 3) -> None:
    """For random later layers j and several earlier (i, a) stacked before j, per-sample losses are those of the whole module.
    Both weights are replaced in it. The tolerance is 1e-5 · max(1, loss)."""
    draw = random.Random(0)
    float_logits = replaced_logits(model, {}, x)
    labels = float_logits.argmax(1)
    losses: list[Callable[[Tensor], Tensor]] = [
        criteria.bind(name, float_logits, labels) for name in ("kl_to_float", "cross_entropy")
    ]

    def quantized(layer: int, bits: int) -> Tensor:
        return QUANTIZER.fake_quantize(network.weights[layer], bits, network.layers[layer].channel_axis)

    count = len(network.layers)
    for j in draw.sample(range(1, count), min(columns, count - 1)):
        chosen = [(i, draw.choice((2, 4, 8))) for i in draw.sample(range(j), min(rows, j))]
        at_j, states = {j: quantized(j, draw.choice((2, 4)))}, []
        for i, a in chosen:
            state = network.advance(network.advance(network.begin(x), i), j, {i: quantized(i, a)})
            states.append(state)
        logits = network.finish(network.stack(states, j), at_j).split(len(x))
        for (i, a), logits_of in zip(chosen, logits, strict=True):
            names = {network.layers[j].name: at_j[j], network.layers[i].name: quantized(i, a)}
            whole = replaced_logits(model, names, x)
            for loss in losses:
                expected = loss(whole)
                assert bool(torch.isfinite(expected).all())
                error = (loss(logits_of) - expected).abs() / expected.clamp(min=1.0)
                assert float(error.max()) <= tolerance.LOSS, (network.layers[i].name, a, network.layers[j].name)


def check(case: Case, columns: int) -> None:
    model = build(case)
    x = torch.randn(2, 3, case.size, case.size, generator=torch.Generator().manual_seed(1))
    network = Network(model, x[:1])
    assert len(network.layers) == case.layers
    expected = replaced_logits(model, {}, x)
    tolerance.assert_close(network.logits(x), expected, tolerance.of_layers(network.layers))
    searched = {layer.name for layer in network.layers}
    assert searched | {name for name, _, _ in network.coverage()} == {name for name, _ in model.named_parameters()}
    check_random_pairs(model, network, x, columns)


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_layers_are_found_and_pairs_are_exact(case: Case) -> None:
    check(case, columns=2)


@pytest.mark.system
@pytest.mark.parametrize("case", FULL, ids=lambda case: case.name)
def test_layers_are_found_and_pairs_are_exact_in_every_network_of_the_list(case: Case) -> None:
    check(case, columns=6)
