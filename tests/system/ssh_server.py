"""An SSH server on loopback for the tests: `python -m tests.system.ssh_server PORT FOLDER` admits the folder's user key.

Commands run as the user who started it, in a process group of their own that ends with the connection.
"""

import asyncio
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import asyncssh

KEYS = ("host", "user")


def make_keys(folder: Path, port: int) -> dict[str, str]:
    """Keys of the server and of its user, and the settings of a client for them: {key_file, known_hosts}."""
    for name in KEYS:
        key = asyncssh.generate_private_key("ssh-ed25519")
        key.write_private_key(folder / name)
        key.write_public_key(folder / f"{name}.pub")
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    return {"key_file": str(folder / "user"), "known_hosts": str(folder / "known_hosts")}


async def run(client: asyncssh.SSHServerProcess) -> None:
    """One command."""
    process = await asyncio.create_subprocess_shell(
        client.command or "true", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        await client.redirect(stdin=process.stdin, stdout=process.stdout, stderr=process.stderr)
        ends = {asyncio.create_task(process.wait()), asyncio.create_task(client.wait_closed())}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        client.exit(0)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


async def main(port: int, folder: Path) -> None:
    """Listens until it is killed."""
    server = await asyncssh.listen(
        "127.0.0.1",
        port,
        server_host_keys=[folder / "host"],
        authorized_client_keys=str(folder / "user.pub"),
        process_factory=run,
    )
    print("ready", flush=True)
    await server.wait_closed()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), Path(sys.argv[2])))
