"""The whole pipeline. Servers and workers start in the background, while this process imports, loads and checks."""

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
    """Runs a configuration as a Prefect flow. It resumes what its folder already holds.

    Args:
        settings: The configuration.
        clock: Seconds by phase. The run adds to it.
        begin: When the command began, as time.perf_counter gives it.

    Returns:
        The run, and MLflow's receipt.
    """
    with _server() as server:
        clusters.prepare(settings)
        from flows.worker import checked_run

        run = checked_run(settings)
        from flows.commands.plan import plan_text

        print(plan_text(run), file=sys.stderr)
        from flows.environment import make_home
        from flows.guard import did_not_start, locked, orchestrated

        with locked(run.folder):  # checked here too, so that the user gets one message; the flow holds the lock
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
    # the seconds that no phase covers are the start of the orchestrator
    flow_seconds = sum(clock.values()) - sum(before.values())
    clock["start-up"] += time.perf_counter() - entered - flow_seconds
    return run, receipt


@contextmanager
def _server() -> Iterator[EmbeddedServer | None]:
    """Prefect's embedded server if one is needed. It ends at once if the command is refused, otherwise with the process."""
    server = embedded.start()
    if server is None:
        yield None
        return
    try:
        yield server
    except BaseException:
        server.end()
        raise
    atexit.register(server.end)  # registered before Prefect is imported, so it runs after Prefect has sent everything
