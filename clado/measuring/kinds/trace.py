"""Hessian traces times squared errors of every option: 1 + K values a sample block."""

from typing import Any

from clado.measuring.kinds import TileKind
from clado.measuring.plan import Plan, Tile, Workload


class Trace(TileKind):
    """The loss of the float network, then for each option its layer's average trace times its squared error."""

    name = "trace"
    title = "curvature along random vectors"
    order = 70

    def terms(self, plan: Plan) -> dict[str, Any]:
        """The seed and the number of random vectors."""
        return {"seed": plan.seed, "num_vectors": plan.num_vectors}

    def evaluations(self, plan: Plan, tile: Tile) -> int:
        """The float network."""
        return 1

    def backwards(self, plan: Plan) -> int:
        """One for the gradient, and one for each random vector."""
        return 1 + plan.num_vectors

    def macs(self, plan: Plan, tile: Tile, workload: Workload) -> int:
        """A backward pass multiplies twice as much as a forward pass, and one through both of them twice as much again."""
        return (3 + 4 * plan.num_vectors) * workload.macs


kind = Trace()
