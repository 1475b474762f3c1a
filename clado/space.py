"""Layers, their candidate bit-widths, and assignments of bit-widths to layers.

Integers only; no torch.

An *option* is one layer at one bit-width of its weights. If activations are quantized, an option
also has one bit-width of the layer's input activations. One option of a layer may be float: its
weights and its input stay as they are. Options are numbered layer by layer in execution order,
narrow before wide, float last. Option `offsets[i] + m` is the m-th candidate of layer i: a
pair (weight bits, activation bits). Matrices, programs and plans index options. Only this file
knows what an option means.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

from clado.bits import FLOAT_BITS, bits_text, check_bits, check_candidates, label
from clado.blocks import module_blocks
from clado.errors import ConfigurationError

RECONSTRUCTED = ("balanced", "best")
"""The efforts of a reconstruction that an assignment may be deployed with."""
CORRECTED = ("all", "static", "none", *RECONSTRUCTED)
"""The corrections that an assignment is deployed with: all of the run, only the static ones, none, or a reconstruction."""


@dataclass(frozen=True)
class Layer:
    """A weight tensor that a convolution or a linear operator reads."""

    name: str
    """Qualified name of the parameter."""
    shape: tuple[int, ...]
    """Shape of the tensor."""
    operator: str
    """Name of the operator, such as conv2d or linear."""
    macs: int = 0
    """Multiply-accumulates of one image."""
    channel_axis: int = 0
    """The axis of the output channels. Each channel has a scale."""

    @property
    def num_weights(self) -> int:
        """Number of elements of the tensor."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def num_channels(self) -> int:
        """Number of output channels."""
        return self.shape[self.channel_axis]

    def weight_bytes(self, bits: int | None) -> int:
        """Bytes of the weights packed as one bit stream: ceil(n b / 8).

        Args:
            bits: Bits of one weight. None: 32, in float.
        """
        return (self.num_weights * (bits or FLOAT_BITS) + 7) // 8


class Option(NamedTuple):
    """A layer at a bit-width of its weights and of its input activations, or a layer in float."""

    layer: int
    """Index of the layer."""
    bits: int | None
    """Bit-width of the weights. If it is None, weights and input stay in float."""
    activation_bits: int | None
    """Bit-width of the input activations; None: they stay in float."""


@dataclass(frozen=True)
class Assignment:
    """A bit-width for each layer, in the order of the space.

    A partial assignment leaves layers in float that have no float candidate. It is used for
    measuring. Answers are full assignments.
    """

    bits: tuple[int | None, ...]
    """Bit-width of each layer's weights; None leaves the layer in float."""
    activation_bits: tuple[int | None, ...] = ()
    """Bit-width of each layer's input activations, None for a layer in float.

    Empty if activations are not quantized.
    """
    corrected: str = "all"
    """The corrections of the run that the assignment is deployed with.

    "static" means those that are made before measuring, without the final ones. "none" means rounding
    to nearest. "balanced" and "best" mean reconstructed with this effort. A run without corrections
    has only "all" and these two.
    """

    def __post_init__(self) -> None:
        if self.corrected not in CORRECTED:
            raise ConfigurationError(f"corrected is {self.corrected!r}; expected one of {', '.join(CORRECTED)}")
        if self.activation_bits and len(self.activation_bits) != len(self.bits):
            raise ConfigurationError(
                f"the assignment has bits for {len(self.bits)} layers but activation bits for {len(self.activation_bits)}; "
                "expected one for each layer, or none"
            )

    @property
    def pairs(self) -> tuple[tuple[int | None, int | None], ...]:
        """(weight bits, activation bits) of each layer. None for float."""
        return tuple(zip(self.bits, self.activation_bits or (None,) * len(self.bits), strict=True))

    @property
    def is_float(self) -> bool:
        """Whether every layer stays in float."""
        return all(bits is None for bits in self.bits)

    @property
    def key(self) -> str:
        """Short hash that names this assignment in files."""
        document = [self.bits, self.activation_bits, self.corrected]
        return hashlib.sha256(json.dumps(document).encode()).hexdigest()[:16]

    @property
    def is_reconstructed(self) -> bool:
        """Whether a reconstruction of it is deployed."""
        return self.corrected in RECONSTRUCTED

    def replace(self, layer: int, bits: int | None, activation_bits: int | None = None) -> "Assignment":
        """A copy with another bit-width of the weights and of the input activations of one layer.

        Args:
            layer: Index of the layer.
            bits: Its bit-width. None leaves the layer in float.
            activation_bits: Bit-width of its input activations.
        """
        pairs = list(self.pairs)
        pairs[layer] = (bits, activation_bits)
        has_activations = bool(self.activation_bits) or activation_bits is not None
        return Assignment(tuple(b for b, _ in pairs), tuple(a for _, a in pairs) if has_activations else (), self.corrected)

    def with_corrections(self, corrected: str) -> "Assignment":
        """The same bits, deployed with all, the static or none of the run's corrections, or reconstructed.

        Args:
            corrected: One of `CORRECTED`.

        Raises:
            ConfigurationError: `corrected` is another word.
        """
        return replace(self, corrected=corrected)

    def __str__(self) -> str:
        return " ".join(bits_text(bits, activation_bits) for bits, activation_bits in self.pairs)


