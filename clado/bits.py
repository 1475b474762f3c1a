"""Bit-widths: their range, their check, and their texts. Uses integers only, no torch."""

from collections.abc import Iterable, Sequence
from numbers import Integral

from clado.errors import ConfigurationError

MIN_BITS, MAX_BITS = 1, 16
FLOAT_BITS = 32


def check_bits(bits: Sequence[int | None], subject: str = "bits") -> tuple[int, ...]:
    """The bit-widths as a tuple.

    Args:
        bits: The bit-widths.
        subject: What they are, for messages.

    Raises:
        ConfigurationError: They are not ascending integers within 1..16, or there are none.
    """
    if isinstance(bits, str | bytes) or not isinstance(bits, Iterable):
        raise ConfigurationError(f"{subject} is {bits!r}; expected a list of integers, such as [2, 4, 8]")
    bits = tuple(bits)
    if not bits:
        raise ConfigurationError(
            f"{subject} is empty; expected ascending integers within {MIN_BITS}..{MAX_BITS}, such as [2, 4, 8]"
        )
    widths: list[int] = []
    for b in bits:
        if isinstance(b, bool) or not isinstance(b, Integral) or not MIN_BITS <= b <= MAX_BITS:
            raise ConfigurationError(f"{subject} holds {b!r}; expected integers within {MIN_BITS}..{MAX_BITS}, such as [2, 4, 8]")
        widths.append(int(b))
    if widths != sorted(set(widths)):
        raise ConfigurationError(f"{subject} is {widths}; expected ascending and distinct, so {sorted(set(widths))}")
    return tuple(widths)


def bits_text(bits: int | None, activation_bits: int | None = None) -> str:
    """Short text of a layer's bits: "4"; "4/8" with activation bits; "-" in float."""
    if bits is None:
        return "-"
    return str(bits) if activation_bits is None else f"{bits}/{activation_bits}"


def label(name: str, bits: int, activation_bits: int | None = None) -> str:
    """A layer's option in words: "fc.weight at 4 bits" or "fc.weight at 4 bits, activations at 8"."""
    text = f"{name} at {bits} bits"
    return text if activation_bits is None else f"{text}, activations at {activation_bits}"
