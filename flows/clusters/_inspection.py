"""Whether a worker fits a run: it may be on another machine, in another folder, or in another environment."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distributed import Worker, WorkerPlugin

from clado.errors import ServerError
from clado.settings.loading import parse_config
from clado.settings.schema import RunConfig
from clado.storage.measurement_store import exists

SAME = ("clado", "torch", "numpy")  # packages whose version may change a number


class Inspection(WorkerPlugin):
    """Refuses a worker that would compute other numbers, or write them elsewhere."""

    name = "clado-inspection"

    def __init__(self, config: RunConfig) -> None:
        self.versions = versions()
        self.store = config.store or config.run_folder / "store.zarr"
        self.folder = config.run_folder
        self.expected = exists(self.store)
        self.modules = str(Path.cwd()) if config.network.source == "factory" else None

    def setup(self, worker: Worker) -> None:
        """Called by Dask when the worker starts, or when the run does."""
        at = f"worker {worker.address}"
        if worker.state.nthreads != 1:
            raise ServerError(
                f"{at} computes {worker.state.nthreads} tasks at once; expected one: more workers, each with --nthreads 1"
            )
        own = versions()
        if differing := [name for name in own if own[name] != self.versions[name]]:
            told = ", ".join(f"{name} {own[name]} where the flow has {self.versions[name]}" for name in differing)
            raise ServerError(f"{at} has {told}; expected the same versions everywhere")
        if self.expected and not (exists(self.store) and self.folder.exists()):
            raise ServerError(f"{at} does not see {self.store}; expected folder: at a path that every machine shares")
        if self.modules and self.modules not in sys.path:
            sys.path.append(self.modules)  # where the flow found the network's factory


def versions() -> dict[str, str]:
    """Of what shapes a number, in this process; of torch without its build, which names the device."""
    packages = {name: version(name).partition("+")[0] for name in SAME}
    return {"python": "{}.{}".format(*sys.version_info), **packages}


def located(config: RunConfig) -> RunConfig:
    """The same settings with absolute paths."""

    def absolute(value: Any) -> Any:
        match value:
            case dict():
                return {key: absolute(inner) for key, inner in value.items()}
            case list() | tuple():
                return [absolute(inner) for inner in value]
            case Path():
                return value.absolute()
        return value

    return parse_config(absolute({**config.model_dump(), "folder": config.run_folder}))
