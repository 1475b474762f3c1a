"""Fixtures that several tests share."""

import pytest

from tests.running import Finished, config, run_pipeline


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Finished:
    """One reduced run of the whole pipeline on the shipped network."""
    document = config(tmp_path_factory.mktemp("runs") / "reduced")
    calls, receipt = run_pipeline(document)
    from pathlib import Path

    return Finished(Path(document["folder"]), document, calls, receipt)
