"""What is kept of solves: the same program is solved once, any other program is solved, and only proven answers are kept."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clado.choosing import constraints, solvers
from clado.choosing.kept_solutions import kept
from clado.choosing.program import Program
from clado.choosing.solution import Solution, Status
from clado.interaction.matrix import InteractionMatrix
from clado.space import Layer, SearchSpace


class Counted:
    """A solver that counts what it is asked for."""

    def __init__(self, program: Program, status: Status = Status.OPTIMAL) -> None:
        self.solve, self.status, self.calls = solvers.prepare(program, "scip"), status, 0

    def __call__(self, program: Program, starts=()) -> Solution:
        self.calls += 1
        return replace(self.solve(program, starts), status=self.status)


def plain(solution: Solution) -> dict:
    return {name: value for name, value in solution.document().items() if name != "seconds"}


@pytest.fixture
def program() -> Program:
    """A program with a limit, so that the widest bits are no answer."""
    layers = tuple(Layer(f"layer{i}", (4, 3 + i), "linear") for i in range(5))
    space = SearchSpace(layers, ((2, 4, 8),) * 5)
    factor = np.random.default_rng(0).normal(size=(space.num_options, 4))
    matrix = InteractionMatrix(space, factor @ factor.T, "random", "none", 0.0, 1)
    return Program.build(matrix, [constraints.constraint("average_bits", space, 4.0)])


def test_the_same_program_is_solved_once_and_another_process_reads_it(program, tmp_path):
    counted = Counted(program)
    first = kept(counted, tmp_path, "scip")(program)
    again = kept(counted, tmp_path, "scip")(program)
    assert counted.calls == 1
    assert plain(again) == plain(first)
    assert again.seconds == first.seconds  # those of the solve


def test_whatever_the_answer_depends_on_is_a_program_of_its_own(program, tmp_path):
    start = program.assignment(program.choices(solvers.solve(program).assignment))
    values = program.matrix.values.copy()
    values[0, 0] = np.nextafter(values[0, 0], np.inf)
    quadratic = program.quadratic.copy()
    quadratic[0, 0] = np.nextafter(quadratic[0, 0], np.inf)
    limits = (constraints.constraint("average_bits", program.space, 4.01),)
    others = {
        "matrix": (replace(program, matrix=replace(program.matrix, values=values)), (), "scip"),
        "minimised": (replace(program, quadratic=quadratic), (), "scip"),
        "limits": (replace(program, constraints=limits), (), "scip"),
        "starts": (program, (start,), "scip"),
        "solver": (program, (), "exhaustive"),
    }
    counted = Counted(program)
    kept(counted, tmp_path, "scip")(program)
    for number, (name, (other, starts, solver)) in enumerate(others.items(), 2):
        kept(counted, tmp_path, solver)(other, starts)
        assert counted.calls == number, name
    assert len(list(tmp_path.iterdir())) == 1 + len(others)


@pytest.mark.parametrize("status", [status for status in Status if status not in (Status.OPTIMAL, Status.INFEASIBLE)])
def test_what_is_not_proven_is_solved_again(program, tmp_path, status):
    counted = Counted(program, status)
    for _ in range(2):
        kept(counted, tmp_path, "scip")(program)
    assert counted.calls == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["", "{}", "no JSON"])
def test_a_damaged_file_is_solved_again_and_replaced(program, tmp_path: Path, damage):
    counted = Counted(program)
    expected = plain(kept(counted, tmp_path, "scip")(program))
    (file,) = tmp_path.iterdir()
    file.write_text(damage)
    for _ in range(2):
        assert plain(kept(counted, tmp_path, "scip")(program)) == expected
    assert counted.calls == 2


def test_an_answer_that_breaks_a_limit_is_not_believed(program, tmp_path):
    counted = Counted(program)
    answer = kept(counted, tmp_path, "scip")(program)
    (file,) = tmp_path.iterdir()
    replace(answer, assignment=program.space.widest).save(file)
    assert not program.is_feasible(program.choices(program.space.widest))
    assert plain(kept(counted, tmp_path, "scip")(program)) == plain(answer)
    assert counted.calls == 2
