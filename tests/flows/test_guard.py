"""Signals while a command ends, and a Prefect server that cannot be reached when a run ends."""

import errno
import fcntl
import logging
import os
import signal
import time
from contextlib import nullcontext

import pytest

from clado.errors import ServerError, StoreError
from flows import guard
from flows.guard import Terminated, end_in_peace, farewell, insistent, locked, orchestrated


@pytest.fixture(autouse=True)
def handlers_are_given_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    logging.disable(logging.NOTSET)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StoreError, match="without locks"), locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    ("first", "kind", "said"),
    [
        (signal.SIGINT, KeyboardInterrupt, ("clado: interrupted; ", 130)),
        (signal.SIGTERM, Terminated, ("clado: terminated; ", 143)),
    ],
)
def test_the_first_signal_ends_a_run_and_those_behind_it_do_not_disturb_its_end(first, kind, said):
    ended = []

    @orchestrated(lambda: False)
    def run() -> None:
        try:
            signal.raise_signal(first)
        finally:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            ended.append("everything")

    with pytest.raises(kind) as told:
        run()
    assert ended
    text, code = farewell(told.type)
    assert (text.startswith(said[0]), code) == (True, said[1])


class Dropped:
    """Takes a signal where Python drops what its handler raises: in a destructor."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass  # the handler runs here


def terminate(number, frame):
    raise Terminated


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("insists", [True, False])
def test_a_termination_that_python_drops_comes_again(insists):
    signal.signal(signal.SIGTERM, terminate)
    reached = False
    with pytest.raises(Terminated) if insists else nullcontext(), insistent(0.2) if insists else nullcontext():
        dropped = Dropped()
        del dropped
        time.sleep(2)
        reached = True
    assert reached != insists
    assert signal.getsignal(signal.SIGTERM) is terminate


def test_one_that_gets_through_does_not_come_again_while_things_are_tidied():
    tidied = []

    def ended_and_tidied():
        try:
            with insistent(0.2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(2)
        finally:
            time.sleep(0.6)
            tidied.append(True)

    signal.signal(signal.SIGTERM, terminate)
    with pytest.raises(Terminated):
        ended_and_tidied()
    assert tidied


def test_where_nobody_handles_it_nothing_changes():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with insistent(0.2):
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_end_that_takes_long_can_be_cut_short(monkeypatch, capfd):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    end_in_peace(KeyboardInterrupt)
    signal.raise_signal(signal.SIGINT)
    assert codes == []
    late = time.monotonic() + guard.GRACE + 1
    monkeypatch.setattr(time, "monotonic", lambda: late)
    signal.raise_signal(signal.SIGINT)
    assert codes == [130]
    assert capfd.readouterr().err == f"{farewell(KeyboardInterrupt)[0]}\n"


def test_a_complete_run_stands_where_prefect_cannot_be_told(capsys, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    with orchestrated(lambda: False, lambda: True):
        raise ConnectionError("all connection attempts failed")
    told = capsys.readouterr().err
    assert (
        "the run is complete, but Prefect was not told (ConnectionError): http://127.0.0.1:4200/api shows the run as running"
        in told
    )
    with pytest.raises(ServerError, match="Prefect did not start"), orchestrated(lambda: True, lambda: False):
        raise ConnectionError
