"""Corrections that recover accuracy without a single extra operation in the network that runs; each file is one, at one stage.

    stage      when                                      a module of that stage has
    network    once, on the float network                equalize(network, images) -> .tensors by name, .report
    rounding   for every layer and bit-width             rounder(sample, seed, steps) -> (grid -> codes); skipped(layer)
    layer      after rounding, for the same              correct(sample, quantized) -> the same, better; skipped(sample)
    final      once an assignment is known               reference(network, images) -> what is measured of the float network;
                                                         reestimate(network, quantized, images, reference) -> named tensors

Everything but the last is static: it is done before measuring, and costs a probe nothing. Names are file names.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor

from clado.errors import ConfigurationError
from clado.plugins import available
from clado.space import Layer


@dataclass(frozen=True)
class LayerSample:
    """A layer of the float network and what it sees of the calibration images.

    `inputs()` yields its input batch by batch, in the same order at every call: (n, channels, positions...) for a convolution,
    (..., features) for a linear operator. `apply(x, weight, bias)` is the operator itself, with its stride, padding and groups,
    which `arguments` holds as the exported graph has them: (stride, padding, dilation, groups), as far as they are given, for a
    convolution; (stride, padding, output_padding, groups, dilation) for a transposed one; nothing for a linear operator.
    `takes_bias` says whether the layer may have another bias, or one at all.
    """

    layer: Layer
    weight: Tensor
    bias: Tensor | None
    num_images: int
    inputs: Callable[[], Iterator[Tensor]]
    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    arguments: tuple[Any, ...] = ()
    takes_bias: bool = True


def module_of(name: str) -> ModuleType:
    """The module of a correction; its `STAGE` says which function it has."""
    if name not in available("corrections"):
        raise ConfigurationError(f"unknown correction {name!r}; expected one of {', '.join(available('corrections'))}")
    return import_module(f"clado.quantization.corrections.{name}")


def at_stage(names: Sequence[str], stage: str) -> list[ModuleType]:
    """Modules of the named corrections that act at a stage."""
    return [module for module in map(module_of, names) if stage == module.STAGE]