def check_patterns(patterns: Sequence[str], subject: str) -> tuple[str, ...]:
    """Name patterns (`fnmatch`) as a tuple.

    Raises ConfigurationError for a string, which would be a sequence of one-letter patterns.
    """
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigurationError(f"{subject} is {patterns!r}; expected a list of name patterns, such as ['head.*']")
    return tuple(patterns)


@dataclass(frozen=True, repr=False)
class SearchSpace:
    """The searched layers and their candidate bit-widths."""

    layers: tuple[Layer, ...]
    """The searched layers, in execution order."""
    bit_widths: tuple[tuple[int | None, ...], ...]
    """Candidate bit-widths of each layer's weights, ascending. None after them leaves the layer in float."""
    ties: tuple[tuple[int, ...], ...] = ()
    """Groups of layers (indices) that must have the same candidate."""
    activation_widths: tuple[int | None, ...] = (None,)
    """Candidate bit-widths of every layer's input activations, ascending; (None,) for float."""
    custom_blocks: tuple[tuple[int, ...], ...] = ()
    """Blocks of layers (indices) that replace those of the module tree.

    They change which pairs are measured, but not which assignments can be chosen.
    """

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigurationError(
                "no layer is left to search; expected at least one convolution or linear weight that is not fixed"
            )
        if len(self.layers) != len(self.bit_widths):
            raise ConfigurationError(f"{len(self.layers)} layers but {len(self.bit_widths)} sets of bit-widths")
        for layer, bits in zip(self.layers, self.bit_widths, strict=True):
            check_candidates(bits, f"bits of {layer.name}")
        if not self.quantized_options:
            raise ConfigurationError("every layer has only the candidate float; expected a bit-width for at least one layer")
        if self.activation_widths != (None,):
            check_bits(self.activation_widths, "activation_widths")
        tied_layers: set[int] = set()
        for group in self.ties:
            if len(set(group)) < max(2, len(group)) or not all(0 <= i < len(self.layers) for i in group):
                raise ConfigurationError(
                    f"the tie {group} does not have two different layers; expected numbers within 0..{len(self.layers) - 1}"
                )
            names = [self.layers[i].name for i in group]
            if tied_layers & set(group):
                raise ConfigurationError(f"a layer of the tie {names} is also in another tie; join the two ties into one")
            if len({self.bit_widths[i] for i in group}) > 1:
                raise ConfigurationError(f"tied layers {names} have different bit-widths; give them the same candidates")
            tied_layers |= set(group)

    def __repr__(self) -> str:
        return f"SearchSpace({self.num_layers} layers, {self.num_options} options)"

    @classmethod
    def uniform(
        cls, layers: Sequence[Layer], bits: Sequence[int | str | None], ties: Sequence[Sequence[int]] = ()
    ) -> "SearchSpace":
        """The same bit-widths for every layer.

        Args:
            layers: The searched layers, in execution order.
            bits: Candidate bit-widths, ascending, each from 1 to 16. "float" or None after them
                leaves the layer in float.
            ties: Groups of layers (indices) that must have the same candidate.

        Raises:
            ConfigurationError: There is no layer, or bits or ties are impossible.
        """
        return cls(tuple(layers), (check_candidates(bits),) * len(layers), tuple(tuple(t) for t in ties))

    def _matches(self, patterns: Sequence[str]) -> tuple[int, ...]:
        """Layers (indices) whose name matches a pattern (`fnmatch`)."""
        return tuple(i for i, layer in enumerate(self.layers) if any(fnmatchcase(layer.name, p) for p in patterns))

    def restricted(self, candidates: Mapping[str, Sequence[int | str | None]]) -> "SearchSpace":
        """Other bit-widths for the layers whose name matches a pattern (`fnmatch`).

        Args:
            candidates: Pattern -> bit-widths, in the form of `uniform`. A single one pins the layer.

        Raises:
            ConfigurationError: A pattern matches no layer, or bits are impossible.
        """
        widths = list(self.bit_widths)
        for pattern, bits in candidates.items():
            indices = self._matches([pattern])
            if not indices:
                raise ConfigurationError(f"no searched layer matches {pattern!r}; layers are {', '.join(self.names)}")
            for i in indices:
                widths[i] = check_candidates(bits, f"bits of {self.layers[i].name}")
        return replace(self, bit_widths=tuple(widths))

    def tied(self, groups: Sequence[Sequence[str]]) -> "SearchSpace":
        """The same space with groups of layers that must have equal bits.

        Args:
            groups: Name patterns (`fnmatch`) of each group.

        Raises:
            ConfigurationError: A group matches fewer than two layers, or their candidates differ.
        """
        ties = []
        for patterns in (check_patterns(group, "a tie") for group in groups):
            indices = self._matches(patterns)
            if len(indices) < 2:
                names = ", ".join(self.layers[i].name for i in indices) or "no layer"
                raise ConfigurationError(
                    f"the tie {list(patterns)} matches {names}; expected two or more of {', '.join(self.names)}"
                )
            ties.append(indices)
        return replace(self, ties=tuple(ties))

    def blocked(self, groups: Sequence[Sequence[str]]) -> "SearchSpace":
        """The same space with blocks of layers instead of the module tree's.

        Each other layer is a block.

        Args:
            groups: Name patterns (`fnmatch`) of each block.

        Raises:
            ConfigurationError: A block matches no layer, or a layer is in two blocks.
        """
        blocks: list[tuple[int, ...]] = []
        for patterns in (check_patterns(group, "a block") for group in groups):
            indices = self._matches(patterns)
            if not indices:
                raise ConfigurationError(f"the block {list(patterns)} matches no layer; layers are {', '.join(self.names)}")
            duplicates = [self.layers[i].name for i in indices if any(i in block for block in blocks)]
            if duplicates:
                raise ConfigurationError(f"{', '.join(duplicates)} is in two blocks; expected each layer in at most one")
            blocks.append(indices)
        return replace(self, custom_blocks=tuple(blocks))

    @cached_property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """Groups of layers (indices) that depend on one another. Each layer is in one block."""
        if not self.custom_blocks:
            return module_blocks(self.names)
        other_layers = set(range(self.num_layers)).difference(*self.custom_blocks)
        return tuple(sorted([*self.custom_blocks, *((i,) for i in other_layers)]))

    def with_activations(self, widths: Sequence[int]) -> "SearchSpace":
        """The same space with candidate bit-widths of every layer's input activations.

        Args:
            widths: The bit-widths, ascending. Without any, activations stay in float.

        Raises:
            ConfigurationError: Bit-widths are impossible.
        """
        return replace(self, activation_widths=check_bits(widths, "activation_widths") if widths else (None,))

    @property
    def num_layers(self) -> int:
        """The number of searched layers, I."""
        return len(self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(layer.name for layer in self.layers)

    @property
    def has_activations(self) -> bool:
        """Whether input activations are quantized."""
        return self.activation_widths != (None,)

    def candidates(self, layer: int) -> tuple[tuple[int | None, int | None], ...]:
        """(weight bits, activation bits) that a layer may have, in the order of its options. (None, None) is float."""
        widths = self.bit_widths[layer]
        in_float: list[tuple[int | None, int | None]] = [(None, None)] if widths[-1] is None else []
        return (*product([bits for bits in widths if bits is not None], self.activation_widths), *in_float)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First option of each layer; the last entry is the number of options."""
        total, offsets = 0, [0]
        for layer in range(self.num_layers):
            total += len(self.candidates(layer))
            offsets.append(total)
        return tuple(offsets)

    @property
    def num_options(self) -> int:
        """The number of options, K. The interaction matrix is K × K."""
        return self.offsets[-1]

    @cached_property
    def options(self) -> tuple[Option, ...]:
        """Layer, weight bits and activation bits of each option, in order."""
        return tuple(Option(i, *widths) for i in range(self.num_layers) for widths in self.candidates(i))

    @cached_property
    def quantized_options(self) -> tuple[int, ...]:
        """Numbers of the options that are not float. Float options change nothing, so they are not measured."""
        return tuple(k for k, option in enumerate(self.options) if option.bits is not None)

    @cached_property
    def float_options(self) -> tuple[int, ...]:
        """Numbers of the float options, at most one for each layer."""
        return tuple(k for k, option in enumerate(self.options) if option.bits is None)

    def options_of(self, layer: int) -> range:
        """Numbers of a layer's options."""
        return range(self.offsets[layer], self.offsets[layer + 1])

    def option(self, layer: int, bits: int | None, activation_bits: int | None = None) -> int:
        """Number of the option.

        Args:
            layer: Index of the layer.
            bits: Bit-width of its weights. None leaves the layer in float.
            activation_bits: Bit-width of its input activations. It may be left out for
                float, or if there is one activation width.

        Raises:
            ConfigurationError: The layer has no such option.
        """
        name = self.layers[layer].name
        if bits not in self.bit_widths[layer]:
            offered = ", ".join(map(bits_text, self.bit_widths[layer]))
            wanted = "float" if bits is None else f"{bits}-bit"
            raise ConfigurationError(f"{name} has no {wanted} candidate; its candidates are [{offered}]")
        if bits is None:
            return self.offsets[layer + 1] - 1
        if activation_bits is None and len(self.activation_widths) > 1:
            raise ConfigurationError(f"{name} has no activation bits; expected one of {list(self.activation_widths)}")
        width = self.activation_widths[0] if activation_bits is None else activation_bits
        if width not in self.activation_widths:
            raise ConfigurationError(
                f"{name} has no candidate with {width}-bit activations; its activations "
                + (f"are at one of {list(self.activation_widths)} bits" if self.has_activations else "stay in float")
            )
        position = self.bit_widths[layer].index(bits) * len(self.activation_widths) + self.activation_widths.index(width)
        return self.offsets[layer] + position

    def label(self, option: int) -> str:
        """Layer and bits of an option, for messages and axes."""
        layer, bits, activation_bits = self.options[option]
        return label(self.layers[layer].name, bits, activation_bits)

    def completed(self, assignment: Assignment) -> Assignment:
        """The assignment with activation bits for each layer.

        If the space has no activation widths, the result has no activation bits. If the space has
        one, an assignment without activation bits gets that one.

        Raises:
            ConfigurationError: The number of layers differs, activation bits are missing, or a layer
                whose activations stay in float has some.
        """
        if len(assignment.bits) != self.num_layers:
            raise ConfigurationError(f"the assignment has {len(assignment.bits)} layers, the space {self.num_layers}")
        activation_bits: list[int | None] = []
        for layer, (bits, width) in zip(self.layers, assignment.pairs, strict=True):
            if width is not None and (bits is None or not self.has_activations):
                reason = "the layer itself stays in float" if bits is None else "activations stay in float here"
                raise ConfigurationError(f"the assignment has {width}-bit activations for {layer.name}, but {reason}")
            if bits is not None and width is None and len(self.activation_widths) > 1:
                raise ConfigurationError(
                    f"the assignment has no activation bits for {layer.name}; expected one of {list(self.activation_widths)}"
                )
            activation_bits.append(width if bits is None or width is not None else self.activation_widths[0])
        return Assignment(assignment.bits, tuple(activation_bits) if self.has_activations else (), assignment.corrected)

    def chosen_options(self, assignment: Assignment) -> list[int]:
        """Options that the assignment takes, one for each layer that has a bit-width or may be in float.

        Raises:
            ConfigurationError: The assignment does not fit, as in `completed`.
        """
        pairs = self.completed(assignment).pairs
        return [
            self.option(i, bits, width)
            for i, (bits, width) in enumerate(pairs)
            if bits is not None or self.bit_widths[i][-1] is None
        ]

    def check(self, assignment: Assignment) -> None:
        """Raises ConfigurationError if the assignment does not fit, as `completed` does."""
        self.completed(assignment)

    def assignment(self, options: Sequence[int]) -> Assignment:
        """The assignment that takes these options. All other layers stay in float.

        Args:
            options: Numbers of options, at most one for each layer.
        """
        pairs: list[tuple[int | None, int | None]] = [(None, None)] * self.num_layers
        for option in options:
            layer, bits, activation_bits = self.options[option]
            pairs[layer] = bits, activation_bits
        return Assignment(tuple(b for b, _ in pairs), tuple(a for _, a in pairs) if self.has_activations else ())

    def _everywhere(self, bits: Sequence[int | None], activation_bits: int | None) -> Assignment:
        widths = tuple(None if b is None else activation_bits for b in bits) if self.has_activations else ()
        return Assignment(tuple(bits), widths)

    @property
    def nothing(self) -> Assignment:
        """The float network."""
        return self._everywhere((None,) * self.num_layers, None)

    @property
    def narrowest(self) -> Assignment:
        """The least bit-widths everywhere."""
        return self._everywhere([bits[0] for bits in self.bit_widths], self.activation_widths[0])

    @property
    def widest(self) -> Assignment:
        """The largest bit-widths everywhere. Float, if it is a candidate."""
        return self._everywhere([bits[-1] for bits in self.bit_widths], self.activation_widths[-1])

    def uniform_assignments(self) -> Iterator[tuple[int, Assignment]]:
        """(bits, assignment) of every candidate bit-width of any layer, ascending; float counts 32 bits.

        There is one for each activation width, and a single one if all layers are in float. A layer
        without this candidate takes the nearest one.
        """
        for b in sorted({c or FLOAT_BITS for bits in self.bit_widths for c in bits}):
            nearest = [min(bits, key=lambda c: (abs((c or FLOAT_BITS) - b), -(c or FLOAT_BITS))) for bits in self.bit_widths]
            for activation_bits in self.activation_widths if any(nearest) else (None,):
                yield b, self._everywhere(nearest, activation_bits)

    @property
    def num_weights(self) -> int:
        """Number of searched weights."""
        return sum(layer.num_weights for layer in self.layers)

    def size_bits(self, assignment: Assignment) -> int:
        """Bits of the searched weights: Σ n b. A layer left in float counts 32 bits a weight.

        Raises:
            ConfigurationError: The assignment does not fit, as in `completed`.
        """
        self.check(assignment)
        return sum(layer.num_weights * (b or FLOAT_BITS) for layer, b in zip(self.layers, assignment.bits, strict=True))

    def size_bytes(self, assignment: Assignment) -> int:
        """Bytes of the searched weights, each tensor packed as one bit stream: Σ ceil(n b / 8).

        Raises:
            ConfigurationError: The assignment does not fit, as in `completed`.
        """
        self.check(assignment)
        return sum(layer.weight_bytes(b) for layer, b in zip(self.layers, assignment.bits, strict=True))

    def average_bits(self, assignment: Assignment) -> float:
        """Bits per searched weight: Σ n b / Σ n.

        Raises:
            ConfigurationError: The assignment does not fit, as in `completed`.
        """
        return self.size_bits(assignment) / self.num_weights

    def to_json(self, assignment: Assignment) -> dict[str, Any]:
        """The assignment as a JSON object: bits and activation bits by layer name, and its size."""
        assignment = self.completed(assignment)
        widths = assignment.activation_bits
        return {
            "format": "clado-assignment/1",
            "bits": dict(zip(self.names, assignment.bits, strict=True)),
            **({"activation_bits": dict(zip(self.names, widths, strict=True))} if widths else {}),
            **({"corrected": assignment.corrected} if assignment.corrected != "all" else {}),
            "average_bits": self.average_bits(assignment),
            "size_bytes": self.size_bytes(assignment),
        }

    def from_json(self, document: Mapping[str, Any]) -> Assignment:
        """The assignment of a JSON object that `to_json` wrote.

        A document without activation bits takes the space's activation width, if there is one.

        Raises:
            ConfigurationError: The document is not an assignment, or its layers or bits do not belong
                to this space.
        """
        bits = document.get("bits") if document.get("format") == "clado-assignment/1" else None
        if not isinstance(bits, Mapping):
            raise ConfigurationError('not an assignment: expected {"format": "clado-assignment/1", "bits": {layer: bits}}')
        widths = document.get("activation_bits", {})
        if not isinstance(widths, Mapping):
            raise ConfigurationError(f"activation_bits is {widths!r}; expected an object of layer names to bits")
        missing, unknown = sorted(set(self.names) - set(bits)), sorted((set(bits) | set(widths)) - set(self.names))
        if missing or unknown:
            raise ConfigurationError(
                f"the assignment belongs to another network: it lacks {missing or 'nothing'} and adds {unknown or 'nothing'}"
            )
        activation_bits = tuple(widths.get(name) for name in self.names) if widths else ()
        corrected = document.get("corrected", "all")
        assignment = self.completed(Assignment(tuple(bits[name] for name in self.names), activation_bits, corrected))
        self.chosen_options(assignment)
        return assignment
