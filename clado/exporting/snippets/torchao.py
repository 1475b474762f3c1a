"""A Python file that quantizes a network with torchao as assigned. Verified with 0.18.0.

Sources: torchao.quantization.FqnToConfig and IntxWeightOnlyConfig (one to eight bits). The latter gives a convolution a scale
for each element of each filter. So convolutions use the tensor class that it is built on, with one block per output channel. That
class also takes given scales. One bit is refused: torchao's codes are −1 and 0, and clado's are −1 and +1. Activation bits are
not applied.
"""

from clado.exporting.snippets import (
    NO_SHARED_WEIGHTS,
    Peer,
    check_expressible,
    headline,
    literal,
    not_applied,
    weights_line,
    with_loading,
)
from clado.space import Assignment, SearchSpace

OPERATORS = ("conv2d", "linear")

_BODY = '''
CONFIG = FqnToConfig(
    OrderedDict(
        (name, IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerAxis(0)))
        for name, bits in BITS.items()
        if bits is not None and name not in CONVOLUTIONS
    )
)


def quantize(model):
    """Replaces the weights in place and returns the model."""
    refuse_shared(model)
    scales = {} if WEIGHTS is None else load_measured(model)
    if WEIGHTS is None:
        quantize_(model, CONFIG, filter_fn=None)
    for name, bits in BITS.items():
        if bits is None or (WEIGHTS is None and name not in CONVOLUTIONS):
            continue
        module, weight = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name).detach()
        given = {}
        if scales:
            shape = (-1, *(1 for _ in weight.shape[1:]))
            parts = {f"custom_{part}": scales[f"{name}:{part}"] for part in ("scale", "zero_point")}
            given = {part: tensor.reshape(shape).to(weight.device) for part, tensor in parts.items()}
            given["intx_choose_qparams_algorithm"] = None
        codes = IntxUnpackedToInt8Tensor.from_hp(weight, (1, *weight.shape[1:]), getattr(torch, f"int{bits}"), **given)
        module.weight = torch.nn.Parameter(codes, requires_grad=False)
    for name, bits in BITS.items():
        dtype = getattr(model.get_parameter(name), "target_dtype", None)
        if dtype != (None if bits is None else getattr(torch, f"int{bits}")):
            raise ValueError(f"{name} came out as {dtype}, expected {bits} bits")
    return model
'''

_MEASURED = """Weights only, one scale per output channel. WEIGHTS holds the weights and scales that were measured, corrections
included: torchao computes the same. The codes are kept one a byte. None leaves a layer in float."""
_FITTED = """Weights only, symmetric, one scale per output channel. torchao fits the scales itself (from the largest weight, over
the codes -2^(b-1) to 2^(b-1) - 1), so the loss differs from the one that was measured, at 2 and 3 bits visibly. The codes are
kept one a byte. None leaves a layer in float."""


def snippet(space: SearchSpace, assignment: Assignment, weights: str | None = None) -> str:
    """The file's text. A ConfigurationError names what torchao cannot express."""
    assignment = space.completed(assignment)
    check_expressible("torchao", space, assignment, OPERATORS, least=2, most=8)
    pairs = zip(space.layers, assignment.bits, strict=True)
    convolutions = [f'    "{layer.name}",\n' for layer, bits in pairs if layer.operator == "conv2d" and bits is not None]
    text = f'''"""{headline("torchao", space, assignment)}

    from assignment_torchao import quantize

    quantize(network)

{_FITTED if weights is None else _MEASURED}
{not_applied("torchao", assignment)}"""

from collections import OrderedDict

import torch
from torchao.quantization import FqnToConfig, IntxUnpackedToInt8Tensor, IntxWeightOnlyConfig, PerAxis, quantize_

{literal(space, assignment)}{weights_line(weights)}
# IntxWeightOnlyConfig would give each tap of a filter its own scale
CONVOLUTIONS = (
{"".join(convolutions)})
{_BODY.rstrip()}

{NO_SHARED_WEIGHTS}'''
    return with_loading(text, weights)


peer = Peer("torchao", snippet, takes=lambda grid: True)
