"""The pipeline: prepare → measure → choose → reconstruct → evaluate → serve → record → deliver. With Prefect and Dask."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ParamSpec, Protocol, TypeVar

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.utilities.annotations import quote

from clado.errors import CladoError
from clado.records.results import Receipt
from clado.records.text import write_text
from clado.run.limits import budgets_of_config
from clado.settings.loading import parse_config
from clado.settings.schema import RunConfig
from flows import artifacts, clusters, worker
from flows.clock import Clock
from flows.guard import insistent, locked
from flows.phases.choose import choose
from flows.phases.deliver import deliver, failure_recorded
from flows.phases.evaluate import evaluate
from flows.phases.measure import measure
from flows.phases.prepare import prepare
from flows.phases.reconstruct import reconstruct

P = ParamSpec("P")
R = TypeVar("R")


class Step(Protocol):
    """How a phase is called."""

    def __call__(self, phase: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """What the phase returns."""
        ...


def as_function(phase: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls a phase directly, without Prefect."""
    return phase(*args, **kwargs)


def as_task(phase: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls a phase as a Prefect task.

    Prefect caches and keeps nothing. It never gets the arguments of a phase, and the results are wrapped so that it does not
    look into them. Both hold whole networks and matrices.
    """

    @task(name=phase.__name__, cache_policy=NO_CACHE, persist_result=False)
    def quoted() -> quote:
        return quote(phase(*args, **kwargs))

    result: R = quoted().unquote()
    return result


def flow_run_name() -> str:
    """The name of a flow run in Prefect: its network and its budgets."""
    config = flow_run.parameters["config"]
    return name_of(lambda: config if isinstance(config, RunConfig) else parse_config(config))


def name_of(load: Callable[[], RunConfig]) -> str:
    """Network and budgets of the settings that `load` gives."""
    try:
        settings = load()
    except CladoError:  # the run itself reports the error
        return "refused"
    budgets = ", ".join(budget.name for budget in budgets_of_config(settings))
    return f"{settings.network.name} at {budgets}"


@flow(name="clado-pipeline", flow_run_name=flow_run_name, validate_parameters=False, persist_result=False)
def pipeline(config: RunConfig | dict[str, Any], clock: dict[str, float] | None = None) -> Receipt:
    """Runs a configuration (or plain data that `RunConfig` takes) to the end. It resumes what the folder already holds.

    Prefect keeps the parameters of a flow run. A `RunConfig` has no credentials there. `clock` is the caller's table of seconds
    by phase. The flow adds to it.
    """
    return run_phases(
        config if isinstance(config, RunConfig) else parse_config(config), Clock({} if clock is None else clock), as_task
    )


def run_phases(config: RunConfig, clock: Clock, step: Step = as_function) -> Receipt:
    """Runs every phase in turn. `step` calls each of them."""
    run, flow_run_id = worker.checked_run(config), str(flow_run.id or "")
    with locked(run.folder):
        run.identity.open_store()  # refused if it holds other numbers, before anything is written
        write_text(run.folder / "config.yaml", run.config.to_yaml())
        with failure_recorded(run, flow_run_id), ExitStack() as cluster, insistent():
            with clock.phase("start-up"):
                workers = cluster.enter_context(clusters.opened(run))
            with clock.phase("preparing"):
                preparing_notes = step(prepare, run, workers)
            with clock.phase("measuring"):
                measurement = step(measure, run, workers)
            choice = step(choose, run, workers, measurement.measured, clock)
            if run.config.effort != "fast":
                with clock.phase("reconstructing"):
                    choice = step(reconstruct, run, workers, choice)
            with clock.phase("evaluation"):
                accuracies = step(evaluate, run, workers, choice.results)
            serving, serving_notes = None, list[str]()
            if run.config.runtime is not None:
                from flows.phases.serve import serve

                with clock.phase("serving"):
                    serving, serving_notes = step(serve, run, choice.results)
            with clock.phase("recording"):
                from flows.phases.record import record  # imports matplotlib

                notes = [*preparing_notes, *measurement.notes, *choice.notes, *serving_notes]
                recorded = step(record, run, choice, accuracies, notes, clock.seconds, serving)
                receipt = step(deliver, run, recorded, flow_run_id)
                artifacts.show(recorded, receipt)
            with clock.phase("shutdown"):
                cluster.close()
    return receipt
