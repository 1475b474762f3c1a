"""An opened run: opened anew each time, and its parts are made once."""

from clado.run.opened_run import open_run
from clado.settings.loading import parse_config
from tests.running import config


def test_a_run_is_opened_anew_each_time_and_its_parts_are_made_once(tmp_path):
    opened = open_run(parse_config(config(tmp_path / "run", corrections=[])))
    again = open_run(opened.config)
    assert again is not opened
    assert again.float_network is not opened.float_network
    assert again.identity.document == opened.identity.document
    assert opened.evaluation is opened.evaluation
    assert opened.evaluation.preparation is opened.preparation
    assert opened.preparation.identity is opened.identity
