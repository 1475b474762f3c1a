"""What a process keeps: the run that it opened last, and whether it is checked."""

import pytest

from clado.run.opened_run import OpenedRun, open_run
from clado.settings.loading import parse_config
from flows import worker
from flows.clusters.inline import InlineWorkers
from tests.running import config


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> OpenedRun:
    return open_run(parse_config(config(tmp_path_factory.mktemp("opened") / "run", corrections=[])))


@pytest.fixture(autouse=True)
def nothing_kept():
    worker.forget()
    yield
    worker.forget()


def test_a_process_keeps_the_run_that_it_opened_last(opened):
    document = opened.config.model_dump(mode="json")
    InlineWorkers().open_run(opened)
    assert worker.last_opened(document) is opened
    other = worker.last_opened({**document, "bits": [2, 8]})
    assert other.space.bit_widths[0] == (2, 8)
    assert worker.last_opened(document) is not opened


def test_images_and_budgets_are_checked_once_in_a_process(opened, monkeypatch):
    """The command checks before it starts anything, and the flow asks again."""
    checks: list[OpenedRun] = []
    monkeypatch.setattr(worker, "checked", lambda run: checks.append(run) or run)
    worker.keep(opened)  # which nothing has checked
    first = worker.checked_run(opened.config)
    assert worker.checked_run(opened.config) is first is not opened
    assert checks == [first]
