"""What `clado up` makes of a port that another process took between its question and a server's start."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import pytest

from clado.errors import ServerError
from flows.services import HOST, Ports, _wait, declare

ANSWERS = {
    "frames of Dask": b"\x80\x00\x00\x00\x02compression\xc0pickle-protocol\r\n",
    "text": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK",
    "a list": b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n[{}]",
    "not text": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xfe",
    "nothing": b"",
    "half an answer": b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}",
}


@contextmanager
def listening(answer: bytes) -> Iterator[int]:
    """A port whose every caller hears the same bytes."""
    server = socket.create_server((HOST, 0))

    def answers() -> None:
        while True:
            try:
                caller, _ = server.accept()
            except OSError:
                return
            with caller:
                caller.recv(4096)
                caller.sendall(answer)

    thread = Thread(target=answers)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_a_stranger_on_the_port_is_no_traceback_but_the_end_of_the_server_that_found_it_taken(tmp_path, answer):
    with listening(answer) as port:
        services = declare(tmp_path, Ports(prefect=port, dask=port - 1), 1, None)
        for name in ("prefect", "scheduler", "workers", "runner"):
            (tmp_path / f"{name}.log").write_text("address already in use\n")
            ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
            ended.wait()
            with pytest.raises(ServerError, match=rf"(?s){name} ended at once \(exit 3\).*address already in use"):
                _wait(tmp_path, name, services[name], ended, 60.0)
