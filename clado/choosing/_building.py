"""The parts that a program is built from: groups, choices, excluded options and merged matrices. NumPy only."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from clado.bits import bits_text
from clado.choosing.constraints import Constraint
from clado.errors import ConfigurationError, InfeasibleError
from clado.interaction.matrix import Array
from clado.space import SearchSpace

Pairs = Collection[tuple[int, int]]


def check_constraints(space: SearchSpace, constraints: Sequence[Constraint]) -> None:
    """Raises ConfigurationError for constraints of another space, and for two with the same name."""
    names = [constraint.name for constraint in constraints]
    for constraint in constraints:
        if len(constraint.costs) != space.num_options:
            raise ConfigurationError(
                f"constraint {constraint.name} has {len(constraint.costs)} costs; the space has {space.num_options} options"
            )
        if names.count(constraint.name) > 1:
            raise ConfigurationError(f"two constraints are called {constraint.name}; keep one of them, or rename one")


def choices_of(
    space: SearchSpace, groups: Sequence[tuple[int, ...]], excluded: set[int], pairs: Pairs
) -> tuple[list[tuple[int, ...]], NDArray[np.intp]]:
    """The options of each choice, and the first choice of each group, then the number of choices.

    A choice is left out if one of its options is excluded, or two of them are a forbidden pair.

    Raises:
        InfeasibleError: A group has no choice left.
    """
    options: list[tuple[int, ...]] = []
    starts = [0]
    for group in groups:
        for candidate in space.candidates(group[0]):
            choice = tuple(space.option(layer, *candidate) for layer in group)
            if excluded.isdisjoint(choice) and not any((a, b) in pairs for a in choice for b in choice):
                options.append(choice)
        if len(options) == starts[-1]:
            raise InfeasibleError(f"no bit-width is left for {listed(space, group)}; allow another candidate, or remove a pin")
        starts.append(len(options))
    return options, np.array(starts, dtype=np.intp)


def clashing_choices(options: Sequence[tuple[int, ...]], starts: NDArray[np.intp], pairs: Pairs) -> tuple[tuple[int, int], ...]:
    """Pairs (m, k), m < k, of choices of two groups whose options include a forbidden pair."""
    if not pairs:
        return ()
    owner = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return tuple(
        sorted(
            (m, k)
            for k in range(len(options))
            for m in range(k)
            if owner[k] != owner[m] and any((a, b) in pairs for a in options[k] for b in options[m])
        )
    )


def groups_of(space: SearchSpace) -> tuple[tuple[int, ...], ...]:
    """Ties and single layers, in the order of their first layer."""
    tie = {layer: tuple(sorted(group)) for group in space.ties for layer in group}
    return tuple(sorted({tie.get(layer, (layer,)) for layer in range(space.num_layers)}))


def excluded_options(
    space: SearchSpace, candidates: Mapping[str, Sequence[int | str | None]], quarantined: Collection[int]
) -> set[int]:
    """Options that may not be chosen."""
    for option in quarantined:
        if not 0 <= option < space.num_options:
            raise ConfigurationError(f"quarantined option {option} is not within 0..{space.num_options - 1}")
    excluded = set(quarantined)
    # Ties are left out here: a pin on one layer of a tie pins the tie, because a choice needs all of its options.
    narrowed = SearchSpace(space.layers, space.bit_widths).restricted(candidates)
    for layer, (measured, offered) in enumerate(zip(space.bit_widths, narrowed.bit_widths, strict=True)):
        if not set(offered) <= set(measured):
            raise ConfigurationError(
                f"{space.layers[layer].name} was measured at [{', '.join(map(bits_text, measured))}] bits; of "
                f"[{', '.join(map(bits_text, offered))}] some were not"
            )
        excluded |= {space.option(layer, *candidate) for candidate in space.candidates(layer) if candidate[0] not in offered}
    return excluded


def forbidden_pairs(space: SearchSpace, forbidden: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
    """Both orders of each pair of options."""
    pairs: set[tuple[int, int]] = set()
    for a, b in forbidden:
        if not (0 <= a < space.num_options and 0 <= b < space.num_options) or a == b:
            raise ConfigurationError(
                f"forbidden pair ({a}, {b}); expected two different options within 0..{space.num_options - 1}"
            )
        pairs |= {(a, b), (b, a)}
    return pairs


def merged(values: Array, options: Sequence[tuple[int, ...]]) -> Array:
    """Tᵀ G T: sums over the options of each choice."""
    if all(len(choice) == 1 for choice in options):
        single = [choice[0] for choice in options]
        return np.ascontiguousarray(values[np.ix_(single, single)])
    indicator = np.zeros((len(values), len(options)))
    for k, choice in enumerate(options):
        indicator[list(choice), k] = 1.0
    product = indicator.T @ values @ indicator
    return np.asarray((product + product.T) / 2)


def listed(space: SearchSpace, layers: Sequence[int]) -> str:
    """Names of layers for a message, at most three."""
    shown = ", ".join(space.layers[i].name for i in layers[:3])
    return shown + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
