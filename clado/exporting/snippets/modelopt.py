"""A Python file that quantizes a network with NVIDIA ModelOpt (nvidia-modelopt) as assigned. Verified with 0.47.0.

Format: https://nvidia.github.io/Model-Optimizer/guides/_quant_cfg.html, an ordered list of quantizer names and their settings.
One bit is refused: ModelOpt's one-bit grid holds only zero, and clado's holds −1 and +1. ModelOpt simulates widths other than 8.
ModelOpt takes symmetric grids of weights: `amax` of a quantizer is the largest magnitude of its grid. It does not take affine
grids. Activation bits become those of the layers' input quantizers, with one scale for each. These quantizers are symmetric.
Their `amax` is the largest magnitude of clado's grid. If no weights are passed on, the caller's images calibrate it.
"""

from torch import Tensor

from clado.exporting.snippets import (
    NO_SHARED_WEIGHTS,
    Peer,
    check_expressible,
    headline,
    literal,
    nearest_codes,
    weights_line,
    with_loading,
)
from clado.grids import ActivationGrid, Codes
from clado.space import Assignment, SearchSpace

OPERATORS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")

_BODY = '''
QUANT_CFG = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        *(
            {
                "quantizer_name": f"{name}_quantizer",
                "cfg": {"num_bits": bits, "axis": CHANNEL_AXIS.get(name, 0), "narrow_range": True},
            }
            for name, bits in BITS.items()
            if bits is not None
        ),
        *(
            {"quantizer_name": f"{name.rpartition('.')[0]}.input_quantizer", "cfg": {"num_bits": bits, "axis": None}}
            for name, bits in ACTIVATION_BITS.items()
            if bits is not None
        ),
    ],
    "algorithm": {"method": "mse", "start_multiplier": 0.1, "stop_multiplier": 1.0, "step_size": 0.05},
}


def quantize(model, images=None):
    """Simulates the quantized network in place and returns it. `images`: a batch that gives the inputs' scales, where any do."""
    if WEIGHTS is None and any(ACTIVATION_BITS.values()) and images is None:
        raise ValueError("inputs are quantized too; expected quantize(network, images) with a batch to fit their scales to")
    refuse_shared(model)
    attention = [name for name, module in model.named_modules() if isinstance(module, torch.nn.MultiheadAttention)]
    unseen = [name for name in BITS if BITS[name] is not None and any(name.startswith(f"{a}.") for a in attention)]
    if unseen:
        raise ValueError(f"ModelOpt does not quantize inside torch.nn.MultiheadAttention: {unseen}")
    if WEIGHTS is None:
        mtq.quantize(model, QUANT_CFG, forward_loop=(lambda network: network(images)) if any(ACTIVATION_BITS.values()) else None)
    else:
        scales = load_measured(model)
        mtq.quantize(model, {**QUANT_CFG, "algorithm": None})  # nothing is fitted: amax is that of the measured grids
        for name in (name for name, bits in BITS.items() if bits is not None):
            weight, axis = model.get_parameter(name), CHANNEL_AXIS.get(name, 0)
            shape = [-1 if k == axis else 1 for k in range(weight.ndim)]
            largest = scales[f"{name}:scale"] * (2 ** (BITS[name] - 1) - 1)
            model.get_submodule(f"{name}_quantizer").amax = largest.reshape(shape).to(weight.device)
            if ACTIVATION_BITS.get(name) is not None:
                quantizer = model.get_submodule(f"{name.rpartition('.')[0]}.input_quantizer")
                quantizer.amax = scales[f"{name}:input_amax"].to(weight.device)
    inputs = {f"{name.rpartition('.')[0]}.input_quantizer": bits for name, bits in ACTIVATION_BITS.items()}
    for name, bits in {**{f"{name}_quantizer": bits for name, bits in BITS.items()}, **inputs}.items():
        quantizer = model.get_submodule(name) if bits is not None else None
        if quantizer is not None and (not quantizer.is_enabled or quantizer.num_bits != bits):
            raise ValueError(f"{name} came out as {quantizer}, expected {bits} bits")
    return model
'''

_INPUTS = """
Inputs have one symmetric scale each, fitted to the largest magnitude in the given images. Ours may be shifted, so theirs
lose a bit after a ReLU.
"""


def snippet(space: SearchSpace, assignment: Assignment, weights: str | None = None) -> str:
    """The file's text. A ConfigurationError names what ModelOpt cannot express."""
    assignment = space.completed(assignment)
    check_expressible("ModelOpt", space, assignment, OPERATORS, least=2, most=16)
    images, weights_clause, inputs = "", "Weights only,", ""
    if assignment.activation_bits:
        images, weights_clause, inputs = "" if weights else ", images", "Weights are", _INPUTS
    axes = {layer.name: layer.channel_axis for layer in space.layers if layer.channel_axis != 0}
    fitted = (
        "ModelOpt fits the scales itself (least squared error), so the\nloss differs a little from the one that was measured."
    )
    measured = "WEIGHTS holds the weights and scales that were\nmeasured, corrections included."
    text = f'''"""{headline("NVIDIA ModelOpt", space, assignment)}

    from assignment_modelopt import quantize

    quantize(network{images})

{weights_clause} symmetric, one scale per output channel. {measured if weights else fitted} None leaves a layer in float.
{inputs}"""

import modelopt.torch.quantization as mtq
import torch

{literal(space, assignment)}{"" if inputs else "ACTIVATION_BITS = {}"}
{weights_line(weights).rstrip()}
# the output channels of all others are axis 0
CHANNEL_AXIS = {axes!r}
{_BODY.rstrip()}

{NO_SHARED_WEIGHTS}'''
    return with_loading(text, weights)


def _rounded(weight: Tensor, bits: int, channel_axis: int) -> Tensor:
    """The weight as ModelOpt's algorithm `mse` rounds it: with the scale of least squared error among 19."""
    largest = 2 ** (bits - 1) - 1
    return nearest_codes(weight, channel_axis, Codes(-largest, largest), [k / 20 for k in range(2, 21)])


def _input_grid(grid: ActivationGrid) -> ActivationGrid:
    """The symmetric grid with the same largest magnitude."""
    largest = grid.scale * max(grid.zero_point, 2**grid.bits - 1 - grid.zero_point)
    return ActivationGrid(grid.bits, largest / (2 ** (grid.bits - 1) - 1), 2 ** (grid.bits - 1))


peer = Peer("ModelOpt", snippet, _rounded, takes=lambda grid: grid.codes.low < 0, input_grid=_input_grid)
