"""A signal while a program is solved ends the run; the best assignment found is kept, and the next run starts from it."""

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from clado.choosing import solvers
from clado.choosing.proposals import Budget, Matrices, Proposal, budgets_of, merge_limits, program_of
from clado.choosing.solution import Status
from clado.choosing.solvers import Outcome, Solver, scip
from clado.settings.loading import parse_config
from clado.space import SearchSpace
from flows.commands.smallest import solver_of
from flows.commands.stored import StoredRun
from flows.commands.sweep import sweep_optima
from flows.phases.choose import propose
from tests.running import config
from tests.synthetic import make_matrix, make_space


@pytest.fixture
def run(tmp_path) -> Any:
    """A run whose matrix is measured: what the choose phase reads of it while it proposes."""
    space, settings = make_space(), parse_config(config(tmp_path / "run"))
    return SimpleNamespace(
        config=settings,
        space=space,
        folder=tmp_path / "run",
        limits=[],
        budgets=budgets_of(**settings.budgets.model_dump()),
        matrices=Matrices({"pairwise": make_matrix(space)}, {}, None),
    )


def proposed(run: Any) -> list[Proposal]:
    proposals, _ = propose(run, run.matrices)
    return proposals


class Received(BaseException):
    pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_while_solving_keeps_the_incumbent_and_the_next_run_starts_from_it(run, number, monkeypatch):
    starts, whole = [], scip.search

    def interrupted(program: Any, task: Any) -> Outcome:
        """A search that has found its start when the signal comes."""
        starts.append(task.starts)
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            return Outcome(Status.INTERRUPTED, program.narrowest, -1.0)
        pytest.fail("no signal came")

    def receive(received: int, frame: Any) -> None:
        if received == signal.SIGINT and not run_interrupted():
            raise KeyboardInterrupt
        raise Received(received)

    def run_interrupted() -> bool:
        return file.exists()

    file = run.folder / "solutions" / "incumbent.json"
    before = {each: signal.signal(each, receive) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        with monkeypatch.context() as patch:
            patch.setattr(scip, "solver", Solver(interrupted))
            with pytest.raises(Received) as told:
                proposed(run)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert told.value.args == (number,)  # the run's own handler has the signal, once the incumbent is safe
    assert len(starts) == 1
    assert starts[0] == ()
    space = run.space
    assert space.from_json(json.loads(file.read_text())) == space.narrowest

    def counted(program: Any, task: Any) -> Outcome:
        starts.append(task.starts)
        return whole(program, task)

    monkeypatch.setattr(scip, "solver", Solver(counted))
    proposals = proposed(run)
    assert [len(choices) for choices in starts][:3] == [0, 1, 1]  # variants behind them begin anew
    assert not file.exists()
    optimum = solvers.solve(solvers_program(run), time_limit=60).objective
    assert proposals[-1].solution.objective == pytest.approx(optimum, rel=1e-6)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_while_a_variant_is_solved_ends_the_run_too(run, number, monkeypatch):
    monkeypatch.setattr(scip, "solver", Solver(interrupted_where(lambda program: program.convexity != "clip_psd", number)))
    assert ended_by(lambda: proposed(run)) == number
    assert not (run.folder / "solutions" / "incumbent.json").exists()  # a variant leaves none


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, Status.INTERRUPTED), (signal.SIGTERM, Status.INTERRUPTED), (signal.SIGTERM, Status.INFEASIBLE)],
)
def test_a_signal_before_anything_is_found_ends_the_run_and_is_no_error(run, number, status, monkeypatch):
    nothing = interrupted_where(lambda program: True, number, lambda program: Outcome(status, None, -1.0))
    monkeypatch.setattr(scip, "solver", Solver(nothing))
    assert ended_by(lambda: proposed(run)) == number
    assert not (run.folder / "solutions" / "incumbent.json").exists()


def test_sigterm_is_heeded_where_the_solver_has_ended_all_the_same(run, monkeypatch):
    optimal = interrupted_where(lambda program: True, signal.SIGTERM, lambda p: Outcome(Status.OPTIMAL, p.narrowest, 0.0))
    monkeypatch.setattr(scip, "solver", Solver(optimal))
    assert ended_by(lambda: proposed(run)) == signal.SIGTERM


def sizes_of(space: SearchSpace) -> list[int]:
    least, most = (space.size_bytes(assignment) for assignment in (space.narrowest, space.widest))
    return [least + k * (most - least) // 5 for k in range(1, 5)]


def front(stored: Any) -> None:
    space = stored.measured.space
    fit = {budget: [budget.limit(space)] for budget in (Budget("size", size) for size in sizes_of(space))}
    list(sweep_optima(stored.matrices.named["pairwise"], fit, stored.prepare))


def sizes_of_the_smallest(stored: Any) -> None:
    solver_of(stored)[2](sizes_of(stored.measured.space))


@pytest.mark.parametrize("command", [front, sizes_of_the_smallest])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_while_a_front_is_solved_ends_the_command(run, number, command, monkeypatch):
    """Otherwise it would continue with the best assignment so far as if it were the answer."""
    solved: list[Any] = []
    stored = StoredRun(run.folder, run.config, SimpleNamespace(space=run.space))
    stored.__dict__["matrices"] = run.matrices

    def second(program: Any) -> bool:
        solved.append(program)
        return len(solved) == 2

    monkeypatch.setattr(scip, "solver", Solver(interrupted_where(second, number)))
    assert ended_by(lambda: command(stored)) == number
    assert len(solved) == 2


def best_until_then(program: Any) -> Outcome:
    return Outcome(Status.INTERRUPTED, program.narrowest, -1.0)


def interrupted_where(
    which: Callable[[Any], bool], number: int, left: Callable[[Any], Outcome] = best_until_then
) -> Callable[[Any, Any], Outcome]:
    """A search that gets a signal in given programs, and then returns its best, as scip does."""
    whole = scip.search

    def search(program: Any, task: Any) -> Outcome:
        if not which(program):
            return whole(program, task)
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            return left(program)
        pytest.fail("no signal came")

    return search


def ended_by(act: Callable[[], None]) -> int:
    """The signal that the handler of before is given once the solver has returned, and that ends what acts."""
    came: list[int] = []

    def receive(received: int, frame: Any) -> None:
        came.append(received)
        if received == signal.SIGINT and len(came) == 1:  # Python's own, within the solver
            raise KeyboardInterrupt
        raise Received(received)

    before = {each: signal.signal(each, receive) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(Received) as told:
            act()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    return int(told.value.args[0])


def solvers_program(run: Any) -> Any:
    budget = run.budgets[-1]
    return program_of(run.matrices.named["pairwise"], merge_limits(budget.limit(run.space), []))


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "clado-assignment/1", "bits": {"another": 2}}'])
def test_an_incumbent_of_other_settings_is_left_aside(run, text):
    check_that_it_is_left_aside(run, text)


def test_an_incumbent_that_may_no_longer_be_chosen_is_left_aside(run):
    """More images have found a loss that is not finite."""
    space = run.space
    quarantined = replace(run.matrices.named["pairwise"], quarantined=(space.option(0, space.widest.bits[0]),))
    run.matrices = replace(run.matrices, named={"pairwise": quarantined})
    check_that_it_is_left_aside(run, json.dumps(space.to_json(space.widest)))


def check_that_it_is_left_aside(run, text):
    file = run.folder / "solutions" / "incumbent.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert {proposal.solution.status for proposal in proposed(run) if proposal.solution} == {"optimal"}
    assert not file.exists()
