"""Finds the options of a search space that a runtime runs natively, and restricts the space to them. Integers only."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from clado.errors import ConfigurationError
from clado.exporting.runtimes import Runtime
from clado.space import SearchSpace


def lacking_options(space: SearchSpace, runtime: Runtime, symmetric: bool) -> dict[int, str]:
    """Numbers of the options that a runtime does not run natively, with the reason.

    Args:
        space: The layers and their candidates.
        runtime: The runtime.
        symmetric: Whether weights have the symmetric scheme.
    """
    reasons = {
        number: runtime.lacks_kernel(space.layers[layer], bits, activation_bits, symmetric)
        for number, (layer, bits, activation_bits) in enumerate(space.options)
    }
    return {number: reason for number, reason in reasons.items() if reason is not None}


def native_space(space: SearchSpace, runtime: Runtime, symmetric: bool) -> SearchSpace:
    """The space without the candidates that a runtime does not run natively.

    An activation width is left out if no layer has a kernel for it. A layer without a native candidate stays in float. So do the
    layers that are tied to it.

    Raises:
        ConfigurationError: No candidate of any layer is native.
    """
    lacking = lacking_options(space, runtime, symmetric)
    native = [option for k, option in enumerate(space.options) if k not in lacking and option.bits is not None]
    if not native:
        raise ConfigurationError(
            f"{runtime.title} runs no candidate natively: {reasons_text(lacking)}; expected other bits, or candidates: all"
        )
    widths = tuple(width for width in space.activation_widths if any(option.activation_bits == width for option in native))
    offered = {(option.layer, option.bits, option.activation_bits) for option in native}
    groups = [*space.ties, *((layer,) for layer in range(space.num_layers))]
    kept = list(space.bit_widths)
    for group in groups:
        for layer in group:
            kept[layer] = tuple(
                bits
                for bits in kept[layer]
                if bits is None or all((member, bits, width) in offered for member in group for width in widths)
            ) or (None,)
    return replace(space, bit_widths=tuple(kept), activation_widths=widths)


def reasons_text(lacking: Mapping[int, str]) -> str:
    """The reasons with their numbers of options, in one line."""
    return "; ".join(f"{count} options: {reason}" for reason, count in Counter(lacking.values()).most_common())


def native_text(offered: SearchSpace, searched: SearchSpace, runtime: Runtime, symmetric: bool) -> str | None:
    """Says which candidates a runtime does not run natively, and what happens to them. None if it runs all.

    Args:
        offered: The space of the settings.
        searched: The same space, or the result of `native_space` for it.
        runtime: The runtime.
        symmetric: Whether weights have the symmetric scheme.
    """
    lacking = lacking_options(offered, runtime, symmetric)
    if not lacking:
        return None
    text = f"{runtime.title} does not run {len(lacking)} of {offered.num_options} options natively ({reasons_text(lacking)})"
    if searched == offered:
        return f"{text}; all of them are searched"
    in_float = sum(bits == (None,) != before for bits, before in zip(searched.bit_widths, offered.bit_widths, strict=True))
    left = f", and {in_float} of {offered.num_layers} layers stay in float" if in_float else ""
    return f"{text}; they are left out{left}"
