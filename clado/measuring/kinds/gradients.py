"""Squared first-order changes of each sample's log-likelihood: 2 × (1 + K) values a sample block."""

from typing import Any

from clado.measuring.kinds import TileKind
from clado.measuring.plan import Plan, Tile, Workload
from clado.space import SearchSpace


class Gradients(TileKind):
    """Row 0 squares the change of the log-likelihood; row 1 adds up the squares of its parts, weight by weight."""

    name = "gradients"
    title = "gradients of the loss"
    order = 60
    dimensions = ("estimator", "probe")
    needs = "classes"

    def shape(self, space: SearchSpace) -> tuple[int, ...]:
        """(2, 1 + K)."""
        return 2, 1 + space.num_options

    def terms(self, plan: Plan) -> dict[str, Any]:
        """The seed of what is drawn."""
        return {"seed": plan.seed}

    def evaluations(self, plan: Plan, tile: Tile) -> int:
        """The float network."""
        return 1

    def backwards(self, plan: Plan) -> int:
        """One."""
        return 1

    def macs(self, plan: Plan, tile: Tile, workload: Workload) -> int:
        """One forward and one backward pass, which multiplies twice as much."""
        return 3 * workload.macs


kind = Gradients()
