"""Singles of layers that are rounded to nearest, without corrections: 1 + K values a sample block, of a quarter of them."""

from clado.measuring.kinds import TileKind


class PlainSingles(TileKind):
    """The same losses as singles, of uncorrected layers, on a quarter of the sample blocks.

    They only give proposals for networks without corrections. These networks are then measured on all images.
    """

    name = "plain_singles"
    title = "each option alone, rounded to nearest"
    order = 20
    is_uncorrected = True

    def num_blocks(self, sample_blocks: int) -> int:
        """A quarter of the blocks, and at least two if there are two."""
        return max(min(2, sample_blocks), -(-sample_blocks // 4))


kind = PlainSingles()
