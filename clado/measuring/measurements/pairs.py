"""Losses of two options at a time. Each row of the sweep is resumed with every option of later layers."""

from collections.abc import Sequence

import numpy as np
import torch

from clado.measuring.kinds.pairs import kind as all_pairs
from clado.measuring.pair_kind import PairKind
from clado.measuring.plan import Tile
from clado.measuring.sweep import sweep
from clado.measuring.workbench import Array, Pass, Workbench, to_numpy
from clado.network.network import State


def measure(bench: Workbench, tile: Tile, kind: PairKind = all_pairs) -> Array:
    """(rows, K) sums of losses of the tile's rows with every later option of their group; NaN elsewhere."""
    space, network = bench.space, bench.network
    mask = kind.mask(space, tile.rows)
    sums = np.where(mask, 0.0, np.nan)
    rows = [row for row, pairs in zip(tile.rows, mask, strict=True) if pairs.any()]
    groups = [[row for row in rows if space.options[row].layer in layers] for layers in kind.layer_groups(space)]
    groups = sorted(filter(None, groups))  # in the order of their first row, so that one float run is enough for all
    for part in bench.passes(tile.sample_block):
        float_state = network.begin(part.images)
        for group in groups:
            first = space.options[group[0]].layer
            float_state = network.advance(float_state, first)
            _add_pairs(bench, part, group, kind.later_layers(space, first), float_state, sums, tile.first)
    return sums


def _add_pairs(
    bench: Workbench, part: Pass, rows: Sequence[int], layers: Sequence[int], float_state: State, sums: Array, first_row: int
) -> None:
    """Adds the losses of one pass, of `rows` with all options of `layers`, to `sums`, whose first row is `first_row`."""
    criterion = part.loss(bench.packed_criterion)
    for layer, stacks in sweep(bench, part, rows, float_state, layers[-1]):
        entries, losses = [], []
        for stack in stacks if layer in layers else []:
            for option in bench.space.options_of(layer):
                if bench.space.options[option].bits is None:
                    continue
                logits = bench.network.finish(stack.state, {layer: bench.quantized[option]})
                losses.append(criterion(logits.reshape(len(stack.rows), *part.float_logits.shape)))
                entries += [(row - first_row, option) for row in stack.rows]
        if losses:  # read back together, because a GPU would wait each time
            row, column = np.array(entries).T
            sums[row, column] += to_numpy(torch.cat(losses)).sum(1)
