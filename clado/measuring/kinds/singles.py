"""Losses of the float network and of every option alone: 1 + K values a sample block."""

from clado.measuring.kinds import TileKind


class Singles(TileKind):
    """The loss of the float network, then that of each option."""

    name = "singles"
    title = "each option alone"
    order = 10
    contained_in = "gram"  # its first row


kind = Singles()
