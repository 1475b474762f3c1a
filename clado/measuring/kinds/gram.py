"""Losses as in singles, and Gram matrices of the logits' changes, one for each temperature: (2 + T K) × (1 + K) values."""

from typing import Any

from clado.measuring.kinds import TileKind
from clado.measuring.plan import Plan
from clado.space import SearchSpace

TEMPERATURES = (1, 2, 4, 8)
"""Temperatures of the softmax, one for each Gram matrix. 1 gives the float network's softmax."""

SAMPLED_VALUES = 4096
"""Most values of a sample's curvature for a user-defined criterion. Of larger outputs this many are drawn."""
SAMPLE_SEED = 0
"""Seed of the draw."""


class Gram(TileKind):
    """Row 0 holds the singles, row 1 first-order changes of the loss; then come the Gram matrices, K rows each."""

    name = "gram"
    title = "each option alone, with its logits"
    order = 40
    dimensions = ("probe", "option")
    needs = "curvature"

    def shape(self, space: SearchSpace) -> tuple[int, ...]:
        """(2 + T K, 1 + K) of T temperatures."""
        return 2 + len(TEMPERATURES) * space.num_options, 1 + space.num_options

    def terms(self, plan: Plan) -> dict[str, Any]:
        """What the rows hold."""
        return {"rows": ["losses", "first order", *(f"gram at {t:g}" for t in TEMPERATURES)]}


kind = Gram()
