"""Fixtures that several tests share."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings

from tests.running import Finished, config, run_pipeline

# tests write nothing into the home folder; processes that they start inherit this
CACHE = Path(__file__).parents[1] / ".cache"
os.environ.setdefault("MPLCONFIGDIR", str(CACHE / "matplotlib"))
os.environ.setdefault("DASK_CONFIG", str(CACHE / "dask"))  # dask-jobqueue and dask-kubernetes put their settings there
os.environ.setdefault("XDG_CACHE_HOME", str(CACHE / "xdg"))  # ONNX Runtime numbers the machine there
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # as every command of ours sets it
os.environ.setdefault("DO_NOT_TRACK", "true")
# a run sets torch's threads to one; so they are the same before and after it, in any order of the tests
os.environ.setdefault("OMP_NUM_THREADS", "1")
# no test depends on time: a machine may be busy
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in a folder of its own, where MLflow's file is unless a test says otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Random numbers that a test draws without a seed do not depend on the tests before it."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Finished:
    """One reduced run of the whole pipeline on the shipped network."""
    document = config(tmp_path_factory.mktemp("runs") / "reduced")
    calls, receipt = run_pipeline(document)
    return Finished(Path(document["folder"]), document, calls, receipt)


@pytest.fixture(scope="session", autouse=True)
def networks_of_ours_are_exported_once() -> Iterator[None]:
    """In a process: `torch.export` takes seconds, and its program depends on the architecture alone, not on values."""
    exported: dict[Any, Any] = {}

    def remembered(model: Any, example: Any) -> Any:
        hooked = any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
        if not type(model).__module__.startswith(("clado.data.zoo", "tests.networks")) or hooked:
            return plain(model, example)
        tensors = ((name, tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items())
        key = (type(model), repr(model), example.shape, example.dtype, example.device, *tensors)
        if key not in exported:
            exported[key] = plain(model, example)
        return exported[key]

    from clado.network import tracing

    plain = tracing.export
    with patch.object(tracing, "export", remembered):
        yield
