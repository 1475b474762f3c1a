"""Prefect's server for one command, in a separate process.

Importing it takes seconds, so it starts before the command imports anything slow. It writes nothing until the flow begins. It
ends with the command, even if the command is killed with -9. Signals to the command's process group do not reach it. So a run
that Ctrl-C ends can still report this to Prefect.
"""

import os
import socket
import sys
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from subprocess import PIPE, Popen, TimeoutExpired

START_TIMEOUT = 180.0  # seconds until the server must answer, once it may begin
END_TIMEOUT = 5.0  # seconds until it must have ended
BEGIN = b"begin\n"
HOST, URL = "127.0.0.1", "PREFECT_API_URL"
_own_urls: set[str] = set()


class EmbeddedServer:
    """A server on a free port of loopback. Its address is in PREFECT_API_URL from `begin` to `end`."""

    def __init__(self) -> None:
        settings = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
        self._process: Popen[bytes] = Popen(
            [sys.executable, "-m", "flows.embedded"], env={**os.environ, **settings}, stdin=PIPE, stdout=PIPE,
            start_new_session=True,
        )  # fmt: skip
        self._port = 0

    def begin(self) -> None:
        """Lets it write its database. Import Prefect after this call, because the import reads PREFECT_API_URL.

        Raises:
            OSError: The server has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(BEGIN)
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise OSError(f"Prefect's server ended with {self._process.wait()}")
        self._port = int(line)
        url = os.environ[URL] = f"http://{HOST}:{self._port}/api"
        _own_urls.add(url)

    def wait(self) -> None:
        """Waits until it answers. It listens from the start, so one request can wait for it.

        Raises:
            OSError: The server has ended, or does not answer in time.
        """
        connection = HTTPConnection(HOST, self._port, timeout=START_TIMEOUT)
        try:
            connection.request("GET", "/api/health")
            status = connection.getresponse().status
        except HTTPException as error:
            raise OSError(f"Prefect's server does not answer ({type(error).__name__})") from None
        finally:
            connection.close()
        if status != 200:
            raise OSError(f"Prefect's server answers with an error (status {status})")

    def end(self) -> None:
        """Ends it, if it still runs."""
        if os.environ.get(URL) in _own_urls:
            del os.environ[URL]
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(OSError):
                stream.close()
        self._process.terminate()
        try:
            self._process.wait(END_TIMEOUT)
        except TimeoutExpired:
            self._process.kill()
            self._process.wait()


def start() -> EmbeddedServer | None:
    """Starts a server, unless PREFECT_API_URL names one."""
    return None if os.environ.get(URL) else EmbeddedServer()


def foreign_url() -> str | None:
    """The server that PREFECT_API_URL names, unless it is an embedded one."""
    url = os.environ.get(URL)
    return None if url in _own_urls else url


def main() -> None:
    """The process of the server. It imports the server, waits for a line, prints its port, and serves until stdin ends."""
    import threading
    from pathlib import Path

    mkdir = Path.mkdir
    Path.mkdir = lambda *arguments, **named: None  # type: ignore[method-assign]  # Prefect's import makes its folder
    try:
        import uvicorn
        from prefect.server.api.server import create_app
    finally:
        Path.mkdir = mkdir  # type: ignore[method-assign]
    if sys.stdin.buffer.readline() != BEGIN:  # the command has ended
        return

    def end_with_command() -> None:
        os.read(sys.stdin.fileno(), 1)
        os._exit(0)

    threading.Thread(target=end_with_command, daemon=True).start()
    listener = socket.create_server((HOST, 0))
    print(listener.getsockname()[1], flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    uvicorn.Server(uvicorn.Config(create_app(), log_level="error", lifespan="on")).run([listener])


if __name__ == "__main__":
    main()
