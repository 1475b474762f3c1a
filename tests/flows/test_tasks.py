"""Phases as Prefect tasks: the same values, and Prefect neither looks into them nor keeps them."""

import pytest
from prefect import flow
from prefect.testing.utilities import prefect_test_harness

from flows import pipeline


class Unreadable:
    """An object that Prefect must not look into."""

    def __iter__(self):
        raise AssertionError("Prefect looked into it")

    def __getstate__(self):
        raise AssertionError("Prefect kept it")


def double(value: Unreadable, times: int) -> list[Unreadable]:
    return [value] * times


def test_a_phase_is_a_function_of_its_arguments():
    value = Unreadable()
    assert pipeline.as_function(double, value, times=2) == [value, value]


@pytest.mark.system
def test_a_task_gives_what_its_phase_gives_and_prefect_does_not_look_into_it():
    value = Unreadable()

    @flow(persist_result=False)
    def steps() -> bool:
        return pipeline.as_task(double, value, times=2) == [value, value]

    with prefect_test_harness():
        assert steps()
