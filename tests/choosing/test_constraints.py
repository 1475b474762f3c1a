"""Constraints: the laws for each, exact budgets, and what is refused."""

from pathlib import Path

import pytest

from clado.choosing import constraints
from clado.choosing.constraints import Constraint
from clado.errors import ConfigurationError
from clado.plugins import available
from clado.space import Assignment, Layer, SearchSpace
from tests.contracts.constraint import ConstraintContract


def write_table(space: SearchSpace, folder: Path, unit: str, activations: bool = False) -> Path:
    keys = dict.fromkeys((space.layers[i].name, b, *([a] if activations else [])) for i, b, a in space.options)
    rows = [",".join(map(str, (*key, table_cost(space.names.index(key[0]), *key[1:])))) for key in keys]
    header, elsewhere = ("layer,bits,activation_bits", "elsewhere,3,8,1.5") if activations else ("layer,bits", "elsewhere,3,1.5")
    path = folder / "table.csv"
    path.write_text("\n".join([f"{header},{unit}", *reversed(rows), elsewhere]) + "\n")
    return path


def table_cost(layer: int, bits: int, activation_bits: int = 0) -> float:
    return (layer + 1) * 0.1 + bits * 0.01 + activation_bits * 0.001


class TestSize(ConstraintContract):
    wide_bound, unit = 1e9, "bytes"

    def build(self, space: SearchSpace, bound: float, folder: Path) -> Constraint:
        return constraints.constraint("size", space, bound)

    def expected(self, space: SearchSpace, assignment: Assignment) -> float:
        return float(space.size_bytes(assignment))


class TestSizeWithScales(TestSize):
    def build(self, space: SearchSpace, bound: float, folder: Path) -> Constraint:
        return constraints.constraint("size", space, bound, overhead_bytes={"body": 44})

    def expected(self, space: SearchSpace, assignment: Assignment) -> float:
        return space.size_bytes(assignment) + 44.0


class TestAverageBits(ConstraintContract):
    wide_bound, unit = 16, "bits in all"

    def build(self, space: SearchSpace, bound: float, folder: Path) -> Constraint:
        return constraints.constraint("average_bits", space, bound)

    def expected(self, space: SearchSpace, assignment: Assignment) -> float:
        return float(space.size_bits(assignment))


class TestRelativeSize(ConstraintContract):
    wide_bound, unit = 100, "bytes"

    def build(self, space: SearchSpace, bound: float, folder: Path) -> Constraint:
        return constraints.constraint("relative_size", space, bound)

    def expected(self, space: SearchSpace, assignment: Assignment) -> float:
        return float(space.size_bytes(assignment))


class TestBops(ConstraintContract):
    wide_bound, unit = 1e9, "bit operations"

    def build(self, space: SearchSpace, bound: float, folder: Path) -> Constraint:
        return constraints.constraint("bops", space, bound, activation_bits=6)

    def expected(self, space: SearchSpace, assignment: Assignment) -> float:
        return float(sum(layer.macs * (b or 0) * 6 for layer, b in zip(space.layers, assignment.bits, strict=True)))


class TestBopsOfActivations(TestBops):
    """Each option's own activation bits; the argument's are for activations in float."""

    activation_widths = (3, 9)

    def expected(self, space: SearchSpace, assignment: Assignment) -> float:
        return float(sum(layer.macs * (b or 0) * (a or 0) for layer, (b, a) in zip(space.layers, assignment.pairs, strict=True)))


class TestLatency(ConstraintContract):
    wide_bound, unit = 100.0, "seconds"

    def build(self, space: SearchSpace, bound: float, folder: Path) -> Constraint:
        return constraints.constraint("latency", space, bound, path=write_table(space, folder, "seconds"))

    def expected(self, space: SearchSpace, assignment: Assignment) -> float:
        return sum(table_cost(i, b or 0) for i, b in enumerate(assignment.bits))


class TestTable(TestLatency):
    unit = "joules"

    def build(self, space: SearchSpace, bound: float, folder: Path) -> Constraint:
        return constraints.constraint("table", space, bound, path=write_table(space, folder, "joules"), name="energy")


class TestTableWithActivations(TestTable):
    """A column more, and a row for each width of activations."""

    activation_widths = (4, 8)

    def build(self, space: SearchSpace, bound: float, folder: Path) -> Constraint:
        path = write_table(space, folder, "joules", activations=True)
        return constraints.constraint("table", space, bound, path=path, name="energy")

    def expected(self, space: SearchSpace, assignment: Assignment) -> float:
        return sum(table_cost(i, b or 0, a or 0) for i, (b, a) in enumerate(assignment.pairs))


class TestTableWithOneActivationWidth(TestTableWithActivations):
    """Of a table with the column, the rows of that width."""

    activation_widths = (8,)

    def build(self, space: SearchSpace, bound: float, folder: Path) -> Constraint:
        path = write_table(space.with_activations((4, 8)), folder, "joules", activations=True)
        return constraints.constraint("table", space, bound, path=path, name="energy")


