"""What can be chosen: layers, their candidate bit-widths, and an assignment of one to each. Integers only; no torch.

An *option* is one (layer, bit-width) pair. Options are numbered layer by layer in execution order, narrow before wide:
option `offsets[i] + m` is the m-th bit-width of layer i. Matrices, programs and plans index options; only this file knows
what an option means.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from clado.errors import ConfigurationError

MIN_BITS, MAX_BITS = 1, 16
FLOAT_BITS = 32


@dataclass(frozen=True)
class Layer:
    """A named weight tensor that a convolution or a linear operator consumes.

    `name` is the parameter's qualified name; `macs` counts multiply-accumulates of one image; `num_channels` is the length of
    `channel_axis`, the axis kept when a scale is fitted per channel.
    """

    name: str
    shape: tuple[int, ...]
    operator: str
    macs: int = 0
    channel_axis: int = 0

    @property
    def num_weights(self) -> int:
        """Number of elements of the tensor."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def num_channels(self) -> int:
        """Length of the axis that a per-channel scale keeps."""
        return self.shape[self.channel_axis]

    def weight_bytes(self, bits: int) -> int:
        """Bytes of the weights packed as one bit stream: ceil(n b / 8)."""
        return (self.num_weights * bits + 7) // 8


@dataclass(frozen=True)
class Assignment:
    """A bit-width for each layer, in the order of the space; None leaves the layer in float.

    Partial assignments (some None) are probes; full ones are answers.
    """

    bits: tuple[int | None, ...]

    @property
    def is_full(self) -> bool:
        """Whether every layer has a bit-width."""
        return None not in self.bits

    @property
    def key(self) -> str:
        """Short hash that names this assignment in files."""
        return hashlib.sha256(json.dumps(self.bits).encode()).hexdigest()[:16]

    def replace(self, layer: int, bits: int | None) -> "Assignment":
        """A copy with another bit-width for one layer."""
        return Assignment((*self.bits[:layer], bits, *self.bits[layer + 1 :]))

    def __str__(self) -> str:
        return " ".join("-" if b is None else str(b) for b in self.bits)


def check_bits(bits: Sequence[int], whose: str = "bits") -> tuple[int, ...]:
    """The bit-widths as a tuple, refused unless ascending integers within 1..16."""
    if not bits:
        raise ConfigurationError(
            f"{whose} is empty; expected ascending integers within {MIN_BITS}..{MAX_BITS}, such as [2, 4, 8]"
        )
    for b in bits:
        if isinstance(b, bool) or not isinstance(b, int) or not MIN_BITS <= b <= MAX_BITS:
            raise ConfigurationError(f"{whose} holds {b!r}; expected integers within {MIN_BITS}..{MAX_BITS}, such as [2, 4, 8]")
    if list(bits) != sorted(set(bits)):
        raise ConfigurationError(f"{whose} is {list(bits)}; expected ascending and distinct, so {sorted(set(bits))}")
    return tuple(bits)


