"""Singles of layers that are rounded to nearest, without corrections: 1 + K values a sample block."""

from clado.measuring.kinds import TileKind


class PlainSingles(TileKind):
    """The same losses as singles, of uncorrected layers."""

    name = "plain_singles"
    order = 20
    is_uncorrected = True


kind = PlainSingles()
