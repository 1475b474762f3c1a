"""Serve: the chosen networks in the runtime of the settings, timed and counted as it computes them."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from clado.errors import CladoError
from clado.exporting.runtimes import runtime_of
from clado.records.results import CHOSEN, Result
from clado.records.serving import Serving
from clado.run.opened_run import OpenedRun
from flows import serving


def serve(run: OpenedRun, results: Sequence[Result]) -> tuple[Serving | None, list[str]]:
    """(what the runtime measured of every budget's chosen network, notes). None where the settings name no runtime.

    A network that the runtime does not take ends nothing: a note says why there are no figures.
    """
    settings = run.config.runtime
    if settings is None:
        return None, []
    runtime = runtime_of(settings.name)
    networks = {row.budget: row.assignment for row in results if row.method == CHOSEN}
    try:
        with TemporaryDirectory() as folder:
            measured, _ = serving.serve(run, settings.name, runtime, networks, Path(folder), settings.threads, settings.images)
    except CladoError as error:
        return None, [f"{runtime.title} has measured nothing: {error}"]
    return measured, []
