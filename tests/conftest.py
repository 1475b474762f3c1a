"""Fixtures that several tests share."""

import os
from pathlib import Path

import pytest

from tests.running import Finished, config, run_pipeline

# tests write nothing into the home folder; processes that they start inherit this
CACHE = Path(__file__).parents[1] / ".cache"
os.environ.setdefault("MPLCONFIGDIR", str(CACHE / "matplotlib"))
os.environ.setdefault("DASK_CONFIG", str(CACHE / "dask"))  # dask-jobqueue and dask-kubernetes put their settings there
os.environ.setdefault("XDG_CACHE_HOME", str(CACHE / "xdg"))  # ONNX Runtime numbers the machine there
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # as every command of ours sets it
os.environ.setdefault("DO_NOT_TRACK", "true")


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Finished:
    """One reduced run of the whole pipeline on the shipped network."""
    document = config(tmp_path_factory.mktemp("runs") / "reduced")
    calls, receipt = run_pipeline(document)
    return Finished(Path(document["folder"]), document, calls, receipt)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that read the finished run go to one worker of pytest-xdist, so that it is made once."""
    for item in items:
        if "finished" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("finished"))
