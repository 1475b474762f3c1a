"""Whether a worker fits a run. It may be on another machine, in another folder, or in another environment."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distributed import Worker, WorkerPlugin

from clado.errors import ServerError
from clado.settings.loading import parse_config
from clado.settings.schema import RunConfig
from clado.storage.measurement_store import exists

SAME = ("clado", "torch", "numpy")  # packages whose version may change measured numbers


class Inspection(WorkerPlugin):
    """Refuses a worker that would compute other numbers, or write them to another place."""

    name = "clado-inspection"

    def __init__(self, config: RunConfig) -> None:
        self.versions = versions()
        self.store = config.store or config.run_folder / "store.zarr"
        self.folder = config.run_folder
        self.store_exists = exists(self.store)
        self.modules = str(Path.cwd()) if config.network.source == "factory" else None

    def setup(self, worker: Worker) -> None:
        """Called by Dask when the worker starts, or when the run does."""
        label = f"worker {worker.address}"
        if worker.state.nthreads != 1:
            raise ServerError(
                f"{label} computes {worker.state.nthreads} tasks at once; expected one: more workers, each with --nthreads 1"
            )
        worker_versions = versions()
        differences = [
            f"{name} {release} where the flow has {self.versions[name]}"
            for name, release in worker_versions.items()
            if release != self.versions[name]
        ]
        if differences:
            raise ServerError(f"{label} has {', '.join(differences)}; expected the same versions everywhere")
        if self.store_exists and not (exists(self.store) and self.folder.exists()):
            raise ServerError(f"{label} does not see {self.store}; expected folder: at a path that every machine shares")
        if self.modules and self.modules not in sys.path:
            sys.path.append(self.modules)  # the folder in which the flow found the network's factory


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that may change measured numbers, in this process.

    The version of torch comes without its build, which names the device.
    """
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