class TestTableWithOneWidthUnsaid(TestTable):
    """A table without the column holds for the one width there is."""

    activation_widths = (8,)


def a_space() -> SearchSpace:
    return SearchSpace.uniform([Layer("a", (1, 1), "linear", macs=3), Layer("b", (97,), "linear", macs=5)], (2, 4, 8))


def test_every_file_is_a_constraint_and_has_a_contract() -> None:
    assert available("constraints") == ("average_bits", "bops", "latency", "relative_size", "size", "table")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_uniform_bits_fit_their_own_average(bits: int) -> None:
    """Whatever the sizes: ceil(n b / 8) would not (a one-weight layer takes a byte at 2 bits)."""
    space = a_space()
    assert constraints.constraint("average_bits", space, float(bits)).holds(space, Assignment((bits, bits)))
    assert not constraints.constraint("average_bits", space, bits - 1e-9).holds(space, Assignment((bits, bits)))


def test_a_decimal_average_means_the_decimal() -> None:
    space = SearchSpace.uniform([Layer("a", (10,), "linear")], (2, 4))
    assert constraints.constraint("average_bits", space, 2.3).bound == 23  # floor(10 * 2.3) in binary is 22 for some averages
    assert constraints.constraint("average_bits", SearchSpace.uniform([Layer("a", (100,), "linear")], (2, 4)), 2.3).bound == 230


def test_percent_of_the_8_bit_size() -> None:
    space = a_space()
    assert constraints.constraint("relative_size", space, 50).bound == 49  # 98 bytes at 8 bits
    assert constraints.constraint("relative_size", space, 100).holds(space, space.widest)


def test_fractions_are_compared_within_rounding() -> None:
    space = SearchSpace.uniform([Layer("a", (1,), "linear"), Layer("b", (1,), "linear"), Layer("c", (1,), "linear")], (2,))
    constraint = Constraint("latency", "seconds", (0.1, 0.1, 0.1), 0.3)
    assert sum((0.1, 0.1, 0.1)) > 0.3
    assert constraint.holds(space, space.widest)
    assert not constraint.with_bound(0.2999).holds(space, space.widest)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected the header"),
        ("layer,bits\na,2\n", "expected the header"),
        ("layer,bits,seconds\na,two,1\n", "row 2"),
        ("layer,bits,seconds\na,2,nan\n", "finite"),
        ("layer,bits,seconds\na,2,-1\n", "not negative"),
        ("layer,bits,seconds\na,2,1\na,2,2\n", "given twice"),
        ("layer,bits,seconds\na,2,1\n", "lacks a at 4 bits"),
        ("layer,bits,milliseconds\n" + "".join(f"{n},{b},1\n" for n in "ab" for b in (2, 4, 8)), "expected seconds"),
    ],
)
def test_a_bad_table_is_refused_by_name(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        constraints.constraint("latency", a_space(), 1.0, path=path)


@pytest.mark.parametrize(
    ("content", "widths", "message"),
    [
        ("layer,bits,seconds\na,2,1\n", (4, 8), r"no column activation_bits, .* \[4, 8\] .* layer,bits,activation_bits,<unit>"),
        ("layer,bits,activation_bits,seconds\na,2,8,1\n", (), "activations stay in float; expected the header layer,bits,<unit>"),
        ("layer,bits,activation_bits\na,2,8\n", (4, 8), "expected the header"),
        ("layer,bits,activation_bits,seconds\na,2,1\n", (4, 8), "row 2 is .* two integers and a number"),
        ("layer,bits,activation_bits,seconds\na,2,4,1\na,2,4,1\n", (4, 8), "a at 2 bits, activations at 4 is given twice"),
        ("layer,bits,activation_bits,seconds\na,2,4,1\n", (4, 8), "lacks a at 2 bits, activations at 8, a at 4 bits, activ"),
    ],
)
def test_a_table_must_fit_the_widths_of_activations(content: str, widths: tuple[int, ...], message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        constraints.constraint("latency", a_space().with_activations(widths), 1.0, path=path)


def test_what_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="unknown constraint 'weight'; expected one of average_bits, bops"):
        constraints.constraint("weight", a_space(), 1.0)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        constraints.constraint("table", a_space(), 1.0, path=tmp_path / "absent.csv")
    with pytest.raises(ConfigurationError, match="MACs of x are unknown"):
        constraints.constraint("bops", SearchSpace.uniform([Layer("x", (2,), "linear")], (2, 4)), 1.0)
    with pytest.raises(ConfigurationError, match="not searched layers"):
        constraints.constraint("size", a_space(), 1.0, overhead_bytes={"c": 3})
    with pytest.raises(ConfigurationError, match="NaN"):
        Constraint("size", "bytes", (1.0,), float("nan"))
    with pytest.raises(ConfigurationError, match="option 1"):
        Constraint("size", "bytes", (1.0, float("inf")), 3.0)
