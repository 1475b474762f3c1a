"""Blocks of layers, read off the module tree that qualified names spell. Integers and names only; no torch.

A block is what a network repeats: a residual block, an inverted bottleneck, an encoder layer. It is the unit within which BRECQ
(arXiv 2102.05426, section 3.2) finds that the errors of layers depend on one another.
"""

from collections.abc import Sequence


def module_blocks(names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Blocks of layers (by index), given the qualified names of their weights; each layer is in one, alone where nothing repeats.

    From the root down, a module with several layers is a block where its name ends in a number and it holds no numbered module
    of several layers itself (`layer1.0` is one, `layer1` is not), or where none of its children has several layers.
    """
    paths = [tuple(name.split(".")[:-1]) for name in names]

    def split(prefix: tuple[str, ...], members: list[int]) -> list[tuple[int, ...]]:
        depth = len(prefix)
        children: dict[str, list[int]] = {}
        for i in members:
            children.setdefault(paths[i][depth] if len(paths[i]) > depth else "", []).append(i)
        large = [name for name, inner in children.items() if name and len(inner) > 1]
        numbered = bool(prefix) and prefix[-1][-1:].isdigit()
        if prefix and (not large or (numbered and not any(name[-1].isdigit() for name in large))):
            return [tuple(members)]
        found: list[tuple[int, ...]] = []
        for name, inner in children.items():
            found += split((*prefix, name), inner) if name in large else [(i,) for i in inner]
        return found

    return tuple(sorted(split((), list(range(len(names))))))
