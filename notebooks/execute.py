"""Executes notebooks top to bottom, each in a fresh kernel, and saves them with their outputs: `make notebooks`.

    python notebooks/execute.py [NOTEBOOK]...

Nothing of when, where or how long goes into the files, so that the same numbers make the same file.
"""

import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

HERE = Path(__file__).resolve().parent
START_SECONDS = 600


def execute(path: Path, sockets: Path) -> float:
    """Executes a notebook in place and returns the seconds that it took. Raises CellExecutionError where a cell fails.

    The kernel listens on sockets in the folder given, and opens no port.
    """
    notebook = nbformat.read(path, as_version=4)
    start = time.monotonic()
    NotebookClient(
        notebook,
        timeout=None,
        startup_timeout=START_SECONDS,
        record_timing=False,
        resources={"metadata": {"path": str(HERE)}},
        config=Config({"KernelManager": {"transport": "ipc", "ip": str(sockets / path.stem)}}),
    ).execute()
    notebook.metadata.language_info = {"name": "python"}  # without the version, which differs between machines
    nbformat.write(notebook, path)
    return time.monotonic() - start


def main() -> None:
    """Executes the notebooks named on the command line, or all."""
    with TemporaryDirectory() as folder:  # a short path, as sockets need, and nothing in the home folder
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
            os.environ[name] = folder
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same numbers however many cores there are
        os.environ.setdefault("MPLCONFIGDIR", str(HERE.parent / ".cache" / "matplotlib"))
        for path in map(Path, sys.argv[1:] or sorted(map(str, HERE.glob("*.ipynb")))):
            print(f"{path.name}: {execute(path, Path(folder)):.0f} s", flush=True)


if __name__ == "__main__":
    main()
