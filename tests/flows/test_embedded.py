"""Prefect's server for one command: it writes nothing until it may, and ends with the command."""

import os
import signal
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

import psutil
import pytest

from flows import embedded
from flows.embedded import URL, EmbeddedServer

PATIENCE = 300.0


@pytest.fixture(autouse=True)
def no_server_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv(URL, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    yield
    os.environ.pop(URL, None)


def test_a_server_that_is_named_is_used_and_none_started(monkeypatch):
    monkeypatch.setenv(URL, "http://127.0.0.1:4200/api")
    assert embedded.start() is None
    assert embedded.foreign_url() == "http://127.0.0.1:4200/api"


def test_a_server_that_ends_at_once_is_an_error_and_leaves_no_address(monkeypatch):
    monkeypatch.setattr(embedded.sys, "executable", "/bin/false")
    server = EmbeddedServer()
    with pytest.raises(OSError, match=r"ended with 1|Broken pipe"):
        server.begin()
    server.end()
    server.end()  # ended twice is ended
    assert URL not in os.environ


@pytest.mark.system
def test_it_writes_nothing_until_it_may_and_then_answers(tmp_path):
    server = EmbeddedServer()
    try:
        time.sleep(1)
        assert not (tmp_path / "prefect").exists()
        (tmp_path / "prefect").mkdir()
        server.begin()
        assert embedded.foreign_url() is None
        server.wait()
        port = int(os.environ[URL].removesuffix("/api").rpartition(":")[2])
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/api/health")
        assert connection.getresponse().read() == b"true"
        connection.close()
        assert list((tmp_path / "prefect").glob("*.db"))
    finally:
        server.end()
    assert URL not in os.environ


@pytest.mark.system
@pytest.mark.parametrize("begun", [False, True])
def test_it_ends_with_a_command_that_is_killed(tmp_path, begun):
    (tmp_path / "prefect").mkdir()
    script = (
        "from flows.embedded import EmbeddedServer; import sys, time; server = EmbeddedServer();"
        f"{begun} and (server.begin(), server.wait()); print(server._process.pid, flush=True); time.sleep({PATIENCE})"
    )
    root = Path(__file__).parents[2]
    command = subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    server = psutil.Process(int(command.stdout.readline()))
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    command.stdout.close()
    server.wait(PATIENCE)
