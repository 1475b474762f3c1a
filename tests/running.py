"""One reduced run for the tests that read a run: the phases as plain functions, in this process, without Prefect's server."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import uuid4

BUDGETS = (2.5, 3.0)
ESTIMATORS = ("layerwise", "pairwise", "gauss_newton")


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    """A reduced configuration of the shipped network, as plain data. MLflow's file is next to the run."""
    return {
        "network": {"source": "zoo", "name": "resnet20_fashion_mnist"},
        "data": {"sensitivity_images": 32, "sample_blocks": 4, "calibration_images": 64, "validation_images": 100},
        "bits": [2, 4],
        "corrections": ["output_statistics", "batchnorm_reestimation"],
        "estimators": list(ESTIMATORS),
        "budgets": {"average_bits": list(BUDGETS)},
        "search": {"evaluations": 5, "batch": 3},
        "cluster": {"kind": "inline"},
        "tracking": {"uri": f"sqlite:///{Path(folder).resolve().parent / 'mlflow.db'}"},
        "folder": str(folder),
        **changes,
    }


@dataclass
class Calls:
    """Every task that the workers were asked for: (function's name, item)."""

    made: list[tuple[str, Any]] = field(default_factory=list)

    def of(self, name: str) -> list[Any]:
        return [item for function, item in self.made if function == name]


def run_pipeline(document: dict[str, Any], tracked: bool = True) -> tuple[Calls, Any]:
    """Runs the phases without Prefect and returns (the tasks they asked for, their receipt)."""
    from clado.settings.loading import parse_config
    from flows import pipeline, worker
    from flows.clock import Clock
    from flows.clusters.inline import InlineWorkers

    calls = Calls()
    plain = InlineWorkers.map

    def counted(self: InlineWorkers, function: Callable[..., Any], config: Any, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            calls.made.append((function.__name__, item))
            yield from plain(self, function, config, [item])

    worker.forget()  # a run of its own, as that of another process is
    with ExitStack() as stack:
        stack.enter_context(patch.object(InlineWorkers, "map", counted))
        if not tracked:
            stack.enter_context(patch.object(pipeline, "deliver", lambda run, record, flow_run_id: None))
            stack.enter_context(patch.object(pipeline.artifacts, "show", lambda record, receipt: None))
        return calls, pipeline.run_phases(parse_config(document), Clock())


@dataclass(frozen=True)
class Finished:
    """A finished run: its folder, its settings, and its tasks. It is read-only; copy the folder to change it."""

    folder: Path
    document: dict[str, Any]
    calls: Calls
    receipt: Any


def copy_of(finished: Finished, folder: Path) -> dict[str, Any]:
    """The configuration of a copy of the finished run, which uses a copy of MLflow's file."""
    shutil.copytree(finished.folder, folder)
    whole = finished.document["tracking"]["uri"]
    copied = whole.replace("mlflow.db", f"{uuid4().hex}.db")  # beside it: its artifacts are
    shutil.copy(whole.removeprefix("sqlite:///"), copied.removeprefix("sqlite:///"))
    for file in (folder / "config.yaml", folder / "mlflow-delivered.json"):
        file.write_text(file.read_text().replace(whole, copied))
    return {**finished.document, "tracking": {"uri": copied}, "folder": str(folder)}
