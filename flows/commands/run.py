"""The whole pipeline. Servers and workers start in the background while this process imports, loads and checks."""

import atexit
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from clado.settings.schema import RunConfig
from flows import clusters, embedded
from flows.embedded import EmbeddedServer

if TYPE_CHECKING:
    from clado.records.results import Receipt
    from clado.run.opened_run import OpenedRun


def run_flow(settings: RunConfig, clock: dict[str, float], begin: float) -> "tuple[OpenedRun, Receipt]":
    """Runs a configuration as a Prefect flow; resumes whatever its folder already holds.

    Args:
        settings: The configuration.
        clock: Seconds by phase, which is filled.
        begin: When the command began, as time.perf_counter gives it.

    Returns:
        The run, and what MLflow was told.
    """
    with _server() as server:
        clusters.prepare(settings)
        from flows.worker import checked_run

        run = checked_run(settings)
        from flows.commands.plan import plan_text

        print(plan_text(run), file=sys.stderr)
        from flows.environment import make_home
        from flows.guard import did_not_start, locked, orchestrated

        with locked(run.folder):  # refused here, where a message is enough, and held by the flow
            make_home()
            try:
                if server is not None:
                    server.begin()
            except OSError as error:
                raise did_not_start(error) from None
    clock["start-up"] = time.perf_counter() - begin
    before, entered = dict(clock), time.perf_counter()
    with clusters.in_background(run), orchestrated(lambda: clock == before, lambda: "shutdown" in clock):
        from flows.pipeline import pipeline

        if server is not None:
            server.wait()
        receipt: Receipt = pipeline(run.config, clock)
    # what the flow's own phases do not cover is the orchestrator's start
    flow_seconds = sum(clock.values()) - sum(before.values())
    clock["start-up"] += time.perf_counter() - entered - flow_seconds
    return run, receipt


@contextmanager
def _server() -> Iterator[EmbeddedServer | None]:
    """Prefect's embedded server where one is needed. It ends at once where the command is refused, else with the process."""
    server = embedded.start()
    if server is None:
        yield None
        return
    try:
        yield server
    except BaseException:
        server.end()
        raise
    atexit.register(server.end)  # before Prefect is imported, hence run after Prefect has told it everything