@dataclass(frozen=True)
class SearchSpace:
    """Layers × candidate bit-widths, with groups of layers that must share a bit-width (`ties`, of layer indices)."""

    layers: tuple[Layer, ...]
    bit_widths: tuple[tuple[int, ...], ...]
    ties: tuple[tuple[int, ...], ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigurationError(
                "no layer is left to search; expected at least one convolution or linear weight that is not fixed"
            )
        if len(self.layers) != len(self.bit_widths):
            raise ConfigurationError(f"{len(self.layers)} layers but {len(self.bit_widths)} sets of bit-widths")
        for layer, bits in zip(self.layers, self.bit_widths, strict=True):
            check_bits(bits, f"bits of {layer.name}")
        seen: set[int] = set()
        for group in self.ties:
            names = [self.layers[i].name for i in group]
            if seen & set(group):
                raise ConfigurationError(f"a layer of the tie {names} is in another tie as well; join the two ties into one")
            if len({self.bit_widths[i] for i in group}) > 1:
                raise ConfigurationError(f"tied layers {names} have different bit-widths; give them the same candidates")
            seen |= set(group)

    @classmethod
    def uniform(cls, layers: Sequence[Layer], bits: Sequence[int], ties: Sequence[Sequence[int]] = ()) -> "SearchSpace":
        """The same bit-widths for every layer."""
        return cls(tuple(layers), (check_bits(bits),) * len(layers), tuple(tuple(t) for t in ties))

    def restricted(self, candidates: Mapping[str, Sequence[int]]) -> "SearchSpace":
        """Other bit-widths for the layers whose name matches a pattern (`fnmatch`); a single one pins the layer."""
        widths = list(self.bit_widths)
        for pattern, bits in candidates.items():
            matched = [i for i, layer in enumerate(self.layers) if fnmatchcase(layer.name, pattern)]
            if not matched:
                raise ConfigurationError(f"no searched layer matches {pattern!r}; layers are {', '.join(self.names)}")
            for i in matched:
                widths[i] = check_bits(bits, f"bits of {self.layers[i].name}")
        return SearchSpace(self.layers, tuple(widths), self.ties)

    def tied(self, groups: Sequence[Sequence[str]]) -> "SearchSpace":
        """The same space with groups of layers, given by name patterns, that must share a bit-width."""
        ties = []
        for patterns in groups:
            matched = [i for i, layer in enumerate(self.layers) if any(fnmatchcase(layer.name, p) for p in patterns)]
            if len(matched) < 2:
                found = ", ".join(self.layers[i].name for i in matched) or "no layer"
                raise ConfigurationError(
                    f"the tie {list(patterns)} matches {found}; expected two or more of {', '.join(self.names)}"
                )
            ties.append(tuple(matched))
        return SearchSpace(self.layers, self.bit_widths, tuple(ties))

    @property
    def num_layers(self) -> int:
        """I, the number of searched layers."""
        return len(self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(layer.name for layer in self.layers)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First option of each layer; the last entry is the number of options."""
        total, offsets = 0, [0]
        for bits in self.bit_widths:
            total += len(bits)
            offsets.append(total)
        return tuple(offsets)

    @property
    def num_options(self) -> int:
        """K, the number of (layer, bit-width) pairs: the order of the interaction matrix."""
        return self.offsets[-1]

    @cached_property
    def options(self) -> tuple[tuple[int, int], ...]:
        """(layer, bits) of each option, in order."""
        return tuple((i, b) for i, bits in enumerate(self.bit_widths) for b in bits)

    def option(self, layer: int, bits: int) -> int:
        """Number of the option (layer, bits)."""
        try:
            return self.offsets[layer] + self.bit_widths[layer].index(bits)
        except ValueError:
            raise ConfigurationError(
                f"{self.layers[layer].name} has no {bits}-bit candidate; its candidates are {list(self.bit_widths[layer])}"
            ) from None

    def chosen_options(self, assignment: Assignment) -> list[int]:
        """Options that the assignment takes, one for each layer that has a bit-width."""
        self.check(assignment)
        return [self.option(i, b) for i, b in enumerate(assignment.bits) if b is not None]

    def check(self, assignment: Assignment) -> None:
        """Refuses an assignment of another number of layers."""
        if len(assignment.bits) != self.num_layers:
            raise ConfigurationError(f"the assignment has {len(assignment.bits)} layers, the space {self.num_layers}")

    def assignment(self, options: Sequence[int]) -> Assignment:
        """The assignment that takes these options."""
        bits: list[int | None] = [None] * self.num_layers
        for option in options:
            layer, b = self.options[option]
            bits[layer] = b
        return Assignment(tuple(bits))

    @property
    def nothing(self) -> Assignment:
        """The float network."""
        return Assignment((None,) * self.num_layers)

    @property
    def narrowest(self) -> Assignment:
        """The least bit-width everywhere."""
        return Assignment(tuple(bits[0] for bits in self.bit_widths))

    @property
    def widest(self) -> Assignment:
        """The largest bit-width everywhere."""
        return Assignment(tuple(bits[-1] for bits in self.bit_widths))

    def uniform_assignments(self) -> Iterator[tuple[int, Assignment]]:
        """(bits, assignment) of every bit-width some layer offers, ascending; a layer without it takes its nearest."""
        for b in sorted({b for bits in self.bit_widths for b in bits}):
            yield b, Assignment(tuple(min(bits, key=lambda c: (abs(c - b), -c)) for bits in self.bit_widths))

    @property
    def num_weights(self) -> int:
        """Number of searched weights."""
        return sum(layer.num_weights for layer in self.layers)

    def size_bits(self, assignment: Assignment) -> int:
        """Σ n b over the searched layers; a layer left in float counts 32 bits a weight."""
        self.check(assignment)
        return sum(layer.num_weights * (b or FLOAT_BITS) for layer, b in zip(self.layers, assignment.bits, strict=True))

    def size_bytes(self, assignment: Assignment) -> int:
        """Bytes of the searched weights, each tensor packed as one bit stream: Σ ceil(n b / 8)."""
        self.check(assignment)
        return sum(layer.weight_bytes(b or FLOAT_BITS) for layer, b in zip(self.layers, assignment.bits, strict=True))

    def average_bits(self, assignment: Assignment) -> float:
        """Bits per searched weight: Σ n b / Σ n."""
        return self.size_bits(assignment) / self.num_weights

    def to_json(self, assignment: Assignment) -> dict[str, Any]:
        """The assignment as a JSON object: layer name to bits, with its size."""
        return {
            "format": "clado-assignment/1",
            "bits": dict(zip(self.names, assignment.bits, strict=True)),
            "average_bits": self.average_bits(assignment),
            "size_bytes": self.size_bytes(assignment),
        }

    def from_json(self, document: Mapping[str, Any]) -> Assignment:
        """The assignment of a JSON object that `to_json` wrote, refused unless it names exactly the layers of this space."""
        bits = document.get("bits") if document.get("format") == "clado-assignment/1" else None
        if not isinstance(bits, Mapping):
            raise ConfigurationError('not an assignment: expected {"format": "clado-assignment/1", "bits": {layer: bits}}')
        missing, unknown = sorted(set(self.names) - set(bits)), sorted(set(bits) - set(self.names))
        if missing or unknown:
            raise ConfigurationError(
                f"the assignment is of another network: it lacks {missing or 'nothing'} and adds {unknown or 'nothing'}"
            )
        assignment = Assignment(tuple(bits[name] for name in self.names))
        self.chosen_options(assignment)
        return assignment
