"""Blocks of layers, from the module tree in qualified names. Uses integers and names only, no torch.

A block is a part that a network repeats: a residual block, an inverted bottleneck, an encoder
layer. BRECQ (arXiv 2102.05426, section 3.2) finds that the errors of the layers in a block depend
on one another.
"""

from collections.abc import Sequence


def module_blocks(names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Blocks of layers, by index. Each layer is in one block, which may hold that layer only.

    The search begins at the root of the module tree. A module with several layers is a block if none
    of its children has several layers. It is also a block if its name ends in a number, and none of
    its children is a numbered module with several layers. So `layer1.0` is a block, and `layer1` is
    not.

    Args:
        names: Qualified names of the layers' weights.
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
        blocks: list[tuple[int, ...]] = []
        for name, inner in children.items():
            blocks += split((*prefix, name), inner) if name in large else [(i,) for i in inner]
        return blocks

    return tuple(sorted(split((), list(range(len(names))))))
