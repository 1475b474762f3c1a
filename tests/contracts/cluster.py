"""What every kind of cluster keeps. Subclass with `settings` for a new file of flows/clusters."""

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from clado.config import RunConfig, parse_config
from clado.errors import CladoError, MeasurementError
from flows import clusters


def echo(document: dict[str, Any], item: Any) -> tuple[dict[str, Any], Any]:
    """A task that says what it was given."""
    return document, item


def note(document: dict[str, Any], item: tuple[str, int]) -> int:
    """A task that leaves one file for each time it is called."""
    folder, number = item
    Path(folder, f"{number}-{os.getpid()}-{time.monotonic_ns()}").touch()
    return number


def fail(document: dict[str, Any], item: int) -> int:
    """A task that cannot be done for one item."""
    if item == 3:
        raise MeasurementError("item 3 has no finite loss")
    return item


def configuration(settings: dict[str, Any]) -> RunConfig:
    """A configuration with this cluster."""
    return parse_config({"network": {"source": "zoo", "name": "resnet20_fashion_mnist"}, "cluster": settings})


class ClusterContract:
    """Laws of workers: each item is computed once, its result comes back, its error too."""

    settings: dict[str, Any]

    @pytest.fixture(scope="class")
    @classmethod
    def workers(cls):
        with clusters.start(configuration(cls.settings)) as started:
            yield started

    def test_every_item_comes_back_with_the_configuration(self, workers):
        config = configuration(self.settings)
        results = list(workers.map(echo, config, range(7)))
        assert sorted(item for _, item in results) == list(range(7))
        assert all(parse_config(document) == config for document, _ in results)

    def test_each_item_is_computed_once(self, workers, tmp_path):
        items = [(str(tmp_path), number) for number in range(9)]
        assert sorted(workers.map(note, configuration(self.settings), items)) == list(range(9))
        assert Counter(file.name.split("-")[0] for file in tmp_path.iterdir()) == {str(k): 1 for k in range(9)}

    def test_equal_items_are_computed_each_time(self, workers, tmp_path):
        for _ in range(2):
            assert list(workers.map(note, configuration(self.settings), [(str(tmp_path), 1)] * 3)) == [1] * 3
        assert len(list(tmp_path.iterdir())) == 6

    def test_no_items_are_no_work(self, workers):
        assert list(workers.map(echo, configuration(self.settings), [])) == []

    def test_an_error_of_a_task_is_the_callers(self, workers):
        with pytest.raises(CladoError, match="item 3 has no finite loss"):
            list(workers.map(fail, configuration(self.settings), range(5)))
        assert sorted(workers.map(fail, configuration(self.settings), range(3))) == [0, 1, 2]  # and the next call is well

    def test_a_caller_may_stop_early(self, workers):
        results = workers.map(echo, configuration(self.settings), range(20))
        next(results)
        results.close()
        assert len(list(workers.map(echo, configuration(self.settings), range(4)))) == 4
