"""A Python file that quantizes a network with Sony's Model Compression Toolkit as assigned. Verified with 2.6.1.

Source: https://sony.github.io/model_optimization/api/api_docs/classes/BitWidthConfig.html, the manual choice of bit-widths. A
target platform must offer each width, so the snippet makes one that offers the assigned ones. One bit is refused: MCT's codes
are −1 and 0, and clado's are −1 and +1. Activation bits are not applied, because MCT quantizes outputs of nodes. clado
quantizes inputs of layers.
"""

from torch import Tensor

from clado.exporting.snippets import NO_SHARED_WEIGHTS, Peer, check_expressible, headline, literal, nearest_codes, not_applied
from clado.grids import Codes
from clado.space import Assignment, SearchSpace

OPERATORS = ("conv2d", "conv_transpose2d", "linear")

_BODY = '''
FLOAT = 32


def attribute(bits, per_channel=False):
    return schema.AttributeQuantizationConfig(
        weights_quantization_method=QuantizationMethod.SYMMETRIC,
        weights_n_bits=bits,
        weights_per_channel_threshold=per_channel,
        enable_weights_quantization=bits != FLOAT,
    )


def operation(weights):
    return schema.OpQuantizationConfig(
        default_weight_attr_config=attribute(FLOAT),
        attr_weights_configs_mapping=weights,
        activation_quantization_method=QuantizationMethod.POWER_OF_TWO,
        activation_n_bits=8,
        supported_input_activation_n_bits=8,
        enable_activation_quantization=False,
        quantization_preserving=False,
        fixed_scale=None,
        fixed_zero_point=None,
        simd_size=32,
        signedness=schema.Signedness.AUTO,
    )


def platform():
    """A target that offers float and every assigned width for the weights, and leaves activations in float."""
    widths = [FLOAT, *sorted({bits for bits in BITS.values() if bits is not None})]
    offered = tuple(operation({KERNEL_ATTR: attribute(bits, True), BIAS_ATTR: attribute(FLOAT)}) for bits in widths)
    options = schema.QuantizationConfigOptions(quantization_configurations=offered, base_config=offered[0])
    names = schema.OperatorSetNames
    weighted = (names.CONV, names.CONV_TRANSPOSE, names.FULLY_CONNECTED)
    return schema.TargetPlatformCapabilities(
        default_qco=schema.QuantizationConfigOptions(quantization_configurations=(operation({}),)),
        operator_set=tuple(schema.OperatorsSet(name=name, qc_options=options) for name in weighted),
        tpc_minor_version=1,
        tpc_patch_version=0,
        tpc_platform_type="clado",
        add_metadata=False,
    )


def nodes(model):
    """MCT's name of each assigned module, as torch.fx numbers them."""
    traced = torch.fx.symbolic_trace(model).graph.nodes
    named = {f"{node.target}.weight": node.name for node in traced if node.op == "call_module"}
    absent = [name for name in BITS if name not in named]
    if absent:
        raise ValueError(f"torch.fx, which MCT reads networks with, finds no module that is called for {absent}")
    return {name: named[name] for name in BITS}


def bit_widths(model):
    """The assignment as MCT's manual choice. A batch norm that follows is folded, and the node renamed."""
    chosen = BitWidthConfig()
    for name, node in nodes(model).items():
        if BITS[name] is not None:
            either = NodeNameFilter(node) | NodeNameFilter(f"{node}_bn")
            chosen.set_manual_weights_bit_width(either, BITS[name], KERNEL)
    return chosen


def quantize(model, representative_data):
    """A quantized copy. `representative_data()` yields lists of one batch of images (MCT wants it even for weights alone)."""
    refuse_shared(model)
    named = nodes(model)
    settings = CoreConfig(
        quantization_config=QuantizationConfig(linear_collapsing=False, residual_collapsing=False),
        bit_width_config=bit_widths(model),
    )
    quantized, _ = mct.ptq.pytorch_post_training_quantization(
        model, representative_data, core_config=settings, target_platform_capabilities=platform()
    )
    modules = dict(quantized.named_modules())
    for name, node in named.items():
        module = modules.get(f"{node}_bn", modules.get(node))
        quantizer = getattr(module, "weights_quantizers", {}).get(KERNEL)
        if (None if quantizer is None else quantizer.num_bits) != BITS[name]:
            raise ValueError(f"{name} came out with {quantizer}, expected {BITS[name]} bits")
    return quantized
'''


def snippet(space: SearchSpace, assignment: Assignment, weights: str | None = None) -> str:
    """The file's text. A ConfigurationError names what MCT cannot express. MCT takes no scales, so `weights` is None."""
    assignment = space.completed(assignment)
    check_expressible("MCT", space, assignment, OPERATORS, least=2, most=16)
    return f'''"""{headline("Sony's Model Compression Toolkit", space, assignment)}

    from assignment_mct import quantize

    quantized = quantize(network, representative_data)

Weights only, symmetric, one scale per output channel. MCT folds batch norms before it quantizes and fits the scales itself
(least squared error, over the codes -2^(b-1) to 2^(b-1) - 1), so the loss differs a little from the one that was measured.
None leaves a layer in float.
{not_applied("MCT", assignment)}"""

import model_compression_toolkit as mct
import torch
from mct_quantizers import QuantizationMethod
from model_compression_toolkit.core import BitWidthConfig, CoreConfig, QuantizationConfig
from model_compression_toolkit.core.common.network_editors import NodeNameFilter
from model_compression_toolkit.target_platform_capabilities.constants import BIAS_ATTR, KERNEL_ATTR
from model_compression_toolkit.target_platform_capabilities.schema import mct_current_schema as schema

{literal(space, assignment)}
KERNEL = "weight"
{_BODY.rstrip()}

{NO_SHARED_WEIGHTS}'''


def _rounded(weight: Tensor, bits: int, channel_axis: int) -> Tensor:
    """The weight as MCT rounds it, with the threshold of least squared error. MCT's correction of biases is left out."""
    codes = Codes(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return nearest_codes(weight, channel_axis, codes, [k / 100 for k in range(1, 201)])


peer = Peer("MCT", snippet, _rounded)
