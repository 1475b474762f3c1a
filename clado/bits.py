"""Bit-widths: their range, their check, and their texts. Uses integers only, no torch."""

from collections.abc import Iterable, Sequence
from numbers import Integral

from clado.errors import ConfigurationError

MIN_BITS, MAX_BITS = 1, 16
FLOAT_BITS = 32
"""Bits of a weight or an input in float. Sizes and bit operations use it."""
FLOAT = "float"
"""The candidate that leaves a layer in float, in settings and texts. In code it is None."""


def check_bits(bits: Sequence[int | None], subject: str = "bits") -> tuple[int, ...]:
    """The bit-widths as a tuple.

    Args:
        bits: The bit-widths.
        subject: Their name, for messages.

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


def check_candidates(candidates: Sequence[int | str | None], subject: str = "bits") -> tuple[int | None, ...]:
    """The candidate bit-widths of a layer as a tuple.

    Args:
        candidates: The bit-widths, ascending. "float" or None after them leaves the layer in float.
        subject: Their name, for messages.

    Raises:
        ConfigurationError: They are not ascending integers within 1..16 and then float, or there are none.
    """
    if isinstance(candidates, str | bytes) or not isinstance(candidates, Iterable):
        return check_bits(candidates, subject)  # type: ignore[arg-type]  # refuses it
    candidates = tuple(candidates)
    is_float = [candidate is None or candidate == FLOAT for candidate in candidates]
    if any(is_float[:-1]):
        raise ConfigurationError(f"{subject} is {list(candidates)}; expected float once, after the bit-widths")
    if not candidates or not is_float[-1]:
        return check_bits(candidates, subject)  # type: ignore[arg-type]  # refuses other words
    return (*(check_bits(candidates[:-1], subject) if candidates[:-1] else ()), None)  # type: ignore[arg-type]


def bits_text(bits: int | None, activation_bits: int | None = None) -> str:
    """Short text of a layer's bits: "4"; "4/8" with activation bits; "float"."""
    if bits is None:
        return FLOAT
    return str(bits) if activation_bits is None else f"{bits}/{activation_bits}"


def label(name: str, bits: int | None, activation_bits: int | None = None) -> str:
    """A layer's option in words: "fc.weight at 4 bits", "fc.weight at 4 bits, activations at 8" or "fc.weight in float"."""
    if bits is None:
        return f"{name} in float"
    text = f"{name} at {bits} bits"
    return text if activation_bits is None else f"{text}, activations at {activation_bits}"
