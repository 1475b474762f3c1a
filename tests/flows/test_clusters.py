"""The contract for the cluster that needs no processes; tests/system holds it for the others."""

from clado.plugins import PACKAGE
from tests.contracts.cluster import ClusterContract


class TestInline(ClusterContract):
    settings = {"kind": "inline"}  # noqa: RUF012 (a constant of the contract)


def test_every_kind_of_cluster_keeps_the_contract():
    kinds = {file.stem for file in (PACKAGE.parent / "flows" / "clusters").glob("[!_]*.py")}
    tests = "".join(file.read_text() for file in (PACKAGE.parent / "tests").glob("*/test_*cluster*.py"))
    assert {kind for kind in kinds if f'"kind": "{kind}"' in tests} == kinds
